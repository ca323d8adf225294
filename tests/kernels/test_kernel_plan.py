"""routing_plan: bit for bit its reference, which is checked against a loop; the permuted copy and its way back."""

from __future__ import annotations

import pytest
import torch
from kernel_loops import TOLERANCES, assert_close, leaf, random_ids
from torch import Tensor

from moebench_kernels import combine, combine_torch, permute, permute_torch, routing_plan, routing_plan_torch
from moebench_kernels.plan import Plan

FIELDS = ("counts", "offsets", "row2assignment", "token2row")
SHAPES = [(0, 5, 2), (1, 1, 1), (3, 2, 1), (33, 5, 4), (65, 8, 8), (33, 60, 8), (65, 60, 4), (129, 257, 2), (65, 1, 1)]


def plan_loop(ids: Tensor, E: int) -> tuple[list[int], list[int], list[list[int]]]:
    """Counts, row2assignment without its tail, token2row; by appending to a list for each expert."""
    T, K = ids.shape
    groups: list[list[int]] = [[] for _ in range(E)]
    for a, e in enumerate(ids.flatten().tolist()):
        if 0 <= e < E:
            groups[e].append(a)
    rows = [a for group in groups for a in group]
    place = {a: row for row, a in enumerate(rows)}
    return [len(group) for group in groups], rows, [[place.get(t * K + k, -1) for k in range(K)] for t in range(T)]


def check(ids: Tensor, E: int, device: torch.device) -> Plan:
    plan, reference = routing_plan(ids.to(device), E), routing_plan_torch(ids, E)
    for name in FIELDS:
        found, wanted = getattr(plan, name), getattr(reference, name)
        assert found.dtype == wanted.dtype == torch.int32, name
        assert torch.equal(found.cpu(), wanted), name
    counts, rows, token2row = plan_loop(ids, E)
    assert reference.counts.tolist() == counts
    assert reference.offsets.tolist() == [sum(counts[:e]) for e in range(E + 1)]
    assert reference.row2assignment.tolist() == rows + [-1] * (ids.numel() - len(rows))
    assert reference.token2row.tolist() == token2row
    return plan


@pytest.mark.parametrize("dropped", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("T", "E", "K"), SHAPES)
def test_plan(T: int, E: int, K: int, dropped: float, device: torch.device) -> None:
    plan = check(random_ids(T, E, K, dropped), E, device)
    assert (plan.n_tokens, plan.n_experts, plan.top_k, plan.n_rows) == (T, E, K, T * K)


def test_all_on_one_expert(device: torch.device) -> None:
    plan = check(torch.full((65, 1), 3), 8, device)
    assert plan.counts.tolist() == [0, 0, 0, 65, 0, 0, 0, 0]


def test_many_blocks_of_assignments(device: torch.device) -> None:
    """More blocks (over 64) than one step of the scan takes."""
    check(random_ids(2200, 5, 4, 0.1), 5, device)


def test_ids_that_would_wrap_in_32_bits_are_dropped(device: torch.device) -> None:
    check(torch.tensor([[2**32 + 1, 1], [-(2**32) + 1, 0], [2**31 - 1, -(2**31)]]), 2, device)


