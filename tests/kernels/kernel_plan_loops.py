"""The plan by appending to a list for each expert, in plain Python; and ids and priorities to try it on."""

from __future__ import annotations

import math

import torch
from kernel_loops import random_ids
from torch import Tensor

from moebench_kernels.plan import Plan

ALL = 10**9  # a capacity that drops nothing


def kept_by_expert(ids: Tensor, E: int, capacity: int = ALL, priority: Tensor | None = None) -> list[list[int]]:
    """The flat assignments that each expert keeps, rising."""
    groups: list[list[int]] = [[] for _ in range(E)]
    for a, e in enumerate(ids.flatten().tolist()):
        if 0 <= e < E:
            groups[e].append(a)
    if priority is None:
        return [group[:capacity] for group in groups]
    p = priority.flatten().tolist()

    def rank(a: int) -> tuple[bool, float, int]:
        return math.isnan(p[a]), 0.0 if math.isnan(p[a]) else -p[a], a

    return [sorted(sorted(group, key=rank)[:capacity]) for group in groups]


def assert_is_plan(plan: Plan, groups: list[list[int]], T: int, K: int) -> None:
    """Every field of the plan, from what each expert keeps."""
    rows = [a for group in groups for a in group]
    place = {a: row for row, a in enumerate(rows)}
    lost, m = T * K - len(rows), plan.block_m
    tiles = [-(-len(group) // m) for group in groups] + [-(-lost // m)]
    assert plan.counts.tolist() == [len(group) for group in groups]
    assert plan.offsets.tolist() == [sum(map(len, groups[:e])) for e in range(len(groups) + 1)]
    assert plan.row2assignment.tolist() == rows + [-1] * lost
    assert plan.token2row.tolist() == [[place.get(t * K + k, -1) for k in range(K)] for t in range(T)]
    assert plan.tile_offsets.tolist() == [sum(tiles[:e]) for e in range(len(tiles) + 1)]
    named = [e for e, count in enumerate(tiles) for _ in range(count)]
    assert plan.tile2expert.tolist() == named + [-1] * (plan.n_row_tiles - len(named))


def assert_same(found: Plan, wanted: Plan) -> None:
    """Bit for bit, all int32."""
    for name in Plan._fields[:-1]:
        mine, other = getattr(found, name), getattr(wanted, name)
        assert mine.dtype == other.dtype == torch.int32, name
        assert torch.equal(mine.cpu(), other.cpu()), name
    assert found.block_m == wanted.block_m


def ids_of(T: int, E: int, K: int, dropped: float = 0.0) -> Tensor:
    """int32 [T, K]: distinct in a row where E allows it."""
    if K <= E:
        return random_ids(T, E, K, dropped)
    return torch.randint(0, E, (T, K), dtype=torch.int32).masked_fill(torch.rand(T, K) < dropped, -1)


def priorities(T: int, K: int) -> Tensor:
    """float32 [T, K] with many ties, both zeros, both infinities, NaN of either sign and the least numbers."""
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 1e-45, -1e-45, 0.5, -0.5, 3e38, -3e38])
    return odd[torch.randint(0, len(odd), (T, K))]
