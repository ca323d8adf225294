"""torch-loop: a Python loop over the experts, the form most model code starts with.

Takes quantised weights too, as the dequantising baseline: each expert's matrices are turned back into the inputs' dtype
at every call, and the activations are not quantised at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebench.point import PRECISIONS
from moebench.providers.base import ExpertsProvider
from moebench.providers.layer_parts import activate
from moebench.weights import expert_matrix


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
    """x [T, D], ids int64 [T, K] (-1 dropped), weights [T, K] -> y [T, D]. Reads the ids on the host.

    w_gate_up and w_down may be QuantisedWeights.
    """
    y = torch.zeros_like(x)
    for expert in ids[ids >= 0].unique().tolist():
        token, pick = (ids == expert).nonzero(as_tuple=True)
        up, down = expert_matrix(w_gate_up, expert, x.dtype), expert_matrix(w_down, expert, x.dtype)
        rows = x[token] @ up.T
        hidden = activate(rows if b_gate_up is None else rows + b_gate_up[expert], activation)
        out = hidden @ down.T if b_down is None else hidden @ down.T + b_down[expert]
        y = y.index_add(0, token, out * weights[token, pick].unsqueeze(1).to(out.dtype))
    return y


PROVIDER = ExpertsProvider("torch-loop", experts, precisions=PRECISIONS, biases=True)
