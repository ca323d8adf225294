"""Routers that look beside the token: at a context vector, or at where the token lives.

context_logits, mixer   z = context W^T (+ b); top-1 of z, weight 1
fit_context_gate        MixER's fit of W: clusters of contexts, each given to an expert, then least squares
locality_bias           top-k of z + B [expert on the token's node]; weights softmax(z), without B
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from moebench.catalogue.spec import RouterSpec
from moebench.routing.fixed import domains, group_size
from moebench.routing.forms import TopK, top_k_routing
from moebench.routing.noisy import expect_picks, finite, largest, needed
from moebench.routing.scored import renormalised
from moebench.routing.scores import Scores, Side, wide

LOCALITY_BIAS = 1.0  # ours: no published number


class ContextGate(NamedTuple):
    """A fitted gate.

    Attributes:
        router: [E, C], float64.
        logit_bias: [E] float64, or None where none was asked for.
        experts: int64 [N]: the expert that each context's cluster was given to.
    """

    router: Tensor
    logit_bias: Tensor | None
    experts: Tensor


def context_logits(spec: RouterSpec, x: Tensor, gate: Mapping[str, Tensor], side: Side) -> Scores:
    """z = context W^T (+ b), whatever x is.

    Args:
        gate: "router" [E, C], where it exists "logit_bias" [E].
        side: context [T, C].

    Raises:
        ValueError: no context, or not of this shape.
    """
    context, router = needed(spec, "context", side.context), gate["router"]
    if context.shape != (len(x), router.shape[1]):
        expected = [len(x), router.shape[1]]
        raise ValueError(f"router {spec.kind!r}: context of shape {list(context.shape)}; expected {expected}")
    z = wide(context.to(router.dtype) @ router.T)
    return Scores(z + gate["logit_bias"].to(z) if "logit_bias" in gate else z, side=side)


def mixer(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """MixER (arXiv 2502.05335): the expert of the largest logit, weight 1; no gradient, since the gate is fitted."""
    expect_picks(spec, top_k, 1)
    ids = largest(scores.logits, 1)
    return top_k_routing(ids, torch.ones(ids.shape).to(scores.logits), scores.logits.shape[1], scores.logits)


def fit_context_gate(context: Tensor, losses: Tensor, *, bias: bool = False, iterations: int = 100) -> ContextGate:
    """MixER's fit of its gate (arXiv 2502.05335 and its released trainer).

    K-means with as many clusters as experts, a context belonging to the centre at the smallest mean absolute distance,
    started from a hierarchical clustering (the released code starts near 0 and waits where a cluster stays empty);
    each cluster goes to one expert, and each expert gets one, so that the sum of the clusters' median losses is least
    (the released code lets clusters choose in turn); W by least squares from contexts to one-hot experts.

    Args:
        context: [N, C], finite, N >= E.
        losses: [N, E], finite: the loss of every expert on every context.
        bias: whether to fit a bias too; without one the regions meet at the origin.
        iterations: of k-means, at most.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """
    from scipy.optimize import linear_sum_assignment

    if context.dim() != 2 or losses.dim() != 2 or len(context) != len(losses) or len(context) < losses.shape[1]:
        shapes = f"context {list(context.shape)}, losses {list(losses.shape)}"
        raise ValueError(f"{shapes}; expected [N, C] and [N, E] with N >= E")
    X, losses = context.double(), losses.double()
    if not (X.isfinite().all() and losses.isfinite().all()):
        raise ValueError("context and losses must be finite")
    E = losses.shape[1]
    cluster = _k_means(X, E, iterations)
    experts = torch.as_tensor(linear_sum_assignment(_median_by_cluster(losses, cluster, E).cpu().numpy())[1])
    experts = experts.to(X.device)[cluster]
    if bias:
        X = torch.cat([X, X.new_ones(len(X), 1)], dim=1)
    # The pseudo-inverse gives the shortest W where the contexts do not span their space.
    W = (torch.linalg.pinv(X) @ torch.nn.functional.one_hot(experts, E).double()).T
    return ContextGate(W[:, :-1], W[:, -1], experts) if bias else ContextGate(W, None, experts)


def locality_bias(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """Prefer experts on the token's own node: spec.groups nodes of consecutive experts, the node from side.domains.

    After LocMoE (arXiv 2401.13920), which gets its locality from a loss in training and not from a bias on the logits,
    as far as we could find out; the bias stands for a gate so trained. It moves choices and no weights.

    Raises:
        ValueError: nodes that do not divide E, or a node outside 0 to G - 1.
    """
    z = finite(scores.logits)
    E = z.shape[1]
    node = torch.arange(E, device=z.device) // group_size(spec, E)
    local = node == domains(scores, spec).unsqueeze(1)
    ids = largest(finite(z + LOCALITY_BIAS * local), top_k)
    return top_k_routing(ids, renormalised(torch.softmax(z, dim=1).gather(1, ids), spec), E, scores.logits)


def _k_means(X: Tensor, clusters: int, iterations: int) -> Tensor:
    """The cluster of each row of X [N, C], int64 [N]; a cluster may stay empty where rows repeat."""
    centres = _means(X, _linked(X, clusters), torch.full((clusters, X.shape[1]), torch.inf).to(X))
    for _ in range(iterations):
        moved = _means(X, _nearest(X, centres), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return _nearest(X, centres)


def _linked(X: Tensor, clusters: int) -> Tensor:
    """Clusters to start from, by Ward's joining, which a few outliers do not mislead."""
    from scipy.cluster.hierarchy import fcluster, linkage

    if len(X) == 1:
        return torch.zeros(1, dtype=torch.int64, device=X.device)
    joined = linkage(X.cpu().numpy(), method="ward")
    return torch.as_tensor(fcluster(joined, clusters, criterion="maxclust") - 1).to(X.device, torch.int64)


def _means(X: Tensor, cluster: Tensor, otherwise: Tensor) -> Tensor:
    """Mean of each cluster [clusters, C]; its row of `otherwise` where it is empty."""
    members = torch.nn.functional.one_hot(cluster, len(otherwise)).to(X)
    count = members.sum(dim=0).unsqueeze(1)
    return torch.where(count > 0, members.T @ X / count.clamp_min(1), otherwise)


def _nearest(X: Tensor, centres: Tensor) -> Tensor:
    """By mean absolute distance."""
    return torch.cdist(X, centres, p=1).argmin(dim=1)


def _median_by_cluster(losses: Tensor, cluster: Tensor, clusters: int) -> Tensor:
    """Median of each column of losses [N, E] over each cluster, [clusters, E]; 0 for an empty one."""
    rising, order = losses.sort(dim=0)
    grouped = rising.gather(0, cluster[order].argsort(dim=0, stable=True))
    count = torch.bincount(cluster, minlength=clusters)
    first = count.cumsum(0) - count
    low, high = first + (count - 1).clamp_min(0) // 2, first + count // 2
    last = len(losses) - 1
    median = (grouped[low.clamp(max=last)] + grouped[high.clamp(max=last)]) / 2
    return torch.where((count > 0).unsqueeze(1), median, 0.0)
