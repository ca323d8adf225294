"""The float64 answer of the gate, for the routers that choose by a score of each expert; written apart from them.

u = score(z); the K largest u + b inside the best groups are chosen; weights are u of those, over their sum where the
layer normalises, times its scale.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moebench.catalogue.spec import LayerSpec
from moebench.weights import Weights


def covers(layer: LayerSpec) -> bool:
    """Whether this oracle knows the layer's router, as it is used."""
    return layer.router.kind in _SCORES and not (layer.router.training and layer.router.kind == "switch_top1")


def gate(layer: LayerSpec, weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Every token's own choice: float64 [n, D] -> ids int64 [n, K], gates float64 [n, K]."""
    spec, more = layer.router, weights.gate
    z = x @ weights.router.double().T
    if "logit_bias" in more:
        z = z + more["logit_bias"].double()
    u = _SCORES[spec.kind](z)
    chosen_by = z if spec.kind == "sigmoid_logit_bias" else u
    if "selection_bias" in more:
        chosen_by = chosen_by + more["selection_bias"].double()
    chosen_by = chosen_by.masked_fill(~_reachable(layer, chosen_by), -torch.inf)
    ids = chosen_by.argsort(dim=1, descending=True)[:, : layer.top_k]
    raw = u.gather(1, ids)
    divided = spec.normalise or spec.kind == "topk_softmax"
    return ids, spec.scale * (raw / raw.sum(1, keepdim=True) if divided else raw)


def _reachable(layer: LayerSpec, scores: Tensor) -> Tensor:
    """Which experts lie in a token's best groups."""
    spec, size = layer.router, scores.shape[1] // layer.router.groups
    best = 1 if spec.kind == "group_limited" else 2
    of_group = torch.stack([block.sort(1).values[:, -best:].sum(1) for block in scores.split(size, 1)], 1)
    last = of_group.sort(1).values[:, -spec.topk_groups].unsqueeze(1)
    return (of_group >= last).repeat_interleave(size, 1)


def _softmax(z: Tensor) -> Tensor:
    e = torch.exp(z - z.max(1, keepdim=True).values)
    return e / e.sum(1, keepdim=True)


def _sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def _standardised(z: Tensor) -> Tensor:
    centred = z - z.mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / max(1, z.shape[1] - 1)
    return _softmax(centred / variance.sqrt().clamp(min=1e-300))


_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax_topk": _softmax,
    "topk_softmax": _softmax,
    "dense_softmax": _softmax,
    "switch_top1": _softmax,
    "recycle_top1": _softmax,
    "frozen_random": _softmax,
    "softmax_bias": _softmax,
    "softmax_bias_zero": _softmax,
    "group_limited": _softmax,
    "group_limited_sum2": _softmax,
    "softcap_softmax_topk": lambda z: _softmax(30 * torch.tanh(z / 30)),
    "logit_standardised": _standardised,
    "sigmoid_topk": _sigmoid,
    "sigmoid_bias": _sigmoid,
    "sigmoid_logit_bias": _sigmoid,
    "sigmoid_input": _sigmoid,
    "sqrt_softplus_bias": lambda z: torch.log1p(torch.exp(z)).sqrt(),
}
