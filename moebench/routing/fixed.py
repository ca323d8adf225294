"""Routers that are not learned: a frozen gate, and tables of experts by token id.

    frozen                z = x W^T, W without gradient
    hashed                experts table[token id], weights 1/K
    hashed_sqrt_softplus  experts table[token id], weights sqrt(softplus(z)) of those
    domain_random         expert domain n + table[token id] mod n, n = E / G experts a domain, weight 1

Tables and token ids are checked where a routing is made (`check_lookup`), not in the rules, which are timed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moebench.catalogue.routers import router_info
from moebench.catalogue.spec import RouterSpec
from moebench.routing.forms import TopK, top_k_routing
from moebench.routing.noisy import expect_picks, needed
from moebench.routing.scored import renormalised, sqrt_softplus
from moebench.routing.scores import Scores, Side, linear


def frozen(spec: RouterSpec, x: Tensor, gate: Mapping[str, Tensor], side: Side) -> Scores:
    """As `linear`, with a router that gets no gradient (x does): learned against fixed random routing."""
    return linear(spec, x, {name: value.detach() for name, value in gate.items()}, side)


def hashed(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """Hash layers (arXiv 2106.04426); with several picks each is a whole expert, where the paper slices experts."""
    E = scores.logits.shape[1]
    ids = _looked_up(scores, spec)
    return top_k_routing(ids, torch.full(ids.shape, 1 / top_k).to(scores.logits), E)


def hashed_sqrt_softplus(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """DeepSeek-V4's first layers: the table chooses, the gate weighs."""
    ids = _looked_up(scores, spec)
    weights = renormalised(sqrt_softplus(scores.logits.gather(1, ids)), spec)
    return top_k_routing(ids, weights, scores.logits.shape[1], scores.logits)


def domain_random(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """PanGu-Sigma's random routed experts (arXiv 2303.10845): spec.groups domains."""
    expect_picks(spec, top_k, 1)
    E = scores.logits.shape[1]
    n = group_size(spec, E)
    ids = domains(scores, spec).unsqueeze(1) * n + _looked_up(scores, spec) % n
    return top_k_routing(ids, torch.ones(ids.shape).to(scores.logits), E)


def balanced_table(vocabulary: int, routed_experts: int, top_k: int, seed: int) -> Tensor:
    """A random table int64 [vocabulary, top_k]: distinct experts in a row, each as often as any other, or once more.

    Each full block of E rows is K shifts of one random permutation of the experts, so that every column of it is a
    permutation too; what is left over cuts one permutation into rows, again and again.

    Raises:
        ValueError: more picks than experts, or no rows.
    """
    V, E, K = vocabulary, routed_experts, top_k
    if not 1 <= K <= E or V < 1:
        raise ValueError(f"no table of {V} rows can name {K} distinct experts of {E} in each")
    generator = torch.Generator().manual_seed(seed)
    blocks = V // E
    experts = torch.rand(blocks + 1, E, generator=generator).argsort(dim=1)
    shifts = torch.rand(blocks, E, generator=generator).argsort(dim=1)[:, :K]
    place = (torch.arange(E).view(1, E, 1) + shifts.unsqueeze(1)) % E  # [blocks, E, K]
    full = experts[:-1].gather(1, place.flatten(1)).view(-1, K)
    rest = experts[-1, torch.arange((V - blocks * E) * K) % E].view(-1, K)
    return torch.cat([full, rest])[torch.randperm(V, generator=generator)]


def group_size(spec: RouterSpec, routed_experts: int) -> int:
    """E / G.

    Raises:
        ValueError: the groups do not divide the experts.
    """
    if spec.groups < 1 or routed_experts % spec.groups:
        raise ValueError(f"router {spec.kind!r}: {spec.groups} groups do not divide {routed_experts} experts")
    return routed_experts // spec.groups


def check_lookup(scores: Scores, spec: RouterSpec, top_k: int) -> None:
    """Everything a router of tables or domains relies on; waits for the device, so `route` asks it and rules do not.

    Raises:
        ValueError: no table, token ids or domains where the router needs them; a wrong shape or dtype; a token id
            outside the table; a table that does not name K distinct experts of 0 to E - 1 in each row; a domain
            outside 0 to G - 1; groups that do not divide E. One line.
    """
    wants = router_info(spec.kind).side
    if "domains" in wants:
        _check_domains(scores, spec)
    if "token_ids" in wants:
        _check_table(scores, spec, top_k)


def _check_domains(scores: Scores, spec: RouterSpec) -> None:
    group_size(spec, scores.logits.shape[1])
    found = needed(spec, "domains", scores.side.domains)
    _expect_length(spec, "domains", found, scores)
    _refuse(_outside(found, spec.groups), f"router {spec.kind!r}: a domain is not among 0 to {spec.groups - 1}")


def _check_table(scores: Scores, spec: RouterSpec, top_k: int) -> None:
    table, tokens = needed(spec, "table", scores.table), needed(spec, "token_ids", scores.side.token_ids)
    E, kind = scores.logits.shape[1], spec.kind
    _expect_length(spec, "token_ids", tokens, scores)
    if table.dim() != 2 or table.shape[1] != top_k or table.dtype != torch.int64:
        raise ValueError(f"router {kind!r}: a table {table.dtype} {list(table.shape)}; expected int64 [V, {top_k}]")
    _refuse(_outside(table, E), f"router {kind!r}: the table names an expert that is not among 0 to {E - 1}")
    _refuse(_outside(tokens, len(table)), f"router {kind!r}: a token id is not among the table's 0 to {len(table) - 1}")
    twice = table.sort(dim=1).values.diff(dim=1) == 0
    _refuse(twice, f"router {kind!r}: a row of the table names an expert twice")


def domains(scores: Scores, spec: RouterSpec) -> Tensor:
    """The domain (or node) of each token, int64 [T]."""
    return needed(spec, "domains", scores.side.domains)


def _looked_up(scores: Scores, spec: RouterSpec) -> Tensor:
    """table[token id], int64 [T, K]."""
    return needed(spec, "table", scores.table)[needed(spec, "token_ids", scores.side.token_ids)]


def _expect_length(spec: RouterSpec, name: str, values: Tensor, scores: Scores) -> None:
    T = len(scores.logits)
    if values.shape != (T,) or values.dtype != torch.int64:
        raise ValueError(f"router {spec.kind!r}: {name} {values.dtype} {list(values.shape)}; expected int64 [{T}]")


def _outside(values: Tensor, limit: int) -> Tensor:
    return (values < 0) | (values >= limit)


def _refuse(wrong: Tensor, message: str) -> None:
    if bool(wrong.any()):
        raise ValueError(message)
