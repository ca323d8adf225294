"""Routers: each rule by hand; and hidden states whose logits make a router choose what was asked, in any precision."""

from __future__ import annotations

import math

import pytest
import torch
from core_arms import layer_of, router
from torch import Tensor

from moebench.catalogue.spec import LayerSpec, RouterSpec
from moebench.point import Problem
from moebench.routing import route
from moebench.routing.logits import MARGIN, impose_choice, impose_logits, steady
from moebench.routing.patterns import choose_experts
from moebench.traffic import parse_traffic
from moebench.weights import DTYPES, make_weights, seed_of
from moebench.workload import make_draw

SHAPES = [(1, 1, 1), (1, 8, 2), (5, 3, 3), (37, 8, 2), (64, 16, 5), (100, 60, 4)]  # T, E, K
BUILT_ROUTERS = [
    router("softmax_topk"), router("softmax_topk", normalise=True), router("softmax_topk", scale=2.5),
    router("topk_softmax"), router("topk_softmax", scale=0.5), router("switch_top1"),
]  # fmt: skip


def chosen(pattern: str, tokens: int, experts: int, top_k: int, seed: int = 0) -> Tensor:
    return choose_experts(parse_traffic(pattern), tokens, top_k, experts, torch.Generator().manual_seed(seed))


def routed(layer: LayerSpec, logits: Tensor) -> tuple[Tensor, Tensor]:
    found = route(layer, logits)
    return found.ids, found.weights


def by_hand(spec: RouterSpec, top_k: int, logits: Tensor) -> tuple[list[int], list[float]]:
    """One token's choice, in Python."""
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
    ids, weights = routed(layer_of(9, K, router=spec), logits)
    assert weights.dtype == torch.float32
    for token in range(20):
        want_ids, want = by_hand(spec, K, logits[token])
        assert ids[token].tolist() == want_ids
        assert weights[token].tolist() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("spec", BUILT_ROUTERS, ids=str)
def test_weights_sum_to_what_the_rule_says(spec: RouterSpec) -> None:
    K = 1 if spec.kind == "switch_top1" else 4
    _, weights = routed(layer_of(8, K, router=spec), torch.randn(50, 8))
    total = weights.double().sum(dim=1)
    if spec.normalise or spec.kind == "topk_softmax":
        assert (total - spec.scale).abs().max() < 1e-6
    else:
        assert total.max() < spec.scale
    assert weights.min() > 0
    _, whole = routed(layer_of(4, 4, router=router("softmax_topk")), torch.randn(50, 4))
    assert (whole.sum(dim=1) - 1).abs().max() < 1e-6


def test_low_precision_logits_are_widened_first() -> None:
    logits = torch.randn(10, 8).bfloat16()
    for spec in (router("softmax_topk"), router("topk_softmax")):
        ids, weights = routed(layer_of(8, 2, router=spec), logits)
        same_ids, same = routed(layer_of(8, 2, router=spec), logits.float())
        assert torch.equal(ids, same_ids)
        assert torch.equal(weights, same)


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
    logits, layer = torch.randn(200, 16), layer_of(16, 3)
    ids = logits.topk(3).indices
    wide = steady(logits, lambda z: route(layer, z))
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
        made = make_weights(layer, precision, "cpu", 3)
        W = made.router
        draw = make_draw(Problem("m", layer, 256, pattern, seed=3), made, 0)
        x = draw.x.to(DTYPES[precision])
        for logits in (x @ W.T, x.double() @ W.double().T):
            ids, weights = routed(layer, logits)
            assert torch.equal(ids.sort(dim=1).values, draw.routing.ids.sort(dim=1).values)
            close = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 0.1}[precision]
            assert (weights - draw.routing.weights.gather(1, _places(draw.routing.ids, ids))).abs().max() < close


def _places(ids: Tensor, wanted: Tensor) -> Tensor:
    """Where in `ids` each of `wanted` stands."""
    return (ids.unsqueeze(1) == wanted.unsqueeze(2)).int().argmax(dim=2)


def test_router_traffic_is_the_layer_s_own_choice() -> None:
    layer = layer_of(16, 3, hidden=64)
    made = make_weights(layer, "fp32", "cpu", 0)
    problem = Problem("m", layer, 50, "router")
    draw = make_draw(problem, made, 0)
    x = torch.randn(50, 64, generator=_generator_of(problem, 0))
    ids, _ = routed(layer, x @ made.router.T)
    assert torch.equal(draw.routing.ids, ids)
    assert (draw.x - x).norm() < 0.2 * x.norm()  # moved by the margin only


def _generator_of(problem: Problem, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(problem.seed, "inputs", index))


def test_more_experts_than_hidden_units_leave_x_as_it_comes() -> None:
    layer = layer_of(64, 2, hidden=32)
    made = make_weights(layer, "fp32", "cpu", 0)
    balanced, own = (make_draw(Problem("m", layer, 64, pattern), made, 0) for pattern in ("balanced", "router"))
    assert torch.equal(balanced.x, own.x)
    assert set(balanced.routing.counts().tolist()) == {2}  # still what was asked, for scope `experts`