def test_row_maps(device: torch.device) -> None:
    ids = random_ids(33, 5, 4, 0.3)
    plan = routing_plan(ids.to(device), 5)
    flat, kept = ids.flatten().tolist(), int(plan.offsets[-1])
    assignments = plan.row2assignment.tolist()
    assert plan.row2token.tolist() == [a // 4 for a in assignments[:kept]] + [-1] * (132 - kept)
    assert plan.row2expert.tolist() == [flat[a] for a in assignments[:kept]] + [-1] * (132 - kept)


@pytest.mark.parametrize(
    ("ids", "E", "error", "message"),
    [
        (torch.zeros(4, 2), 8, TypeError, "ids is float32; allowed: int32, int64"),
        (torch.zeros(4, dtype=torch.int64), 8, ValueError, r"ids has shape \[4\]; needed: \[T, K\]"),
        (torch.zeros(4, 0, dtype=torch.int64), 8, ValueError, r"ids has shape \[4, 0\]"),
        (torch.zeros(4, 2, dtype=torch.int64), 0, ValueError, "n_experts is 0"),
        ([[0, 1]], 8, TypeError, r"ids is a list; a torch.Tensor is needed"),
    ],
)
def test_plan_refuses(ids: Tensor, E: int, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        routing_plan(ids, E)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("T", "E", "K", "D"), [(0, 5, 2, 17), (1, 1, 1, 1), (33, 5, 4, 48), (65, 60, 8, 17), (3, 2, 1, 1100)]
)
def test_permute(T: int, E: int, K: int, D: int, dtype: torch.dtype, device: torch.device) -> None:
    ids, x, upstream = random_ids(T, E, K, 0.3), torch.randn(T, D).to(dtype), torch.randn(T * K, D).to(dtype)
    mine, exact = leaf(x, dtype, device), leaf(x, torch.float64)
    rows = permute(mine, routing_plan(ids.to(device), E))
    reference = routing_plan_torch(ids, E)
    wanted = permute_torch(exact, reference)
    assert torch.equal(rows.detach().cpu().double(), wanted.detach())
    for r, token in enumerate(reference.row2token.tolist()):
        assert torch.equal(wanted[r], exact[token] if token >= 0 else torch.zeros(D).double())
    rows.backward(upstream.to(device))
    wanted.backward(upstream.double())
    assert_close("dx", mine.grad, exact.grad, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("T", "E", "K", "D"), [(0, 5, 2, 17), (1, 1, 1, 1), (33, 5, 4, 48), (65, 60, 8, 17), (3, 2, 2, 600)]
)
def test_combine(T: int, E: int, K: int, D: int, dtype: torch.dtype, device: torch.device) -> None:
    ids, weights = random_ids(T, E, K, 0.3), torch.randn(T, K)
    weights[(ids < 0) | (ids >= E)] = float("nan")  # weights of dropped assignments must not be read
    plan, reference = routing_plan(ids.to(device), E), routing_plan_torch(ids, E)
    rows, upstream = torch.randn(T * K, D).to(dtype), torch.randn(T, D).to(dtype)
    mine = [leaf(rows, dtype, device), leaf(weights, torch.float32, device)]
    exact = [leaf(rows, torch.float64), leaf(weights, torch.float64)]
    y, wanted = combine(*mine, plan), combine_torch(*exact, reference)
    assert y.dtype == dtype
    assert_close("y", y, wanted, TOLERANCES[dtype])
    for t in range(T):
        kept = [(k, r) for k, r in enumerate(reference.token2row[t].tolist()) if r >= 0]
        loop = sum((weights[t, k].double() * rows[r].double() for k, r in kept), torch.zeros(D).double())
        assert_close("reference", wanted[t], loop, 1e-12)
    y.backward(upstream.to(device))
    wanted.backward(upstream.double())
    for name, found, want in zip(("d_rows", "d_weights"), mine, exact, strict=True):
        assert_close(name, found.grad, want.grad, TOLERANCES[dtype])
    assert (mine[1].grad.cpu()[torch.isnan(weights)] == 0).all()


def test_permute_and_combine_refuse(device: torch.device) -> None:
    plan = routing_plan(random_ids(4, 8, 2).to(device), 8)
    with pytest.raises(ValueError, match=r"x has shape \[5, 16\]; needed: \[4, D\]"):
        permute(torch.zeros(5, 16, device=device), plan)
    with pytest.raises(ValueError, match=r"x has strides .* must be contiguous"):
        permute(torch.zeros(16, 4, device=device).T, plan)
    with pytest.raises(TypeError, match="weights is float16; allowed: float32"):
        combine(torch.zeros(8, 16, device=device), torch.zeros(4, 2, device=device).half(), plan)
    with pytest.raises(ValueError, match=r"rows has shape \[4, 16\]; needed: \[8, D\]"):
        combine(torch.zeros(4, 16, device=device), torch.zeros(4, 2, device=device), plan)
    with pytest.raises(ValueError, match="one device is needed for all, found: x on meta, plan on"):
        permute(torch.zeros(4, 16, device="meta"), plan)
