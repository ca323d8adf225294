"""Statistics: against numpy, scipy and loops; at both extremes; for every form; never NaN."""

from __future__ import annotations

import math
from time import perf_counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy, variation

from moebench.point import Capacity
from moebench.routing import losses
from moebench.routing.build import with_capacity
from moebench.routing.forms import Mix, Ragged, Routing, TopK, ragged_routing, top_k_routing
from moebench.routing.statistics import statistics

NAMES = {
    "load_max_over_mean", "load_cv", "load_entropy", "load_gini", "collapsed_experts", "drop_rate", "active_experts",
    "active_over_uniform", "unrouted_tokens", "most_experts_per_token", "balance_loss",
}  # fmt: skip


def top_k_of(tokens: int, experts: int, top_k: int, skew: float, seed: int, unwanted: float = 0.0) -> TopK:
    """From logits that favour the first experts."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator) - skew * torch.arange(experts)
    found = logits.softmax(dim=1).topk(top_k, dim=1)
    out = torch.rand(tokens, top_k, generator=generator) < unwanted
    return top_k_routing(found.indices.masked_fill(out, -1), found.values.masked_fill(out, 0), experts, logits)


def ragged_of(tokens: int, experts: int, share: float, seed: int) -> Ragged:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    return ragged_routing(logits.sigmoid() < share, logits.sigmoid(), logits)


def by_hand(routing: TopK | Ragged, collapse_below: float = 0.1) -> dict[str, float | None]:
    """The same in numpy, scipy and loops, from the assignments alone."""
    E, T = routing.routed_experts, routing.tokens
    kept = [(int(t), int(e)) for t, e, _ in zip(*routing.assignments(), strict=True)]
    wanted = [e for _, e in kept]
    if isinstance(routing, TopK):
        wanted = [e for row in routing.wanted_ids.tolist() for e in row if e >= 0]
    n = np.array([wanted.count(e) for e in range(E)], dtype=float)
    held = [sum(1 for t, _ in kept if t == token) for token in range(T)]
    active = len({e for _, e in kept})
    P = torch.as_tensor(routing.logits).double().softmax(dim=1).mean(dim=0).numpy()
    k = len(wanted) / T
    gini = sum(abs(a - b) for a in n for b in n) / (2 * E * E * n.mean()) if n.any() else None
    return {
        "load_max_over_mean": n.max() / n.mean() if n.any() else None,
        "load_cv": float(variation(n)) if n.any() else None,
        "load_entropy": float(entropy(n, base=E)) if n.any() and E > 1 else None,
        "load_gini": gini,
        "collapsed_experts": float(np.mean(n < collapse_below * n.mean())) if n.any() else None,
        "drop_rate": 1 - len(kept) / len(wanted) if wanted else None,
        "active_experts": active,
        "active_over_uniform": active / (E * (1 - (1 - k / E) ** T)) if wanted else None,
        "unrouted_tokens": held.count(0) / T,
        "most_experts_per_token": max(held),
        "balance_loss": float(E * (n / n.sum() * P).sum()) if n.any() else None,
    }


def check(found: dict[str, float | None], expected: dict[str, float | None]) -> None:
    assert set(found) == set(expected) == NAMES
    for name, value in expected.items():
        assert found[name] == (value if value is None else pytest.approx(value, rel=1e-5, abs=1e-7)), name


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 30),
    shape=st.sampled_from([(1, 1), (4, 1), (4, 4), (8, 2), (16, 3)]),
    skew=st.sampled_from([0.0, 0.3, 3.0]),
    unwanted=st.sampled_from([0.0, 0.4, 1.0]),
    factor=st.sampled_from(["dropless", 1.0, 0.4]),
    collapse_below=st.sampled_from([0.1, 0.5]),
    seed=st.integers(0, 1000),
)
def test_token_choice(
    tokens: int, shape: tuple[int, int], skew: float, unwanted: float, factor: float | str, collapse_below: float,
    seed: int,
) -> None:  # fmt: skip
    routing = with_capacity(top_k_of(tokens, *shape, skew, seed, unwanted), Capacity(factor))
    assert isinstance(routing, TopK)
    check(statistics(routing, collapse_below=collapse_below), by_hand(routing, collapse_below))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("tokens", [1, 20])
def test_ragged(share: float, tokens: int) -> None:
    routing = ragged_of(tokens, 8, share, 0)
    check(statistics(routing), by_hand(routing))
    padding = torch.full((3,), -1)
    padded = Ragged(
        torch.cat([routing.token, padding * 0 + tokens - 1]), torch.cat([routing.expert, padding]),
        torch.cat([routing.weight, torch.zeros(3)]), tokens, 8, routing.logits,
    )  # fmt: skip
    assert statistics(padded) == statistics(routing)


def test_mix_is_even_and_leaves_nobody_out() -> None:
    logits = torch.randn(10, 12)
    mix = Mix(logits.softmax(dim=0), logits.softmax(dim=1), 4, logits)
    assert statistics(mix) == {
        "load_max_over_mean": 1, "load_cv": 0, "load_entropy": pytest.approx(1), "load_gini": pytest.approx(0),
        "collapsed_experts": 0, "drop_rate": 0, "active_experts": 4, "active_over_uniform": 1, "unrouted_tokens": 0,
        "most_experts_per_token": 4, "balance_loss": None,
    }  # fmt: skip


@pytest.mark.parametrize("experts", [2, 8, 64])
def test_extremes(experts: int) -> None:
    """Even, and all to one: the ends of every scale."""
    T = 4 * experts
    even = top_k_routing(torch.arange(T)[:, None] % experts, torch.ones(T, 1), experts, torch.zeros(T, experts))
    check(statistics(even), {
        "load_max_over_mean": 1, "load_cv": 0, "load_entropy": 1, "load_gini": 0, "collapsed_experts": 0,
        "drop_rate": 0, "active_experts": experts, "active_over_uniform": 1 / (1 - (1 - 1 / experts) ** T),
        "unrouted_tokens": 0, "most_experts_per_token": 1, "balance_loss": 1,
    })  # fmt: skip
    sure = torch.full((T, experts), -1e30)
    sure[:, 1] = 1e30
    one = top_k_routing(torch.ones(T, 1, dtype=torch.int64), torch.ones(T, 1), experts, sure)
    check(statistics(one), {
        "load_max_over_mean": experts, "load_cv": math.sqrt(experts - 1), "load_entropy": 0,
        "load_gini": (experts - 1) / experts, "collapsed_experts": (experts - 1) / experts, "drop_rate": 0,
        "active_experts": 1, "active_over_uniform": 1 / experts / (1 - (1 - 1 / experts) ** T),
        "unrouted_tokens": 0, "most_experts_per_token": 1, "balance_loss": experts,
    })  # fmt: skip


def test_dropping_shows_in_drops_and_not_in_load() -> None:
    dropless = top_k_of(64, 8, 1, 3.0, 0)
    dropping = with_capacity(dropless, Capacity(1.0))
    before, after = statistics(dropless), statistics(dropping)
    assert after["drop_rate"] == after["unrouted_tokens"] == pytest.approx(1 - dropping.kept / 64)
    assert {name for name in NAMES if before[name] != after[name]} == {"drop_rate", "unrouted_tokens"}


def test_balance_loss_is_switchs() -> None:
    routing = top_k_of(40, 8, 2, 0.3, 0)
    assert routing.logits is not None
    expected = losses.switch(routing.logits.double().softmax(dim=1), routing.wanted_ids)
    assert statistics(routing)["balance_loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_active_over_uniform_of_uniform_picks_is_one() -> None:
    ratios = []
    for ids in torch.rand(500, 20, 32, generator=torch.Generator().manual_seed(0)).topk(2, dim=2).indices:
        ratio = statistics(top_k_routing(ids, torch.ones(20, 2), 32))["active_over_uniform"]
        assert ratio is not None
        ratios.append(ratio)
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.01)


def awkward() -> dict[str, Routing]:
    """What divides by nothing."""
    none = torch.zeros(0, dtype=torch.int64)
    dropped = top_k_of(3, 4, 2, 0, 0)
    return {
        "one expert": top_k_of(5, 1, 1, 0, 0),
        "one token": top_k_of(1, 4, 2, 0, 0),
        "nothing wanted": top_k_of(3, 4, 2, 0, 0, unwanted=2.0),
        "nothing kept": TopK(
            dropped.ids * 0 - 1, dropped.weights * 0, dropped.ids, dropped.weights, dropped.logits, 4
        ),
        "no tokens": top_k_routing(none[:, None].expand(0, 2), torch.zeros(0, 2), 4, torch.zeros(0, 4)),
        "nobody taken": Ragged(none, none, torch.zeros(0), 3, 4),
        "no tokens at all": Ragged(none, none, torch.zeros(0), 0, 4),
        "no logit is finite": top_k_routing(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), 4,
                                            torch.full((2, 4), -torch.inf)),
        "half of them infinite": top_k_routing(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), 2,
                                               torch.tensor([[torch.inf, -torch.inf], [0, torch.inf]])),
        "more logits than experts": top_k_routing(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), 4,
                                                  torch.zeros(2, 6)),
        "one slot": Mix(torch.ones(1, 1), torch.ones(1, 1), 1),
    }  # fmt: skip


@pytest.mark.parametrize("name", awkward())
def test_never_nan(name: str) -> None:
    found = statistics(awkward()[name])
    assert set(found) == NAMES
    assert all(value is None or (type(value) is float and math.isfinite(value)) for value in found.values())


def test_what_is_not_defined_is_none() -> None:
    found = {name: statistics(routing) for name, routing in awkward().items()}
    assert found["one expert"]["load_entropy"] is None
    assert found["one expert"]["load_max_over_mean"] == 1
    assert found["nothing kept"]["drop_rate"] == found["nothing kept"]["unrouted_tokens"] == 1
    assert found["nothing kept"]["active_experts"] == 0
    assert found["nothing wanted"]["drop_rate"] is None
    assert found["nothing wanted"]["unrouted_tokens"] == 1
    assert found["no tokens"]["unrouted_tokens"] is None
    assert found["nobody taken"]["load_cv"] is None
    assert found["no logit is finite"]["balance_loss"] == 1
    assert found["more logits than experts"]["balance_loss"] is None


def test_scales() -> None:
    """T 131,072, K 8, E 256: nothing is done token by token."""
    ids = torch.arange(131_072 * 8).view(-1, 8) * 7 % 256
    routing = top_k_routing(ids, torch.ones(ids.shape), 256, torch.zeros(131_072, 256))
    began = perf_counter()
    assert statistics(routing)["balance_loss"] == pytest.approx(1)
    assert perf_counter() - began < 20
