"""A right kernel that spends a known share of its time on nothing: `DELAY` in the text of its copy is replaced."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

DELAY = 0.0  # of the work's own time


def experts(x, ids, weights, w_gate_up, w_down):
    begin = time.perf_counter()
    y = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        if expert < 0:
            continue
        token, pick = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ w_gate_up[expert].T).chunk(2, dim=-1)
        y.index_add_(0, token, weights[token, pick].unsqueeze(1).to(x.dtype) * ((F.silu(gate) * up) @ w_down[expert].T))
    end = time.perf_counter()
    while time.perf_counter() < end + DELAY * (end - begin):
        pass
    return y


experts.accepts_drops = True
