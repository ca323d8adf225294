"""Capacity: how many slots an expert has, and who gets them, against loops over single assignments."""

from __future__ import annotations

import math
from fractions import Fraction
from time import perf_counter

import numpy as np
import pytest
import torch
from capacity_by_hand import draw, kept_by_device, kept_by_hand
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow
from torch import Tensor

from moebench.point import DROP_ORDERS, ROUNDINGS, Capacity
from moebench.routing.capacity import (
    apply_capacity,
    capacity_slots,
    drop_by_device,
    exempt_tokens,
    position_in_expert,
)

FACTORS = ["0.25", "0.5", "0.9", "1", "1.05", "1.1", "1.2", "1.25", "1.3", "1.7", "2", "2.2", "3.3", "100"]
SHAPES = [(1, 1), (1, 11), (2, 8), (4, 60), (6, 160), (8, 64), (8, 128), (22, 512)]
TOKENS = (1, 5, 10, 11, 16, 64, 100, 1000, 4096, 65536, 1_000_000)
DROPPING = [order for order in DROP_ORDERS if order != "reroute"]


def by_fours(number: int) -> int:
    while number % 4:
        number += 1
    return number


def published(rounding: str, factor: Fraction, tokens: int, top_k: int, experts: int) -> int:
    """The released formulas, in exact fractions."""
    share = factor * top_k * tokens / experts
    if rounding == "ceil":
        return max(1, math.ceil(share))
    if rounding == "gshard":
        return max(1, math.floor(share))
    if rounding == "mesh":
        return max(min(tokens, math.floor(share)), 4)
    if rounding == "lingvo":
        return by_fours(math.floor(share)) or 4
    if rounding == "v-moe":
        return by_fours(math.ceil(share))
    samples = (tokens + experts - 1) // experts
    return max(1, top_k * int(factor * samples))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("factor", FACTORS)
def test_slots_are_the_published_ones_exactly(rounding: str, factor: str) -> None:
    """Against exact fractions, since 1.1 * 100 / 11 is a little over 10 in binary."""
    for tokens in TOKENS:
        for top_k, experts in SHAPES:
            found = capacity_slots(Capacity(float(factor), rounding), tokens, top_k, experts)
            assert found == published(rounding, Fraction(factor), tokens, top_k, experts), (tokens, top_k, experts)


def test_closed_forms() -> None:
    assert 1.1 * 1 * 100 / 11 > 10
    assert capacity_slots(Capacity(1.1), 100, 1, 11) == 10
    assert capacity_slots(Capacity(1.1), 101, 1, 11) == 11
    assert capacity_slots(Capacity(0.01), 4, 1, 64) == 1  # an expert always has a slot
    assert capacity_slots(Capacity(1, "gshard"), 1024, 2, 16) == 2 * 1024 // 16  # 2 N / (G E)
    assert capacity_slots(Capacity(1, "mesh"), 100, 1, 64) == 4
    assert capacity_slots(Capacity(1, "mesh"), 700, 1, 64) == 10  # Mesh's floor is no multiple of 4
    assert capacity_slots(Capacity(100, "mesh"), 700, 1, 64) == 700  # nor more than all tokens
    assert capacity_slots(Capacity(1, "lingvo"), 700, 1, 64) == 12
    assert capacity_slots(Capacity(1, "lingvo"), 1, 1, 64) == 4
    assert capacity_slots(Capacity(1.05, "v-moe"), 1024, 2, 32) == 68  # ceil(67.2), a multiple of 4 already
    assert capacity_slots(Capacity(1.05, "v-moe"), 1, 1, 32) == 4
    assert capacity_slots(Capacity(1, "tutel"), 10, 2, 4) == 6  # 2 ceil(10 / 4)
    assert capacity_slots(Capacity(1.5, "tutel"), 10, 2, 4) == 8  # 2 int(1.5 * 3)
    assert capacity_slots(Capacity(-1.5, "tutel"), 10, 2, 4) == 8  # needed, but capped
    assert capacity_slots(Capacity(0, "tutel"), 10, 2, 4) is None  # exactly what is needed


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_dropless_has_no_slots(rounding: str) -> None:
    assert capacity_slots(Capacity("dropless", rounding), 10, 1, 11) is None


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("factor", [0, -1.0, math.inf, math.nan, "much", None])
def test_a_factor_that_cannot_be_names_what_can(rounding: str, factor: object) -> None:
    capacity = Capacity(factor, rounding)  # type: ignore[arg-type]
    if rounding == "tutel" and factor in (0, -1.0):
        capacity_slots(capacity, 10, 2, 4)
        return
    allowed = "any finite number" if rounding == "tutel" else "a number above 0"
    with pytest.raises(ValueError, match=f"^capacity factor .*: it must be {allowed}, or 'dropless'$"):
        capacity_slots(capacity, 10, 2, 4)


