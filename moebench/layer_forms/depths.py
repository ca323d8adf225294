"""Mixture-of-Depths (Raposo et al., arXiv 2404.02258): tokens choose whether they are computed at all.

    training:   the C tokens of the largest r_t = w . x_t, C = round(0.125 T)
    inference:  tokens with sigmoid(a . x_t + b) > 1/2, a predictor of the above that sees no other token
    y_t = x_t + r_t f(x_t) for those, and y_t = x_t for all others

x [T, D]; w, a [D]; b [1]; f an FFN of width K*F, so that a computed token costs what it costs in the MoE layer:
w_in [m*K*F, D], w_down [D, K*F]. b is drawn such that an eighth of standard normal tokens pass. Training is not causal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebench import oracle
from moebench.catalogue.layer_forms import DEPTH_SHARE, depth_tokens
from moebench.catalogue.spec import LayerSpec
from moebench.layer_forms.bank import NEAR, Weights, doubled, drawer, ffn, settle, top_k, wide


def make_weights(
    layer: LayerSpec, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str
) -> Weights:
    """router [D], predictor [D], threshold [1] (b), w_in [m*K*F, D], w_down [D, K*F]."""
    D, width, m = layer.hidden_size, layer.top_k * layer.expert_ffn_size, 2 if layer.gated else 1
    draw = drawer(generator, dtype, device)
    passing = torch.special.ndtri(torch.tensor([DEPTH_SHARE], dtype=torch.float64))
    return {
        "router": draw(D), "predictor": draw(D), "threshold": passing.to(device, dtype),
        "w_in": draw(m * width, D), "w_down": draw(D, width),
    }  # fmt: skip


def choices(layer: LayerSpec, weights: Weights, x: Tensor) -> Tensor:
    """Indices of the computed tokens: int64 [C] in training, in inference as many as pass."""
    if layer.router.training:
        return top_k(wide(x) @ wide(weights["router"]), depth_tokens(len(x)))
    return (_predicted(weights, wide(x)) > 0).nonzero().flatten()


def forward(layer: LayerSpec, weights: Weights, x: Tensor) -> Tensor:
    """x [T, D] -> y [T, D]; layer.router.training says which of the two choices is made."""
    ids = choices(layer, weights, x)
    rows = x[ids]
    gates = (wide(rows) @ wide(weights["router"])).to(x.dtype)
    return x.index_add(0, ids, gates.unsqueeze(1) * ffn(layer, rows, weights["w_in"], weights["w_down"]))


def reference(layer: LayerSpec, weights: Weights, x: Tensor, chosen: Tensor | None = None) -> Tensor:
    """x float64 [T, D] -> y float64 [T, D]; `chosen` as from `choices`."""
    weights = doubled(weights)
    r = x @ weights["router"]
    if layer.router.training:
        computed = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        computed[settle(r, depth_tokens(len(x)), chosen)] = True
    else:
        computed = _passing(_predicted(weights, x), chosen)
    y = oracle.ffn(layer, x, weights["w_in"], weights["w_down"])
    return torch.where(computed.unsqueeze(1), x + r.unsqueeze(1) * y, x)


def _predicted(weights: Weights, x: Tensor) -> Tensor:
    """Logits of the predictor: [T, D] -> [T]."""
    return x @ weights["predictor"].to(x.dtype) + weights["threshold"].to(x.dtype)


def _passing(logits: Tensor, chosen: Tensor | None) -> Tensor:
    """bool [T]; logits a rounding from zero pass where they are among `chosen`."""
    passing = logits > 0
    if chosen is None:
        return passing
    given = torch.zeros_like(passing)
    given[chosen] = True
    return torch.where(logits.abs() <= NEAR * logits.abs().amax(), given, passing)
