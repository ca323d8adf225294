"""sonic-moe: moe_general_routing_inputs of SonicMoE, the entry that takes experts and scores from outside.

Its faster path, which knows that every token has K experts, contains its own router and cannot be given ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebench.providers.case import Case
from moebench.providers.peers import Call, peer, peer_provider, require_capability


def ready(w_gate_up: Tensor, w_down: Tensor, case: Case) -> Call:
    """Views [2F, D, E] and [D, F, E] of the weights; gate rows first is its concat_layout."""
    require_capability("sonic-moe", w_down.device, (9, 10))
    function = peer("sonicmoe", "moe_general_routing_inputs")
    swiglu = peer("sonicmoe.enums", "ActivationType").SWIGLU
    E, K = w_down.shape[0], case.layer.top_k
    tokens = torch.arange(case.tokens, dtype=torch.int32, device=w_down.device).repeat_interleave(K)

    def call(x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        y: Tensor = function(
            x,
            gates.flatten(),
            tokens,
            ids.flatten().to(torch.int32),
            w_gate_up.permute(1, 2, 0),
            None,
            w_down.permute(1, 2, 0),
            None,
            E=E,
            stream_id=_stream(x),
            activation_type=swiglu,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
            concat_layout=True,
        )[0]
        return y

    return call


def _stream(x: Tensor) -> int | None:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None


PROVIDER = peer_provider("sonic-moe", ready, directions=("forward", "forward_backward"), multiple_of=8)