def test_unknown_words_name_those_that_are_known() -> None:
    with pytest.raises(ValueError, match="'floor' is not one of ceil, gshard"):
        capacity_slots(Capacity(1, "floor"), 10, 2, 4)
    ids, weights = draw(4, 2, 4, 0, 0)
    for slots in (None, 2):
        with pytest.raises(ValueError, match="'random' is not one of position, choice"):
            apply_capacity(ids, weights, slots, 4, "random")


def test_position_counts_earlier_assignments_to_the_same_expert() -> None:
    ids = torch.tensor([[2, 0], [0, 2], [2, 1]])
    assert position_in_expert(ids, 4).tolist() == [[0, 0], [1, 1], [2, 0]]
    backwards = torch.arange(5, -1, -1)
    assert position_in_expert(ids, 4, backwards).tolist() == [[2, 1], [0, 1], [0, 0]]
    assert position_in_expert(torch.tensor([[-1, 0], [0, -1]]), 1)[[0, 1], [1, 0]].tolist() == [0, 1]


def test_each_order_keeps_its_own() -> None:
    """Two slots of expert 0, wanted by five assignments: who keeps them is told by the order alone."""
    ids = torch.tensor([[1, 0], [0, 1], [1, 0], [0, 1], [0, 1]])
    weights = torch.tensor([[0.5, 0.4], [0.3, 0.2], [0.9, 0.8], [0.6, 0.1], [0.7, 0.1]])
    keepers = {
        order: (apply_capacity(ids, weights, 2, 2, order)[0] == 0).any(dim=1).nonzero().flatten().tolist()
        for order in DROPPING
    }
    assert keepers == {"position": [0, 1], "choice": [1, 3], "probability": [2, 4], "batch_priority": [3, 4]}


@pytest.mark.parametrize("order", DROPPING)
@pytest.mark.parametrize("slots", [1, 3, 10, 1000])
@pytest.mark.parametrize(("skew", "unwanted"), [(0, 0), (1.5, 0), (6, 0), (1, 0.4)])
def test_against_one_assignment_at_a_time(order: str, slots: int, skew: float, unwanted: float) -> None:
    for seed, (tokens, top_k, experts) in enumerate([(40, 3, 8), (25, 1, 4), (30, 8, 8), (1, 2, 5)]):
        ids, weights = draw(tokens, top_k, experts, skew, seed, unwanted)
        found, left = apply_capacity(ids, weights, slots, experts, order)
        assert found.tolist() == kept_by_hand(ids, weights, slots, order)
        assert torch.equal(left, torch.where(found >= 0, weights, 0))


