"""A routing under a capacity rule: what is kept, what was wanted. The rules alone are in tests/routing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moebench.point import DROP_ORDERS, Capacity
from moebench.routing import capacity_slots
from moebench.routing.build import with_capacity
from moebench.routing.forms import Mix, Ragged, TopK, active_experts, load_max_over_mean, top_k_routing

T, E, K = 48, 8, 2


def routing_of(ids: Tensor, experts: int = E) -> TopK:
    return top_k_routing(ids, torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)), experts)


def drawn(skew: float) -> TopK:
    popularity = torch.arange(1, E + 1).double() ** -skew
    return routing_of(torch.multinomial(popularity.expand(T, E), K, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.25, 4.0])
@pytest.mark.parametrize("skew", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("order", DROP_ORDERS)
def test_kept_and_dropped_are_all(skew: float, factor: float, order: str) -> None:
    dropless = drawn(skew)
    capacity = Capacity(factor, order=order)
    routing = with_capacity(dropless, capacity)
    assert isinstance(routing, TopK)
    slots = capacity_slots(capacity, T, K, E)
    assert slots is not None
    dropped = int((routing.ids < 0).sum())
    assert routing.kept + dropped == T * K
    assert routing.counts().max() <= slots
    if order == "reroute":
        assert routing.kept == min(T * K, E * slots)
    else:
        assert routing.counts().tolist() == dropless.counts().clamp(max=slots).tolist()
    assert routing.drop_rate == pytest.approx(dropped / (T * K))
    assert torch.equal(routing.wanted_ids, dropless.ids)
    assert torch.equal(routing.wanted_weights, dropless.weights)
    assert load_max_over_mean(routing) == load_max_over_mean(dropless)  # of what was wanted


def test_the_rounding_and_the_order_are_the_capacitys() -> None:
    dropless = drawn(1.0)
    assert with_capacity(dropless, Capacity(0.1, "lingvo")).counts().max() == 4  # share 1.2
    assert with_capacity(dropless, Capacity(0.1, "ceil")).counts().max() == 2
    position, probability = (
        with_capacity(dropless, Capacity(0.5, order=order)) for order in ("position", "probability")
    )
    assert isinstance(position, TopK)
    assert isinstance(probability, TopK)
    assert position.counts().tolist() == probability.counts().tolist()
    assert float(position.weights.sum()) < float(probability.weights.sum())


def test_balanced_traffic_at_factor_one_drops_nothing() -> None:
    dropless = routing_of(torch.arange(T * K).view(T, K) % E)
    assert with_capacity(dropless, Capacity(1.0)).drop_rate == 0
    assert with_capacity(dropless, Capacity(0.5)).drop_rate == 0.5
    assert with_capacity(dropless, Capacity()).drop_rate == 0
    assert load_max_over_mean(dropless) == 1.0
    assert active_experts(dropless) == E


def test_everything_to_one_expert() -> None:
    dropless = routing_of(torch.full((64, 1), 3))
    assert (active_experts(dropless), load_max_over_mean(dropless), dropless.kept) == (1, 8.0, 64)
    half = with_capacity(dropless, Capacity(1.0))  # 8 of 64 fit
    assert isinstance(half, TopK)
    assert (half.kept, half.drop_rate, active_experts(half)) == (8, 1 - 8 / 64, 1)
    assert half.ids.flatten().tolist() == [3] * 8 + [-1] * 56
    everyone = with_capacity(dropless, Capacity(1.0, order="reroute"))
    assert (everyone.kept, everyone.drop_rate, active_experts(everyone)) == (64, 0, 8)


def test_forms_with_a_capacity_of_their_own_stay_as_they_are() -> None:
    ragged = Ragged(torch.zeros(3, dtype=torch.int64), torch.arange(3), torch.ones(3), 1, 3)
    mix = Mix(torch.ones(4, 2) / 4, torch.ones(4, 2) / 2, 2)
    assert with_capacity(ragged, Capacity(0.5)) is ragged
    assert with_capacity(mix, Capacity(0.5)) is mix
