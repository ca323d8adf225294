"""What several forms share: gates that are computed wide, banks of experts without a loop, and choices near a tie.

y_t = sum_k g_tk * f_{e_tk}(x_t), f_e an FFN with w_in [E, m*F, D] and w_down [E, D, F]. Assignments are sorted by
expert and multiplied by `grouped_mm`, or, in dtypes and widths that it does not take, by a batched product padded to
the busiest expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moebench import oracle
from moebench.catalogue.spec import LayerSpec
from moebench.providers.layer_parts import activate

NEAR = 1e-4  # of the largest score: float32 is a hundred times finer, so closer ones are ties that rounding decides
GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROW_BYTES = 16  # rows of grouped_mm are multiples of it

Weights = dict[str, Tensor]


def drawer(generator: torch.Generator, dtype: torch.dtype, device: torch.device | str) -> Callable[..., Tensor]:
    """draw(*shape): normal values scaled by 1/sqrt(last dimension)."""

    def draw(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=shape[-1] ** -0.5, generator=generator)

    return draw


def wide(value: Tensor) -> Tensor:
    """At least float32: gates in 16 bits would make ties of close scores."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def doubled(weights: Weights) -> Weights:
    """The same weights in float64."""
    return {name: value.double() for name, value in weights.items()}


def scores(x: Tensor, gate: Tensor) -> Tensor:
    """x [n, D], gate [E, D] -> [n, E], at least float32."""
    return wide(x) @ wide(gate).T


def top_k(logits: Tensor, k: int) -> Tensor:
    """Indices of the k largest of the last dimension, largest first."""
    return logits.topk(k, dim=-1).indices


def softmax_over(logits: Tensor, ids: Tensor) -> Tensor:
    """Softmax over the chosen logits alone: [n, E], [n, K] -> [n, K]."""
    return logits.gather(-1, ids).softmax(-1)


def settle(scores: Tensor, k: int, chosen: Tensor | None, near: float = NEAR) -> Tensor:
    """The k largest scores, or where `chosen` is as good up to rounding, that.

    Args:
        scores: float64 [..., n].
        chosen: int64 [..., k] or None.
        near: of the largest score, what counts as rounding.
    """
    best, own = scores.topk(k, dim=-1)
    if chosen is None:
        return own
    least = best[..., -1] - near * scores.abs().amax(-1)
    return chosen.where(acceptable(chosen, scores.gather(-1, chosen), least), own)


def acceptable(chosen: Tensor, scores: Tensor, least: Tensor) -> Tensor:
    """Whether choices [..., k] are distinct and their scores [..., k] at least `least` [...]: bool [..., 1]."""
    ordered = chosen.sort(-1).values
    distinct = (ordered[..., 1:] > ordered[..., :-1]).all(-1)
    return (distinct & (scores.amin(-1) >= least)).unsqueeze(-1)


def activated(layer: LayerSpec, rows: Tensor) -> Tensor:
    """The layer's activation: [..., m*F] -> [..., F], gate columns first."""
    limit = layer.activation_limit
    return activate(rows, layer.activation if limit is None else f"{layer.activation}:{limit:g}")


def ffn(layer: LayerSpec, x: Tensor, w_in: Tensor, w_down: Tensor) -> Tensor:
    """[..., D] -> [..., D]; w_in [m*F, D], w_down [D, F], or a batch of each beside [S, t, D]."""
    return activated(layer, x @ w_in.mT) @ w_down.mT


def run_experts(layer: LayerSpec, x: Tensor, token: Tensor, expert: Tensor, w_in: Tensor, w_down: Tensor) -> Tensor:
    """f_{expert[r]}(x[token[r]]) for each assignment r: x [n, D], token and expert int64 [R] -> [R, D]."""
    order = expert.argsort(stable=True)
    row2slot = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    groups = expert[order]
    counts = groups.new_zeros(len(w_in)).scatter_add(0, groups, torch.ones_like(groups))
    hidden = activated(layer, _grouped(x[token[order]], w_in, groups, counts))
    return _grouped(hidden, w_down, groups, counts)[row2slot]


def mix(layer: LayerSpec, x: Tensor, ids: Tensor, gates: Tensor, w_in: Tensor, w_down: Tensor) -> Tensor:
    """sum_k gates[t, k] * f_{ids[t, k]}(x_t): x [n, D], ids and gates [n, K] -> [n, D]."""
    n, K = ids.shape
    token = torch.arange(n, device=x.device).repeat_interleave(K)
    return weighted(run_experts(layer, x, token, ids.flatten(), w_in, w_down), gates)


def weighted(rows: Tensor, gates: Tensor) -> Tensor:
    """rows [n*K, D] by token, gates [n, K] -> their weighted sums [n, D]."""
    return (rows.view(*gates.shape, rows.shape[1]) * gates.unsqueeze(-1).to(rows.dtype)).sum(1)


def reference_mix(
    layer: LayerSpec, x: Tensor, ids: Tensor, gates: Tensor, w_in: list[Tensor], w_down: list[Tensor]
) -> Tensor:
    """As `mix`, in float64, one expert after another by the oracle's FFN; experts may have widths of their own."""
    y = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        token, pick = (ids == expert).nonzero(as_tuple=True)
        out = oracle.ffn(layer, x[token], w_in[expert], w_down[expert])
        y = y.index_add(0, token, gates[token, pick].unsqueeze(1) * out)
    return y


def _grouped(rows: Tensor, stack: Tensor, groups: Tensor, counts: Tensor) -> Tensor:
    """rows [R, I] of the experts `groups` (int64 [R], rising), stack [E, O, I], counts int64 [E] -> [R, O]."""
    fits = all(size * rows.element_size() % ROW_BYTES == 0 for size in stack.shape[1:])
    if rows.dtype in GROUPED_DTYPES and fits and len(rows):
        return F.grouped_mm(rows, stack.mT, offs=counts.cumsum(0).to(torch.int32))
    depth = int(counts.max())
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[groups]
    slots = groups * depth + place
    padded = rows.new_zeros(len(stack) * depth, rows.shape[1]).index_copy(0, slots, rows)
    return torch.bmm(padded.view(len(stack), depth, rows.shape[1]), stack.mT).flatten(0, 1)[slots]
