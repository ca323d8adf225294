"""The float64 answer, one expert at a time, shared with no implementation.

y_t = sum_k w_tk * f_e(x_t) over given ids and weights, -1 meaning dropped, plus
the shared experts; differentiable, so autograd gives the gradients' oracle too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moebench.catalogue.spec import LayerSpec
from moebench.workload import Weights


def experts(layer: LayerSpec, weights: Weights, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
    """x float64 [n, D], ids int64 [n, K], gates float64 [n, K] -> float64 [n, D]."""
    y = torch.zeros_like(x)
    for expert in ids[ids >= 0].unique().tolist():
        token, pick = (ids == expert).nonzero(as_tuple=True)
        out = ffn(layer, x[token], *weights.expert(expert))
        y = y.index_add(0, token, gates[token, pick].unsqueeze(1) * out)
    return y


def shared(layer: LayerSpec, weights: Weights, x: Tensor) -> Tensor:
    """The always-on experts: float64 [n, D] -> float64 [n, D]."""
    if weights.shared_gate_up is None or weights.shared_down is None:
        return torch.zeros_like(x)
    y = ffn(layer, x, weights.shared_gate_up.double(), weights.shared_down.double())
    return y if weights.shared_gate is None else torch.sigmoid(x @ weights.shared_gate.double().T) * y


def gate(layer: LayerSpec, weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Every token's own choice: float64 [n, D] -> ids int64 [n, K], gates float64 [n, K]."""
    logits = x @ weights.router.double().T
    ids = logits.argsort(dim=1, descending=True)[:, : layer.top_k]
    raw = logits.gather(1, ids).exp()
    total = raw if layer.router.kind == "topk_softmax" or layer.router.normalise else logits.exp()
    return ids, layer.router.scale * raw / total.sum(1, keepdim=True)


def ffn(layer: LayerSpec, x: Tensor, w_in: Tensor, w_down: Tensor) -> Tensor:
    """One expert: [n, D] -> [n, D]; w_in [m*F, D], gate rows first; w_down [D, F]."""
    return hidden(layer, x, w_in) @ w_down.T


def hidden(layer: LayerSpec, x: Tensor, w_in: Tensor) -> Tensor:
    """The first half of an expert: [n, D] -> [n, F]."""
    rows, act = x @ w_in.T, _ACTIVATION[layer.activation]
    if not layer.gated:
        return act(rows)
    gates, up = rows.chunk(2, dim=1)
    return act(gates) * up


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / 2**0.5)),
    "relu": lambda z: z.clamp(min=0),
}
_ACTIVATION = {**_PLAIN, "swiglu": _PLAIN["silu"], "geglu": _PLAIN["gelu"]}