@settings(max_examples=60, deadline=None)
@given(
    order=st.sampled_from(DROP_ORDERS),
    tokens=st.integers(1, 40),
    shape=st.sampled_from([(1, 1), (1, 4), (2, 2), (2, 8), (4, 5), (3, 16)]),
    slots=st.integers(1, 30),
    skew=st.sampled_from([0.0, 1.0, 4.0]),
    unwanted=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_what_holds_for_every_order(
    order: str, tokens: int, shape: tuple[int, int], slots: int, skew: float, unwanted: float, seed: int
) -> None:
    top_k, experts = shape
    ids, weights = draw(tokens, top_k, experts, skew, seed, unwanted)
    found, left = apply_capacity(ids, weights, slots, experts, order)
    counts = torch.bincount(found[found >= 0], minlength=experts)
    wanted = torch.bincount(ids[ids >= 0], minlength=experts)
    dropped = int(((ids >= 0) & (found < 0)).sum())
    assert counts.numel() == experts
    assert int(counts.max()) <= slots
    assert int(counts.sum()) + dropped == int(wanted.sum())
    assert not (found >= 0)[ids < 0].any()
    assert torch.equal(left, torch.where(found >= 0, weights, 0))  # what is kept keeps its weight
    if order == "reroute":
        assert dropped == max(0, int(wanted.sum()) - experts * slots)
    else:
        assert torch.equal(found[found >= 0], ids[found >= 0])
        assert counts.tolist() == wanted.clamp(max=slots).tolist()


@pytest.mark.parametrize("order", DROP_ORDERS)
def test_dropless_changes_nothing(order: str) -> None:
    ids, weights = draw(20, 2, 4, 3, 0)
    found, left = apply_capacity(ids, weights, None, 4, order)
    assert found is ids
    assert left is weights


@pytest.mark.parametrize("order", DROP_ORDERS)
def test_slots_beyond_all_integers(order: str) -> None:
    ids, weights = draw(20, 2, 4, 3, 0)
    assert torch.equal(apply_capacity(ids, weights, 10**30, 4, order)[0], ids)


@pytest.mark.parametrize("order", DROP_ORDERS)
def test_kept_weights_carry_their_gradient_and_dropped_ones_none(order: str) -> None:
    ids, weights = draw(20, 2, 4, 3, 0)
    weights = weights.clone().requires_grad_()
    found, left = apply_capacity(ids, weights, 4, 4, order)
    left.sum().backward()
    assert weights.grad is not None
    assert torch.equal(weights.grad, (found >= 0).float())


def test_an_infinite_weight_is_dropped_to_zero() -> None:
    ids, weights = torch.zeros(2, 1, dtype=torch.int64), torch.full((2, 1), torch.inf)
    assert apply_capacity(ids, weights, 1, 1)[1].flatten().tolist() == [torch.inf, 0]


def fewest_twins(kept: Tensor, overflow: Tensor, slots: int, experts: int) -> int:
    """The assignments that cannot be placed at an expert new to their token: a maximum flow from tokens to experts."""
    T = len(kept)
    source, sink = T + experts, T + experts + 1
    flow = np.zeros((T + experts + 2,) * 2, dtype=np.int32)
    asked = overflow.sum(dim=1).numpy()
    counts = torch.bincount(kept[kept >= 0], minlength=experts).numpy()
    flow[source, :T] = asked
    flow[T : T + experts, sink] = np.maximum(slots - counts, 0)
    for token in range(T):
        new = [e for e in range(experts) if e not in kept[token].tolist()]
        flow[token, [T + e for e in new]] = 1
    placed = min(int(asked.sum()), int(flow[T : T + experts, sink].sum()))
    return placed - int(maximum_flow(csr_matrix(flow), source, sink).flow_value)


def twins(ids: Tensor) -> int:
    """Assignments beyond the first of a token to the same expert."""
    return sum(len(kept) - len(set(kept)) for row in ids.tolist() for kept in [[e for e in row if e >= 0]])


@pytest.mark.parametrize("skew", [0.5, 2.0, 6.0])
@pytest.mark.parametrize(("top_k", "experts"), [(1, 4), (2, 8), (2, 16), (4, 16), (4, 32), (6, 8), (8, 16)])
def test_rerouting_repeats_no_expert_that_it_need_not(top_k: int, experts: int, skew: float) -> None:
    """Where K is close to E swaps do not find every way; elsewhere they do."""
    repeats = needed = overflow = 0
    for seed in range(6):
        for share in (0.7, 1.0, 1.3):
            ids, weights = draw(24, top_k, experts, skew, seed)
            slots = max(1, int(share * 24 * top_k / experts))
            first_come = torch.tensor(kept_by_hand(ids, weights, slots, "position"))
            found, _ = apply_capacity(ids, weights, slots, experts, "reroute")
            assert torch.equal(found[first_come >= 0], first_come[first_come >= 0])  # who was in time stays
            repeats += twins(found)
            needed += fewest_twins(first_come, first_come < 0, slots, experts)
            overflow += int((first_come < 0).sum())
    assert repeats <= needed + (0 if experts >= 4 * top_k else 0.1 * overflow)


def test_rerouting_a_real_layer_repeats_nothing() -> None:
    ids, weights = draw(4096, 8, 64, 1.0, 0)
    found, _ = apply_capacity(ids, weights, 512, 64, "reroute")
    assert int((found != ids).sum()) > 10_000
    assert twins(found) == 0


def test_rerouting_is_random_yet_fixed() -> None:
    """Overflow of one expert spreads over all others alike; twice the same ids go the same way."""
    ids = torch.zeros(64 * 256, 1, dtype=torch.int64)
    found, weights = apply_capacity(ids, torch.ones(ids.shape), 512, 64, "reroute")
    assert torch.equal(found, apply_capacity(ids, torch.ones(ids.shape), 512, 64, "reroute")[0])
    assert bool((weights == 1).all())
    counts = torch.bincount(found.flatten(), minlength=64)
    assert int(counts[0]) == 512
    mean = (64 * 256 - 512) / 63
    assert float((counts[1:] - mean).abs().max()) < 6 * math.sqrt(mean)
    late = found[512:].flatten().double()
    assert abs(float(torch.corrcoef(torch.stack([torch.arange(len(late)).double(), late]))[0, 1])) < 0.05
    assert late.unique_consecutive().numel() > 0.95 * len(late)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_dropping_by_device(devices: int, factor: float, share: float) -> None:
    for seed in range(3):
        ids, weights = draw(40, 3, 8, 1.5, seed, unwanted=0.1 * seed)
        exempt = exempt_tokens(40, 4, share)
        budget = math.ceil(Fraction(str(factor)) * 120 / devices)
        found, left = drop_by_device(ids, weights, devices, 8, factor, exempt)
        assert found.tolist() == kept_by_device(ids, weights, 8 // devices, budget, exempt.tolist())
        assert torch.equal(left, torch.where(found >= 0, weights, 0))
        assert torch.equal(found[exempt], ids[exempt])


def test_dropping_by_device_without_exemption_and_its_faults() -> None:
    ids, weights = draw(40, 3, 8, 1.5, 0)
    found = drop_by_device(ids, weights, 2, 8)[0]
    assert found.tolist() == kept_by_device(ids, weights, 4, 60, [False] * 40)
    with pytest.raises(ValueError, match="8 experts do not divide among 3 devices"):
        drop_by_device(ids, weights, 3, 8)
    with pytest.raises(ValueError, match="must be a number above 0"):
        drop_by_device(ids, weights, 2, 8, 0.0)


def test_about_a_tenth_of_the_sequences_is_exempt() -> None:
    exempt = exempt_tokens(1000, 10).view(100, 10)
    assert torch.equal(exempt.all(dim=1), exempt.any(dim=1))  # whole sequences
    assert int(exempt.all(dim=1).sum()) == 10
    assert exempt_tokens(7, 3).shape == (7,)


@pytest.mark.parametrize("order", DROP_ORDERS)
def test_scales(order: str) -> None:
    """T 131,072, K 8, E 4,096 in seconds: nothing is done token by token."""
    T, K, E = 131_072, 8, 4096
    ids = torch.rand(T, K).square().mul(E).long().clamp(max=E - 1)
    weights = torch.rand(T, K)
    slots = capacity_slots(Capacity(1.0), T, K, E)
    began = perf_counter()
    found, _ = apply_capacity(ids, weights, slots, E, order)
    assert perf_counter() - began < 20
    assert int(torch.bincount(found[found >= 0], minlength=E).max()) == slots
