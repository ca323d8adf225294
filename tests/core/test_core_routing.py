"""Routing: what each traffic pattern promises, and logits that make a router keep the promise in any precision."""

from __future__ import annotations

import pytest
import torch
from core_arms import layer_of
from torch import Tensor

from moebench.point import Problem
from moebench.routing.patterns import choose_experts, solve_alpha
from moebench.traffic import parse_traffic
from moebench.weights import make_weights
from moebench.workload import make_draw

PATTERNS = ["balanced", "uniform", "zipf:1", "zipf:20", "active:0.3@4"]
SHAPES = [(1, 1, 1), (1, 8, 2), (5, 3, 3), (37, 8, 2), (64, 16, 5), (100, 60, 4)]  # T, E, K


def chosen(pattern: str, tokens: int, experts: int, top_k: int, seed: int = 0) -> Tensor:
    return choose_experts(parse_traffic(pattern), tokens, top_k, experts, torch.Generator().manual_seed(seed))


def counts(ids: Tensor, experts: int) -> Tensor:
    return torch.bincount(ids.flatten(), minlength=experts)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pattern", ["balanced", "uniform", "zipf:1", "zipf:20"])
def test_each_token_names_k_distinct_experts(pattern: str, shape: tuple[int, int, int]) -> None:
    T, E, K = shape
    ids = chosen(pattern, T, E, K)
    assert ids.shape == (T, K)
    assert ids.dtype == torch.int64
    assert 0 <= ids.min() <= ids.max() < E
    assert all(len(set(row)) == K for row in ids.tolist())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_balanced_is_exact(shape: tuple[int, int, int]) -> None:
    T, E, K = shape
    for seed in range(5):
        found = counts(chosen("balanced", T, E, K, seed), E)
        assert set(found.tolist()) <= {T * K // E, -(-T * K // E)}
        assert found.sum() == T * K


def test_balanced_is_in_no_order() -> None:
    first, second = (chosen("balanced", 64, 8, 2, seed) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first[:, 0], first[:, 0].sort().values)
    assert not torch.equal(first[:4], first[4:8])  # four tokens use each of the eight experts once; they come mixed


def test_uniform_is_uniform() -> None:
    found = counts(chosen("uniform", 20_000, 10, 3), 10)
    assert (found - 6000).abs().max() < 6 * 6000**0.5
    rows = chosen("uniform", 20_000, 5, 2)
    pairs = torch.zeros(5, 5, dtype=torch.int64).index_put_((rows[:, 0], rows[:, 1]), torch.tensor(1), accumulate=True)
    assert pairs.diagonal().sum() == 0
    assert (pairs[~torch.eye(5, dtype=torch.bool)] - 1000).abs().max() < 6 * 1000**0.5


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0, 2.0])
def test_zipf_popularity_falls_as_rank_to_minus_alpha(alpha: float) -> None:
    """At one pick a token the share of the r-th expert is r^-alpha over their sum."""
    T, E = 40_000, 12
    found = counts(chosen(f"zipf:{alpha}", T, E, 1), E).sort(descending=True).values.double() / T
    expected = torch.arange(1, E + 1, dtype=torch.float64) ** -alpha
    expected /= expected.sum()
    assert (found - expected).abs().max() < 5 * (expected.max() / T) ** 0.5 + (0.005 if alpha == 0 else 0)


def test_zipf_is_more_skewed_as_alpha_grows() -> None:
    busiest = [counts(chosen(f"zipf:{alpha}", 4000, 32, 4), 32).max().item() for alpha in (0, 0.5, 1, 2)]
    assert busiest == sorted(busiest)
    assert busiest[-1] > 1.5 * busiest[0]


def test_zipf_favours_other_experts_at_other_seeds() -> None:
    favourites = {counts(chosen("zipf:3", 500, 16, 1, seed), 16).argmax().item() for seed in range(12)}
    assert len(favourites) > 4


def test_a_steep_zipf_sends_everything_to_the_same_experts() -> None:
    assert (counts(chosen("zipf:20", 500, 16, 1), 16) == 500).sum() == 1
    assert chosen("zipf:20", 500, 16, 1).unique().numel() == 1


def share(fraction: str, tokens: int, top_k: int, experts: int, draws: int = 600) -> float:
    active = [chosen(f"active:{fraction}", tokens, experts, top_k, seed).unique().numel() for seed in range(draws)]
    return sum(active) / draws / experts


@pytest.mark.parametrize(
    ("fraction", "tokens", "top_k", "experts"),
    [(57.75 / 128, 16, 8, 128), (0.3, 8, 6, 64), (0.9, 64, 2, 8), (0.125, 16, 1, 16)],
    ids=["qwen3-235b-math", "v2-lite", "mixtral", "switch"],
)
def test_active_hits_its_fraction(fraction: float, tokens: int, top_k: int, experts: int) -> None:
    assert share(f"{fraction!r}@{tokens}", tokens, top_k, experts) == pytest.approx(fraction, rel=0.04)


def test_active_is_a_property_of_its_own_token_count() -> None:
    """The skew is that of 16 tokens; fewer reach fewer experts."""
    assert share("0.45@16", 4, 8, 128, draws=100) < 0.25


@pytest.mark.parametrize(
    ("fraction", "tokens", "top_k", "experts"),
    [(0.05, 16, 8, 128), (0.9, 16, 8, 128), (1.0, 1, 2, 8), (0.1, 1, 2, 8)],
)
def test_an_impossible_fraction_is_refused(fraction: float, tokens: int, top_k: int, experts: int) -> None:
    with pytest.raises(
        ValueError, match=rf"active:{fraction:g}@{tokens}: with {experts} experts and top_k {top_k} the share"
    ):
        solve_alpha(fraction, tokens, top_k, experts)


def test_the_fractions_that_are_offered_are_accepted() -> None:
    with pytest.raises(ValueError, match="can be") as refused:
        solve_alpha(0.99, 16, 8, 128)
    least, most = (float(word) for word in str(refused.value).rpartition("can be ")[2].split(" to "))
    assert 8 / 128 <= least < most < 0.7
    assert solve_alpha(most, 16, 8, 128) < 0.1
    assert solve_alpha(least, 16, 8, 128) > 5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_draws_are_fixed_by_the_seed_and_differ_between_seeds(pattern: str) -> None:
    problem = Problem("m", layer_of(experts=16, top_k=2), 32, pattern, "forward_backward", seed=5)
    weights = make_weights(problem.layer, "fp32", "cpu", 5)
    first, again, second = (make_draw(problem, weights, index) for index in (0, 0, 1))
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.routing.ids, again.routing.ids)
    assert torch.equal(first.routing.weights, again.routing.weights)
    assert torch.equal(first.upstream, again.upstream)
    assert not torch.equal(first.x, second.x)
    assert not torch.equal(first.upstream, second.upstream)  # x alone also moves with the routing
    assert not torch.equal(first.routing.weights, second.routing.weights)
    other = make_draw(Problem("m", problem.layer, 32, pattern, seed=6), weights, 0)
    assert not torch.equal(first.x, other.x)
    assert not torch.equal(first.routing.weights, other.routing.weights)


def test_drawing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    problem = Problem("m", layer_of(), 16, "active:0.5@4")
    make_draw(problem, make_weights(problem.layer, "fp32", "cpu", 0), 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unbuilt_pattern_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="trace:some"):
        chosen("trace:some.npz", 4, 8, 2)
