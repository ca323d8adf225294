"""Routing: what each traffic pattern promises, and logits that make a router keep the promise in any precision."""

from __future__ import annotations

import pytest
import torch
from core_arms import layer_of, router
from torch import Tensor

from moebench.catalogue.routers import ROUTERS
from moebench.catalogue.spec import LayerSpec, RouterSpec
from moebench.point import Problem
from moebench.routing import route, route_problem
from moebench.routing.logits import MARGIN, impose_choice, impose_logits, widen_margin
from moebench.routing.patterns import choose_experts, solve_alpha
from moebench.routing.routers import BUILT, refuse_unbuilt
from moebench.traffic import parse_traffic
from moebench.workload import DTYPES, make_draw, make_weights

PATTERNS = ["balanced", "uniform", "zipf:1", "zipf:20", "active:0.3@4"]
SHAPES = [(1, 1, 1), (1, 8, 2), (5, 3, 3), (37, 8, 2), (64, 16, 5), (100, 60, 4)]  # T, E, K
BUILT_ROUTERS = [
    router("softmax_topk"), router("softmax_topk", normalise=True), router("softmax_topk", scale=2.5),
    router("topk_softmax"), router("topk_softmax", scale=0.5), router("switch_top1"),
]  # fmt: skip


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
    problem = Problem("m", layer_of(experts=16, top_k=2), 32, pattern, seed=5)
    weights = make_weights(problem.layer, "fp32", "cpu", 5).router
    first, again, second = (make_draw(problem, weights, index) for index in (0, 0, 1))
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.routing.ids, again.routing.ids)
    assert torch.equal(first.routing.weights, again.routing.weights)
    assert torch.equal(first.upstream, again.upstream)
    assert not torch.equal(first.x, second.x)
    assert not torch.equal(first.routing.weights, second.routing.weights)
    other = make_draw(Problem("m", problem.layer, 32, pattern, seed=6), weights, 0)
    assert not torch.equal(first.x, other.x)
    assert not torch.equal(first.routing.weights, other.routing.weights)


def test_drawing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    problem = Problem("m", layer_of(), 16, "active:0.5@4")
    make_draw(problem, make_weights(problem.layer, "fp32", "cpu", 0).router, 0)
    assert torch.equal(torch.get_rng_state(), before)


# Routers.


def by_hand(spec: RouterSpec, top_k: int, logits: Tensor) -> tuple[list[int], list[float]]:
    """One token's choice, in Python."""
    import math

    z = logits.double().tolist()
    ids = sorted(range(len(z)), key=lambda expert: -z[expert])[:top_k]
    total = math.fsum(math.exp(value) for value in z)
    scores = [math.exp(z[expert]) / total for expert in ids]
    if spec.normalise or spec.kind == "topk_softmax":
        scores = [score / math.fsum(scores) for score in scores]
    return ids, [score * spec.scale for score in scores]


@pytest.mark.parametrize("spec", BUILT_ROUTERS, ids=str)
def test_built_routers_by_hand(spec: RouterSpec) -> None:
    K = 1 if spec.kind == "switch_top1" else 3
    logits = torch.randn(20, 9, generator=torch.Generator().manual_seed(1))
    ids, weights = route(layer_of(9, K, router=spec), logits)
    assert weights.dtype == torch.float32
    for token in range(20):
        want_ids, want = by_hand(spec, K, logits[token])
        assert ids[token].tolist() == want_ids
        assert weights[token].tolist() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("spec", BUILT_ROUTERS, ids=str)
def test_weights_sum_to_what_the_rule_says(spec: RouterSpec) -> None:
    K = 1 if spec.kind == "switch_top1" else 4
    _, weights = route(layer_of(8, K, router=spec), torch.randn(50, 8))
    total = weights.double().sum(dim=1)
    if spec.normalise or spec.kind == "topk_softmax":
        assert (total - spec.scale).abs().max() < 1e-6
    else:
        assert total.max() < spec.scale
    assert weights.min() > 0
    _, whole = route(layer_of(4, 4, router=router("softmax_topk")), torch.randn(50, 4))
    assert (whole.sum(dim=1) - 1).abs().max() < 1e-6


def test_low_precision_logits_are_widened_first() -> None:
    logits = torch.randn(10, 8).bfloat16()
    for spec in (router("softmax_topk"), router("topk_softmax")):
        ids, weights = route(layer_of(8, 2, router=spec), logits)
        same_ids, same = route(layer_of(8, 2, router=spec), logits.float())
        assert torch.equal(ids, same_ids)
        assert torch.equal(weights, same)


UNBUILT = [router(kind) for kind in sorted(ROUTERS) if not ROUTERS[kind].built]
UNBUILT += [router("softmax_topk", groups=4, topk_groups=2), router("topk_softmax", logit_bias=True), router("made_up")]


@pytest.mark.parametrize("spec", UNBUILT, ids=lambda spec: f"{spec.kind}-{spec.groups}-{spec.logit_bias}")
def test_an_unbuilt_router_raises_and_names_itself(spec: RouterSpec) -> None:
    layer = layer_of(8, 2, router=spec)
    with pytest.raises(NotImplementedError, match=f"router '{spec.kind}'.* not built yet"):
        route(layer, torch.randn(4, 8))
    with pytest.raises(NotImplementedError, match=f"router '{spec.kind}'"):
        route_problem(layer, parse_traffic("router"), torch.randn(4, 8), 4, 0)


