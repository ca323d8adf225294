"""vllm: fused_experts, its Triton MoE for tensors that are not quantised. Its weights have our layout."""

from __future__ import annotations

import torch
from torch import Tensor

from moebench.providers.case import Case
from moebench.providers.peers import Call, peer, peer_provider


def ready(w_gate_up: Tensor, w_down: Tensor, case: Case) -> Call:
    """w_gate_up [E, 2F, D], w_down [E, D, F], as they are; SiLU and not in place are its defaults."""
    function = peer("vllm.model_executor.layers.fused_moe", "fused_experts")

    def call(x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        y: Tensor = function(hidden_states=x, w1=w_gate_up, w2=w_down, topk_weights=gates, topk_ids=ids.to(torch.int32))
        return y

    return call


PROVIDER = peer_provider("vllm", ready)
