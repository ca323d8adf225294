"""HMoE, heterogeneous mixture of experts (Wang et al., arXiv 2408.10681): experts of several widths.

    y_t = sum_{e in S} g_e f_e(x_t)         S the K largest of R x_t, g the softmax over them, f_e of width F_e

x [T, D]; router R [E, D]; class c of experts e_c, e_c + 1, ...: w_in_c [E_c, m*F_c, D], w_down_c [E_c, D, F_c]. Half of
the experts have width F/2 and half 3F/2, narrow ones first, the middle one of an odd number F: together E*F. (The paper
lets widths rise by an arithmetic series; two classes keep the products batched.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebench.catalogue.layer_forms import width_classes
from moebench.catalogue.spec import LayerSpec
from moebench.layer_forms.bank import (
    Weights,
    doubled,
    drawer,
    reference_mix,
    run_experts,
    scores,
    settle,
    softmax_over,
    top_k,
    weighted,
)


def make_weights(
    layer: LayerSpec, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str
) -> Weights:
    """router; w_in_0, w_down_0, w_in_1, ... of the classes of `width_classes`."""
    D, m, draw = layer.hidden_size, 2 if layer.gated else 1, drawer(generator, dtype, device)
    weights = {"router": draw(layer.routed_experts, D)}
    for index, (count, width) in enumerate(width_classes(layer)):
        weights |= {f"w_in_{index}": draw(count, m * width, D), f"w_down_{index}": draw(count, D, width)}
    return weights


def choices(layer: LayerSpec, weights: Weights, x: Tensor) -> Tensor:
    """Experts of each token: int64 [T, K]."""
    return top_k(scores(x, weights["router"]), layer.top_k)


def forward(layer: LayerSpec, weights: Weights, x: Tensor) -> Tensor:
    """x [T, D] -> y [T, D], one grouped product a class; the classes are as the weights say."""
    logits = scores(x, weights["router"])
    ids = top_k(logits, layer.top_k)
    rows, first = x.new_zeros(ids.numel(), x.shape[1]), 0
    for w_in, w_down in _classes(weights):
        mine = ((ids >= first) & (ids < first + len(w_in))).flatten().nonzero().flatten()
        token = mine.div(layer.top_k, rounding_mode="floor")
        out = run_experts(layer, x, token, ids.flatten()[mine] - first, w_in, w_down)
        rows, first = rows.index_copy(0, mine, out), first + len(w_in)
    return weighted(rows, softmax_over(logits, ids))


def reference(layer: LayerSpec, weights: Weights, x: Tensor, chosen: Tensor | None = None) -> Tensor:
    """x float64 [T, D] -> y float64 [T, D], expert by expert; `chosen` as from `choices`."""
    weights = doubled(weights)
    logits = x @ weights["router"].T
    ids = settle(logits, layer.top_k, chosen)
    gates = torch.softmax(logits.gather(1, ids), 1)
    w_in, w_down = ([expert for stack in stacks for expert in stack] for stacks in zip(*_classes(weights), strict=True))
    return reference_mix(layer, x, ids, gates, w_in, w_down)


def _classes(weights: Weights) -> list[tuple[Tensor, Tensor]]:
    """(w_in, w_down) of each class."""
    return [(weights[f"w_in_{c}"], weights[f"w_down_{c}"]) for c in range(len(weights) // 2)]
