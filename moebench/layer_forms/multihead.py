"""MH-MoE, multi-head mixture of experts (Wu et al., arXiv 2404.15045): parts of a token go to experts of their own.

    (s_1, ..., s_h) = A x_t                     h sub-tokens of D/h
    o_i = sum_{e in S_i} g_e f_e(s_i)           S_i the K largest of R s_i, g the softmax over them
    y_t = B (o_1, ..., o_h)

x [T, D]; heads A [D, D] and merge B [D, D]; router R [E, D/h]; w_in [E, m*F, D/h]; w_down [E, D/h, F]; h = 4, the
paper's. With F as in the plain layer the experts' FLOPs are the plain layer's, and their weights an h-th of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebench.catalogue.layer_forms import SUB_TOKENS
from moebench.catalogue.spec import LayerSpec
from moebench.layer_forms.bank import (
    NEAR,
    Weights,
    doubled,
    drawer,
    mix,
    reference_mix,
    scores,
    settle,
    softmax_over,
    top_k,
)

ROUNDINGS = 4  # of the weights' dtype, in the largest score: the gate sees sub-tokens that were rounded to it


def make_weights(
    layer: LayerSpec, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str
) -> Weights:
    """heads, merge, router, w_in, w_down; the router's width D/h says how many sub-tokens there are."""
    D, F, E, m = layer.hidden_size, layer.expert_ffn_size, layer.routed_experts, 2 if layer.gated else 1
    draw = drawer(generator, dtype, device)
    part = D // SUB_TOKENS
    return {
        "heads": draw(D, D), "merge": draw(D, D), "router": draw(E, part),
        "w_in": draw(E, m * F, part), "w_down": draw(E, part, F),
    }  # fmt: skip


def choices(layer: LayerSpec, weights: Weights, x: Tensor) -> Tensor:
    """Experts of each sub-token: int64 [T*h, K]."""
    return top_k(scores(_split(weights, x), weights["router"]), layer.top_k)


def forward(layer: LayerSpec, weights: Weights, x: Tensor) -> Tensor:
    """x [T, D] -> y [T, D]."""
    parts = _split(weights, x)
    logits = scores(parts, weights["router"])
    ids = top_k(logits, layer.top_k)
    out = mix(layer, parts, ids, softmax_over(logits, ids), weights["w_in"], weights["w_down"])
    return out.view_as(x) @ weights["merge"].T


def reference(layer: LayerSpec, weights: Weights, x: Tensor, chosen: Tensor | None = None) -> Tensor:
    """x float64 [T, D] -> y float64 [T, D], head by head; `chosen` as from `choices`."""
    part, near = weights["router"].shape[1], max(NEAR, ROUNDINGS * torch.finfo(weights["router"].dtype).eps)
    weights = doubled(weights)
    y = torch.zeros_like(x)
    for head in range(x.shape[1] // part):
        rows = slice(head * part, (head + 1) * part)
        sub = x @ weights["heads"][rows].T
        logits = sub @ weights["router"].T
        given = None if chosen is None else chosen.unflatten(0, (len(x), -1))[:, head]
        ids = settle(logits, layer.top_k, given, near)
        gates = torch.softmax(logits.gather(1, ids), 1)
        out = reference_mix(layer, sub, ids, gates, list(weights["w_in"]), list(weights["w_down"]))
        y = y + out @ weights["merge"][:, rows].T
    return y


def _split(weights: Weights, x: Tensor) -> Tensor:
    """[T, D] -> sub-tokens [T*h, D/h], a token's side by side."""
    return (x @ weights["heads"].T).reshape(-1, weights["router"].shape[1])
