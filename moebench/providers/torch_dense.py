"""torch-dense: every expert on every token, weighted; E/K times the FLOPs, and no data-dependent shape."""

from __future__ import annotations

import torch
from torch import Tensor

from moebench.providers.base import ExpertsProvider
from moebench.providers.case import Case
from moebench.providers.layer_parts import activate


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    *,
    activation: str,
    slots: int | None,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
) -> Tensor:
    """x [T, D], ids int64 [T, K] (-1 dropped), weights [T, K] -> y [T, D]; holds [E, T, m*F] at once."""
    E = w_down.shape[0]
    rows = torch.matmul(x, w_gate_up.transpose(1, 2))  # [E, T, m*F]
    hidden = activate(rows if b_gate_up is None else rows + b_gate_up.unsqueeze(1), activation)
    out = torch.bmm(hidden, w_down.transpose(1, 2))  # [E, T, D]
    out = out if b_down is None else out + b_down.unsqueeze(1)
    mixing = weights.new_zeros(x.shape[0], E + 1).scatter_add(1, ids.where(ids >= 0, E), weights)[:, :E]
    return torch.einsum("etd,te->td", out, mixing.to(out.dtype))


def rows_executed(case: Case, counts: Tensor) -> float:
    """All E experts on all T tokens, or on all rows of a Ragged or a Mix."""
    rows = case.tokens if case.form == "TopK" else float(counts.sum())
    return float(rows * case.layer.routed_experts)


PROVIDER = ExpertsProvider("torch-dense", experts, flops_executed=rows_executed, biases=True)
