"""Capacity: how many slots an expert has, and who gets them."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from core_arms import layer_of
from torch import Tensor

from moebench.routing import apply_capacity, capacity_slots, route_problem
from moebench.routing.build import with_capacity
from moebench.routing.capacity import position_in_expert
from moebench.traffic import parse_traffic

FACTORS = ["0.25", "0.5", "0.9", "1", "1.1", "1.2", "1.25", "1.3", "1.7", "2", "2.2", "3.3", "100"]


@pytest.mark.parametrize("factor", FACTORS)
def test_slots_are_the_exact_ceiling(factor: str) -> None:
    """Against exact fractions, since 1.1 * 100 / 11 is a little over 10 in binary."""
    for tokens in (1, 5, 10, 11, 16, 64, 100, 1000, 4096, 65536, 1_000_000):
        for top_k, experts in ((1, 1), (1, 11), (2, 8), (4, 60), (6, 160), (8, 64), (8, 128), (22, 512)):
            exact = max(1, math.ceil(Fraction(factor) * top_k * tokens / experts))
            assert capacity_slots(float(factor), tokens, top_k, experts) == exact, (tokens, top_k, experts)


def test_slots_at_multiples_that_binary_misses() -> None:
    assert 1.1 * 1 * 100 / 11 > 10
    assert capacity_slots(1.1, 100, 1, 11) == 10
    assert capacity_slots(1.1, 101, 1, 11) == 11
    assert capacity_slots(1.1, 10, 1, 11) == 1
    assert capacity_slots("dropless", 10, 1, 11) is None
    assert capacity_slots(0.01, 4, 1, 64) == 1  # an expert always has a slot


def by_hand(ids: Tensor, slots: int) -> list[list[int]]:
    """First come, first served by token, a token's first choice first."""
    taken: dict[int, int] = {}
    kept = []
    for row in ids.tolist():
        kept.append([])
        for expert in row:
            taken[expert] = taken.get(expert, 0) + 1
            kept[-1].append(expert if taken[expert] <= slots else -1)
    return kept


@pytest.mark.parametrize("traffic", ["balanced", "uniform", "zipf:1.5", "zipf:20"])
@pytest.mark.parametrize("slots", [1, 3, 10, 1000])
def test_first_come_first_served(traffic: str, slots: int) -> None:
    routing = route_problem(layer_of(8, 3), parse_traffic(traffic), None, 40, 0)
    ids, weights = apply_capacity(routing.wanted_ids, routing.wanted_weights, slots, 8)
    assert ids.tolist() == by_hand(routing.wanted_ids, slots)
    assert torch.equal(weights, routing.wanted_weights * (ids >= 0))
    assert torch.bincount(ids[ids >= 0], minlength=8).max() <= slots


def test_position_counts_earlier_assignments_to_the_same_expert() -> None:
    ids = torch.tensor([[2, 0], [0, 2], [2, 1]])
    assert position_in_expert(ids, 4).tolist() == [[0, 0], [1, 1], [2, 0]]


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.25, 4.0])
@pytest.mark.parametrize("traffic", ["balanced", "uniform", "zipf:1"])
def test_kept_and_dropped_are_all(traffic: str, factor: float) -> None:
    T, E, K = 48, 8, 2
    dropless = route_problem(layer_of(E, K), parse_traffic(traffic), None, T, 3)
    routing = with_capacity(dropless, factor)
    slots = capacity_slots(factor, T, K, E)
    dropped = int((routing.ids < 0).sum())
    assert routing.kept + dropped == T * K
    assert routing.counts().max() <= slots
    assert routing.counts().tolist() == dropless.counts().clamp(max=slots).tolist()
    assert routing.drop_rate == pytest.approx(dropped / (T * K))
    assert torch.equal(routing.wanted_ids, dropless.ids)
    assert torch.equal(routing.wanted_weights, dropless.weights)
    assert routing.load_max_over_mean == dropless.load_max_over_mean  # of what was wanted


def test_balanced_traffic_at_factor_one_drops_nothing() -> None:
    dropless = route_problem(layer_of(8, 2), parse_traffic("balanced"), None, 64, 0)
    assert with_capacity(dropless, 1.0).drop_rate == 0
    assert with_capacity(dropless, 0.5).drop_rate == 0.5
    assert with_capacity(dropless, "dropless").drop_rate == 0
    assert dropless.load_max_over_mean == 1.0
    assert dropless.active_experts == 8


def test_everything_to_one_expert() -> None:
    dropless = route_problem(layer_of(8, 1), parse_traffic("zipf:20"), None, 64, 0)
    assert (dropless.active_experts, dropless.load_max_over_mean, dropless.kept) == (1, 8.0, 64)
    half = with_capacity(dropless, 1.0)  # 8 of 64 fit
    assert (half.kept, half.drop_rate, half.active_experts) == (8, 1 - 8 / 64, 1)
    assert half.ids.flatten().tolist() == [half.ids[0, 0].item()] * 8 + [-1] * 56
