"""megablocks: ParallelDroplessMLP with grouped GEMMs, the experts of its dMoE without the router.

It keeps gate and up weights in two tensors, so a gradient would need a merging copy: forward only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moebench.providers.case import Case
from moebench.providers.peers import Call, peer, peer_provider

ACTIVATION = {"swiglu": F.silu, "geglu": F.gelu}


def ready(w_gate_up: Tensor, w_down: Tensor, case: Case) -> Call:
    """w1 (gate), v1 (up) and w2, each [E*F, D]: copies."""
    arguments = peer("megablocks.layers.arguments", "Arguments")
    layer = case.layer
    module = peer("megablocks.layers.dmoe", "ParallelDroplessMLP")(
        arguments(
            hidden_size=layer.hidden_size,
            ffn_hidden_size=layer.expert_ffn_size,
            moe_num_experts=layer.routed_experts,
            moe_top_k=layer.top_k,
            mlp_type="glu",
            mlp_impl="grouped",
            activation_fn=ACTIVATION[layer.activation],
            bias=False,
            return_bias=False,
            fp16=case.precision == "fp16",
            bf16=case.precision == "bf16",
            device=w_down.device,
        )
    )
    module.eval()  # training would store what a balancing loss needs
    gate, up = w_gate_up.detach().chunk(2, dim=1)
    for name, value in {"w1": gate, "v1": up, "w2": w_down.detach().transpose(1, 2)}.items():
        setattr(module.mlp, name, torch.nn.Parameter(value.flatten(0, 1).contiguous(), requires_grad=False))

    def call(x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        y: Tensor = module(x, None, gates.to(x.dtype), ids)
        return y

    return call


PROVIDER = peer_provider("megablocks", ready, activations=tuple(ACTIVATION), multiple_of=8)
