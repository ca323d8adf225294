"""dense-ffn: one FFN of width K*F, the same active FLOPs with no routing: the price of sparsity itself.

A yardstick, not a competitor: it computes another function (the first K experts
on every token, with weight 1) and is checked against that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moebench.point import STAGES
from moebench.providers.base import ExpertsProvider, State
from moebench.providers.case import Case
from moebench.providers.layer_parts import activate, join_shared
from moebench.weights import Weights
from moebench.workload import Inputs


def ffn(x: Tensor, w_in: Tensor, w_down: Tensor, activation: str) -> Tensor:
    """x [T, D], w_in [m*K*F, D], w_down [D, K*F] -> [T, D]."""
    return activate(x @ w_in.T, activation) @ w_down.T


def widen(weights: Weights, top_k: int, *, gated: bool) -> tuple[Tensor, Tensor]:
    """The first K experts side by side: w_in [m*K*F, D] (all gates first), w_down [D, K*F]."""
    maps = weights.w_gate_up[:top_k].chunk(2, dim=1) if gated else (weights.w_gate_up[:top_k],)
    w_in = torch.cat([half.flatten(0, 1) for half in maps])
    return w_in, weights.w_down[:top_k].transpose(0, 1).flatten(1, 2).contiguous()


@dataclass(frozen=True)
class DenseFFN(ExpertsProvider):
    """The yardstick as a provider; scope `layer` adds the shared experts but no router."""

    def refuse(self, case: Case) -> str | None:
        if case.scope in STAGES:
            return f"{self.name} has no stage {case.scope!r}"
        return super().refuse(case)

    def prepare(self, weights: Weights, case: Case) -> State:
        w_in, w_down = (w.detach() for w in widen(weights, case.layer.top_k, gated=case.layer.gated))
        if case.direction == "forward_backward":
            w_in, w_down = w_in.requires_grad_(), w_down.requires_grad_()
        return State(replace(weights, w_gate_up=w_in, w_down=w_down), case, ffn)

    def run(self, state: State, inputs: Inputs) -> Tensor:
        weights, case = state.weights, state.case
        weights.w_gate_up.grad = weights.w_down.grad = None  # its own leaves: the harness clears the layer's only
        y = ffn(inputs.x, weights.w_gate_up, weights.w_down, case.activation)
        return join_shared(y, inputs.x, weights, case, inputs.dense_x) if case.scope == "layer" else y

    def executed_flops(self, case: Case, counts: Tensor) -> float:
        return case.tokens * case.layer.top_k * 2.0 * case.layer.expert_params()


PROVIDER = DenseFFN("dense-ffn", ffn)
