"""Two levels: first groups of experts, then experts inside each chosen group.

Expert e belongs to group e // n, n = E / G. With A = topk_groups and K = A m picks:

    h_group  = z_group + Phi^-1(u_group) softplus(noise_group)     [T, G], no noise in inference
    h_expert = z + Phi^-1(u) softplus(noise)                       [T, E]
    P = softmax over the A largest h_group; Q_g = softmax over the m largest h_expert inside group g
    weight of expert e in group g = P_g Q_g(e)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from moebench.catalogue.spec import RouterSpec
from moebench.routing.fixed import group_size
from moebench.routing.forms import TopK, top_k_routing
from moebench.routing.noisy import drawn, finite, largest, needed, with_normal
from moebench.routing.scores import Scores, Side, linear, wide


def two_level_scores(spec: RouterSpec, x: Tensor, gate: Mapping[str, Tensor], side: Side) -> Scores:
    """As `linear`, with noise_logits [T, E + G] where there is noise: those of the experts, then those of the groups.

    Args:
        x: [T, D].
        gate: "router" and "noise" [E, D], "groups" and "group_noise" [G, D].
        side: noise [T, E + G] in training, in the same order.
    """
    scores = linear(spec, x, gate, side)
    if scores.noise_logits is None:
        return scores
    return replace(scores, noise_logits=torch.cat([scores.noise_logits, wide(x @ gate["group_noise"].T)], dim=1))


def hierarchical(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """Hierarchical noisy top-k (Shazeer 2017, arXiv 1701.06538, appendix B).

    Experts are named in falling order of weight; the weights sum to spec.scale.

    Raises:
        ValueError: groups that do not divide E, or picks that do not spread evenly over the chosen groups.
    """
    z, z_group = finite(scores.logits), finite(needed(spec, "group_logits", scores.group_logits))
    T, E = z.shape
    n, inside = group_size(spec, E), _picks_inside(spec, E, top_k)
    if z_group.shape[1] != spec.groups:
        raise ValueError(f"router {spec.kind!r}: group_logits of {z_group.shape[1]} groups; expected {spec.groups}")
    if spec.training:
        u, spread = drawn(spec, scores.noise, E + spec.groups), needed(spec, "noise_logits", scores.noise_logits)
        z, z_group = with_normal(z, u[:, :E], spread[:, :E]), with_normal(z_group, u[:, E:], spread[:, E:])
    groups = largest(z_group, spec.topk_groups)
    at = (groups.unsqueeze(-1) * n + torch.arange(n, device=z.device)).flatten(1)  # experts of the chosen groups
    among = z.gather(1, at).unflatten(1, (spec.topk_groups, n))
    best = largest(among.flatten(0, 1), inside).view(T, spec.topk_groups, inside)
    P = torch.softmax(z_group.gather(1, groups), dim=1)
    weights = (P.unsqueeze(-1) * torch.softmax(among.gather(2, best), dim=2)).flatten(1)
    ids = (groups.unsqueeze(-1) * n + best).flatten(1)
    ids, weights = _falling(ids, weights)
    return top_k_routing(ids, weights * spec.scale, E, scores.logits)


def _picks_inside(spec: RouterSpec, routed_experts: int, top_k: int) -> int:
    if not 1 <= spec.topk_groups <= spec.groups or top_k % spec.topk_groups:
        raise ValueError(
            f"router {spec.kind!r}: {top_k} picks do not spread evenly over {spec.topk_groups} of {spec.groups} groups"
        )
    picks = top_k // spec.topk_groups
    if picks > routed_experts // spec.groups:
        raise ValueError(f"router {spec.kind!r}: {picks} picks in groups of {routed_experts // spec.groups} experts")
    return picks


def _falling(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Both [T, K] by falling weight, ties to the lower expert."""
    by_id = ids.argsort(dim=1)
    order = by_id.gather(1, weights.detach().gather(1, by_id).argsort(dim=1, descending=True, stable=True))
    return ids.gather(1, order), weights.gather(1, order)
