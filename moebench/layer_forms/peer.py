"""PEER, parameter-efficient expert retrieval (He, arXiv 2407.04153): K of N single neurons, found by product keys.

    q = (q1, q2) = W_h x_t                         a query of each head h, halves of width d
    s_ij = q1 . c_i + q2 . c'_j                    score of expert e = i * sqrt(N) + j
    S_h = the k best of the k best i times the k best j        exactly the k best of all N
    y_t = sum_h sum_{e in S_h} softmax_{S_h}(s)_e * act(u_e . x_t) v_e

x [T, D]; N = E, a square; h * k = K, h = 8 or what divides K; F = 1; W [2*h*d, D]; sub-keys [2, sqrt(N), d], shared by
the heads as in the paper; down [N, D] (u), up [N, D] (v). The paper's batch norm of the queries is, in inference, a
linear map that W holds.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from moebench import oracle
from moebench.catalogue.layer_forms import peer_sizes
from moebench.catalogue.spec import LayerSpec
from moebench.layer_forms.bank import NEAR, Weights, acceptable, activated, drawer, wide

GATHERED = 1 << 26  # numbers copied out of `down` at once: a million tokens' neurons are never all there


def make_weights(
    layer: LayerSpec, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str
) -> Weights:
    """query [2*h*d, D] (half, head, width), keys [2, sqrt(N), d], down [N, D], up [N, D]."""
    D, N, (heads, _, keys, half) = layer.hidden_size, layer.routed_experts, peer_sizes(layer)
    draw = drawer(generator, dtype, device)
    return {
        "query": draw(2 * heads * half, D), "keys": draw(2, keys, half),
        "down": draw(N, D), "up": draw(N, D),
    }  # fmt: skip


def choices(layer: LayerSpec, weights: Weights, x: Tensor) -> Tensor:
    """Experts of each token and head: int64 [T, h, k]."""
    return retrieve(layer, weights, x)[0]


def forward(layer: LayerSpec, weights: Weights, x: Tensor) -> Tensor:
    """x [T, D] -> y [T, D]."""
    ids, best = retrieve(layer, weights, x)
    ids, gates = ids.flatten(1), best.softmax(-1).flatten(1)
    rows = max(1, GATHERED // (ids.shape[1] * x.shape[1]))
    dots = [_dots(weights["down"], *part) for part in zip(x.split(rows), ids.split(rows), strict=True)]
    hidden = activated(layer, torch.cat(dots)) * gates.to(x.dtype)
    return F.embedding_bag(ids, weights["up"], mode="sum", per_sample_weights=hidden)


def retrieve(layer: LayerSpec, weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Experts int64 [T, h, k] and their scores [T, h, k], at least float32, best first."""
    _, k, keys, _ = peer_sizes(layer)
    (first, i), (second, j) = (half.topk(k, dim=-1) for half in half_scores(layer, weights, wide(x)))
    sums = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2)
    experts = (i.unsqueeze(-1) * keys + j.unsqueeze(-2)).flatten(-2)
    best, place = sums.topk(k, dim=-1)
    return experts.gather(-1, place), best


def half_scores(layer: LayerSpec, weights: Weights, x: Tensor) -> Tensor:
    """Of each half of the query with each sub-key: x [T, D] -> [2, T, h, sqrt(N)], in the dtype of x."""
    heads, _, _, half = peer_sizes(layer)
    query = (x @ weights["query"].to(x.dtype).T).unflatten(1, (2, heads, half)).movedim(1, 0)
    return torch.einsum("pthd,pnd->pthn", query, weights["keys"].to(x.dtype))


def reference(layer: LayerSpec, weights: Weights, x: Tensor, chosen: Tensor | None = None) -> Tensor:
    """x float64 [T, D] -> y float64 [T, D], token by token; `chosen` as from `choices`."""
    first, second = half_scores(layer, {name: weights[name].double() for name in ("query", "keys")}, x)
    ids, score = _settle(first, second, peer_sizes(layer)[1], chosen)
    gates = torch.exp(score - score.amax(-1, keepdim=True))
    gates = gates / gates.sum(-1, keepdim=True)
    rows = []
    for token, experts, gate in zip(x, ids.flatten(1), gates.flatten(1), strict=True):
        neurons = oracle.hidden(layer, token.unsqueeze(0), weights["down"][experts].double())[0]
        rows.append((gate * neurons) @ weights["up"][experts].double())
    return torch.stack(rows)


def _dots(down: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    """u_e . x_t: x [n, D], ids [n, K] -> [n, K]."""
    return torch.bmm(down[ids], x.unsqueeze(-1)).squeeze(-1)


def _settle(first: Tensor, second: Tensor, k: int, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k best sums of all pairs and their scores, or `chosen` where it is as good up to rounding.

    With both halves sorted, the pair of ranks (a, b) has (a+1)(b+1) pairs at least as good: only those up to k matter.
    """
    keys = first.shape[-1]
    (s1, order1), (s2, order2) = (half.sort(-1, descending=True) for half in (first, second))
    ranks = [(a, b) for a, b in product(range(min(k, keys)), repeat=2) if (a + 1) * (b + 1) <= k]
    a, b = torch.tensor(ranks, device=first.device).T
    best, place = (s1[..., a] + s2[..., b]).topk(k, dim=-1)
    own = (order1[..., a] * keys + order2[..., b]).gather(-1, place)
    if chosen is None:
        return own, best
    given = first.gather(-1, chosen // keys) + second.gather(-1, chosen % keys)
    least = best[..., -1] - NEAR * (first.abs().amax(-1) + second.abs().amax(-1))
    good = acceptable(chosen, given, least)
    return chosen.where(good, own), given.where(good, best)
