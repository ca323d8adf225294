"""sglang: fused_experts, its Triton MoE. Its weights have our layout."""

from __future__ import annotations

import torch
from torch import Tensor

from moebench.providers.case import Case
from moebench.providers.peers import Call, peer, peer_provider


def ready(w_gate_up: Tensor, w_down: Tensor, case: Case) -> Call:
    """w_gate_up [E, 2F, D], w_down [E, D, F], as they are. By default it would write into x."""
    function = peer("sglang.srt.layers.moe.fused_moe_triton.fused_moe", "fused_experts")
    topk_output = peer("sglang.srt.layers.moe.topk", "StandardTopKOutput")
    E = w_down.shape[0]
    config = peer("sglang.srt.layers.moe.moe_runner", "MoeRunnerConfig")(
        num_experts=E, num_local_experts=E, top_k=case.layer.top_k, activation="silu", inplace=False
    )

    def call(x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        chosen = topk_output(topk_weights=gates, topk_ids=ids.to(torch.int32), router_logits=gates)
        y: Tensor = function(x, w_gate_up, w_down, chosen, config)
        return y

    return call


PROVIDER = peer_provider("sglang", ready)
