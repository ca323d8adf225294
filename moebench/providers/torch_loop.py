"""torch-loop: a Python loop over the experts, the form most model code starts with."""

from __future__ import annotations

import torch
from torch import Tensor

from moebench.providers.base import ExpertsProvider, activate


def experts(
    x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, *, activation: str, slots: int | None
) -> Tensor:
    """x [T, D], ids int64 [T, K] (-1 dropped), weights [T, K] -> y [T, D]. Reads the ids on the host."""
    y = torch.zeros_like(x)
    for expert in ids[ids >= 0].unique().tolist():
        token, pick = (ids == expert).nonzero(as_tuple=True)
        out = activate(x[token] @ w_gate_up[expert].T, activation) @ w_down[expert].T
        y = y.index_add(0, token, out * weights[token, pick].unsqueeze(1).to(out.dtype))
    return y


PROVIDER = ExpertsProvider("torch-loop", experts)