@pytest.mark.parametrize("spec", UNBUILT[:3], ids=lambda spec: spec.kind)
def test_the_experts_of_an_unbuilt_router_still_get_traffic(spec: RouterSpec) -> None:
    """Its ids and weights are given; no logits pretend that a router made them."""
    routing = route_problem(layer_of(8, 2, router=spec), parse_traffic("balanced"), None, 16, 0)
    assert routing.logits is None
    assert set(routing.counts().tolist()) == {4}
    assert (routing.weights.sum(dim=1) - 1).abs().max() < 1e-6


def test_built_is_what_the_catalogue_says() -> None:
    assert set(BUILT) == {name for name, info in ROUTERS.items() if info.built}
    for kind in BUILT:
        refuse_unbuilt(router(kind))


# Imposed choices.


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_imposed_logits_choose_the_ids_in_their_order(shape: tuple[int, int, int]) -> None:
    T, E, K = shape
    ids = chosen("uniform", T, E, K)
    logits = impose_choice(ids, E, torch.Generator().manual_seed(1))
    assert torch.equal(logits.topk(K).indices, ids)
    ranked = logits.sort(dim=-1, descending=True).values
    gaps = -ranked.diff(dim=-1)[:, :K]
    assert gaps.numel() == 0 or gaps.min() > MARGIN * 0.999


def test_the_margin_stands_at_the_last_place_of_a_real_router() -> None:
    logits = torch.randn(200, 16)
    ids = logits.topk(3).indices
    wide = widen_margin(logits, ids)
    assert torch.equal(wide.topk(3).indices, ids)
    ranked = wide.sort(dim=-1, descending=True).values
    assert (ranked[:, 2] - ranked[:, 3]).min() >= MARGIN * 0.999
    assert torch.equal(wide.scatter(1, ids, 0), logits.scatter(1, ids, 0))


def test_hidden_states_are_moved_just_enough() -> None:
    """The correction lies in the span of the router's rows: nothing shorter gives these logits."""
    x, W, z = torch.randn(9, 32), torch.randn(8, 32), torch.randn(9, 8)
    moved = impose_logits(x, W, z)
    torch.testing.assert_close(moved @ W.double().T, z.double(), rtol=1e-10, atol=1e-10)
    correction = moved - x.double()
    kernel = torch.linalg.svd(W.double())[2][8:]
    assert (correction @ kernel.T).abs().max() < 1e-10


LAYERS = [
    layer_of(8, 2, hidden=32),
    layer_of(16, 4, hidden=64),
    layer_of(64, 8, hidden=128),
    layer_of(64, 8, hidden=80),
]


@pytest.mark.parametrize("pattern", ["balanced", "zipf:1", "router"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["softmax_topk", "topk_softmax", "switch_top1"])
def test_no_rounding_flips_a_choice(kind: str, precision: str, pattern: str) -> None:
    """x and W rounded to the precision, the product too, as every provider's router GEMM does."""
    for layer in LAYERS:
        K = 1 if kind == "switch_top1" else layer.top_k
        layer = LayerSpec(layer.hidden_size, 16, layer.routed_experts, K, router=router(kind))
        W = make_weights(layer, precision, "cpu", 3).router
        draw = make_draw(Problem("m", layer, 256, pattern, seed=3), W, 0)
        x = draw.x.to(DTYPES[precision])
        for logits in (x @ W.T, x.double() @ W.double().T):
            ids, weights = route(layer, logits)
            assert torch.equal(ids.sort(dim=1).values, draw.routing.ids.sort(dim=1).values)
            close = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 0.1}[precision]
            assert (weights - draw.routing.weights.gather(1, _places(draw.routing.ids, ids))).abs().max() < close


def _places(ids: Tensor, wanted: Tensor) -> Tensor:
    """Where in `ids` each of `wanted` stands."""
    return (ids.unsqueeze(1) == wanted.unsqueeze(2)).int().argmax(dim=2)


def test_router_traffic_is_the_layer_s_own_choice() -> None:
    layer = layer_of(16, 3, hidden=64)
    W = make_weights(layer, "fp32", "cpu", 0).router
    problem = Problem("m", layer, 50, "router")
    draw = make_draw(problem, W, 0)
    x = torch.randn(50, 64, generator=_generator_of(problem, 0))
    ids, _ = route(layer, x @ W.T)
    assert torch.equal(draw.routing.ids, ids)
    assert (draw.x - x).norm() < 0.2 * x.norm()  # moved by the margin only


def _generator_of(problem: Problem, index: int) -> torch.Generator:
    from moebench.workload import seed_of

    return torch.Generator().manual_seed(seed_of(problem.seed, "inputs", index))


def test_more_experts_than_hidden_units_leave_x_as_it_comes() -> None:
    layer = layer_of(64, 2, hidden=32)
    W = make_weights(layer, "fp32", "cpu", 0).router
    balanced, own = (make_draw(Problem("m", layer, 64, pattern), W, 0) for pattern in ("balanced", "router"))
    assert torch.equal(balanced.x, own.x)
    assert set(balanced.routing.counts().tolist()) == {2}  # still what was asked, for scope `experts`


def test_an_unbuilt_pattern_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="trace:some"):
        chosen("trace:some.npz", 4, 8, 2)
