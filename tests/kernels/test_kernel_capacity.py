"""Capacity: which assignments a full expert keeps, against loops, and what holds of every plan."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_plan_loops import assert_is_plan, assert_same, ids_of, kept_by_expert, priorities
from torch import Tensor

from moebench_kernels import plan_kernels, routing_plan, routing_plan_torch
from moebench_kernels.capacity import within_capacity_torch


def check(ids: Tensor, E: int, capacity: int, priority: Tensor | None, device: torch.device) -> None:
    """Kernels, reference and loop agree."""
    there = None if priority is None else priority.to(device)
    plan = routing_plan(ids.to(device), E, capacity=capacity, priority=there)
    reference = routing_plan_torch(ids, E, capacity=capacity, priority=priority)
    assert_is_plan(reference, kept_by_expert(ids, E, capacity, priority), *ids.shape)
    assert_same(plan, reference)


@pytest.mark.parametrize("by_priority", [False, True])
@pytest.mark.parametrize("capacity", [0, 1, 3, 16, 17, 200])
def test_capacity(capacity: int, by_priority: bool, device: torch.device) -> None:
    ids = torch.randint(-1, 6, (33, 3))
    check(ids, 5, capacity, priorities(33, 3) if by_priority else None, device)


@pytest.mark.parametrize("large", [False, True])
def test_priorities_that_differ_in_one_digit_only(
    large: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbouring floats, and floats that differ in their first or their middle bits: each digit decides somewhere."""
    if large:
        monkeypatch.setattr(plan_kernels, "SMALL", -1)
    for shift in (0, 8, 16, 24):
        bits = torch.randint(0, 120, (24, 2), dtype=torch.int32) << shift
        check(torch.randint(0, 3, (24, 2)), 3, 7, (bits + 0x01010101).view(torch.float32), device)
        check(torch.randint(0, 3, (24, 2)), 3, 7, -(bits + 0x01010101).view(torch.float32), device)


def test_more_rows_than_a_program_takes_at_a_time(device: torch.device) -> None:
    """An expert with over 2048 rows: ties are counted across steps."""
    priority = torch.randint(0, 3, (2500, 1)).float()
    check(torch.randint(0, 2, (2500, 1)) // 2, 2, 1900, priority, device)


@pytest.mark.parametrize("by_priority", [False, True])
def test_one_expert_twice_in_a_row(by_priority: bool, device: torch.device) -> None:
    check(torch.full((20, 4), 1), 3, 30, priorities(20, 4) if by_priority else None, device)


def test_ties_go_to_the_first_and_nan_is_last() -> None:
    nan, inf = math.nan, math.inf
    priority = torch.tensor([[nan, -inf, 0.0, -0.0, 0.0, -nan, inf, 1.0]]).T.contiguous()
    ids = torch.zeros(8, 1, dtype=torch.int32)
    orders = {1: [6], 2: [6, 7], 3: [2, 6, 7], 4: [2, 3, 6, 7], 5: [2, 3, 4, 6, 7], 6: [1, 2, 3, 4, 6, 7]}
    orders |= {7: [0, 1, 2, 3, 4, 6, 7]}
    for capacity, kept in orders.items():
        assert within_capacity_torch(ids, 1, capacity, priority).flatten().nonzero().flatten().tolist() == kept
        assert kept_by_expert(ids, 1, capacity, priority) == [kept]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, int, int | None, Tensor | None]:
    T, K, E = draw(st.integers(0, 12)), draw(st.integers(1, 5)), draw(st.integers(1, 7))
    ids = draw(st.lists(st.integers(-2, E), min_size=T * K, max_size=T * K))
    capacity = draw(st.one_of(st.none(), st.integers(0, 9)))
    floats = st.floats(width=32, allow_nan=True, allow_infinity=True)
    values = (
        draw(st.lists(floats, min_size=T * K, max_size=T * K)) if capacity is not None and draw(st.booleans()) else None
    )
    priority = None if values is None else torch.tensor(values).reshape(T, K)
    return torch.tensor(ids, dtype=torch.int64).reshape(T, K), E, capacity, priority


@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_what_holds_of_every_plan(problem: tuple[Tensor, int, int | None, Tensor | None]) -> None:
    """Each kept (t, k) once, grouped, stable, capacity obeyed, and nobody better than one who stays was dropped."""
    ids, E, capacity, priority = problem
    device = "cuda" if torch.cuda.is_available() else "cpu"
    there = None if priority is None else priority.to(device)
    plan = routing_plan(ids.to(device), E, capacity=capacity, priority=there)
    flat, n_kept = ids.flatten().tolist(), int(plan.offsets[-1])
    rows = plan.row2assignment.tolist()
    assert sorted(set(rows[:n_kept])) == sorted(rows[:n_kept])
    assert rows[n_kept:] == [-1] * (len(flat) - n_kept)
    kept = [(flat[a], a) for a in rows[:n_kept]]
    assert kept == sorted(kept)
    assert {a: r for a, r in enumerate(plan.token2row.flatten().tolist()) if r >= 0} == {
        a: r for r, a in enumerate(rows[:n_kept])
    }
    for e in range(E):
        wanted = [a for a, expert in enumerate(flat) if expert == e]
        mine = [a for expert, a in kept if expert == e]
        assert plan.counts[e] == len(mine) == (len(wanted) if capacity is None else min(len(wanted), capacity))
        lost = sorted(set(wanted) - set(mine))
        if priority is None:
            assert not (mine and lost) or max(mine) < min(lost)
        elif mine and lost:
            p = priority.flatten()
            worst = [p[a] for a in mine]
            if not any(math.isnan(value) for value in worst):
                assert all(math.isnan(p[a]) or p[a] <= min(worst) for a in lost)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"capacity": -1}, ValueError, "capacity is -1; it must be at least 0"),
        ({"capacity": 1.5}, TypeError, "capacity is a float; an int or None is needed"),
        ({"capacity": True}, TypeError, "capacity is a bool; an int or None is needed"),
        ({"priority": torch.zeros(4, 2)}, ValueError, "priority is given without a capacity"),
        ({"capacity": 1, "priority": torch.zeros(4, 3)}, ValueError, r"priority has shape \[4, 3\]; needed: \[4, 2\]"),
        ({"capacity": 1, "priority": torch.zeros(4, 2).half()}, TypeError, "priority is float16; allowed: float32"),
        ({"capacity": 1, "priority": torch.zeros(4, 2, device="meta")}, ValueError, "ids on .*, priority on meta"),
    ],
)
def test_capacity_refuses(options: dict, error: type, message: str, device: torch.device) -> None:
    ids = ids_of(4, 8, 2).to(device)
    options = {k: v.to(device) if isinstance(v, Tensor) and v.device.type != "meta" else v for k, v in options.items()}
    for function in (routing_plan, routing_plan_torch):
        with pytest.raises(error, match=message):
            function(ids, 8, **options)
