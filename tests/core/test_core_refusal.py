"""What no provider can run is refused by the name of what is missing; it never runs as something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core_arms import layer_of, router

from moebench.catalogue.models import models
from moebench.catalogue.routers import needed_picks, router_info
from moebench.catalogue.spec import LayerSpec
from moebench.point import Problem, Variant
from moebench.refusal import FINE, NEEDS_ROUTER, WELL_CONDITIONED, refusal
from moebench.routing import route
from moebench.weights import DTYPES, make_weights
from moebench.workload import make_draw


def reason(layer: LayerSpec, scope: str, traffic: str = "balanced", precision: str = "fp32") -> str | None:
    return refused(layer, scope=scope, traffic=traffic, precision=precision)


def refused(layer: LayerSpec, traffic: str = "balanced", **variant: Any) -> str | None:
    return refusal(Problem("custom", layer, 8, traffic), Variant("torch-loop", **variant))


def kind(name: str, **more: Any) -> LayerSpec:
    return layer_of(8, needed_picks(name, 8) or 2, router=router(name, **more))


@pytest.mark.parametrize(
    ("layer", "asked", "words"),
    [
        (kind("cosine"), {}, "cannot be imposed on router 'cosine', which is not a linear map of x; traffic"),
        (kind("attention"), {"scope": "gate"}, "traffic 'router' and scope 'experts' can be run"),
        (kind("noisy_topk", training=True), {}, "router 'noisy_topk', whose noise depends on x"),
        (kind("soft_moe"), {"scope": "experts"}, "no experts that traffic 'balanced' could ask for; use 'router'"),
        (kind("hash"), {"traffic": "active:0.5@4"}, "'hash' chooses by token id; traffic balanced, uniform, zipf and"),
        (kind("hash"), {"traffic": "trace:file"}, "router 'hash' chooses by token id"),
        (kind("expert_choice"), {"capacity_factor": 1.0}, "a capacity of its own (kT/E, rounded to nearest; tokens"),
        (kind("softmax_topk"), {"capacity_factor": -1.0}, "factor -1 with capacity_rounding 'ceil': it must be"),
        (kind("softmax_topk"), {"capacity_factor": 0.0}, "it must be above 0 (or use 'tutel')"),
        (kind("noisy_softmax_topk", training=True), {"precision": "bf16"}, "rounding to bf16 flips choices"),
        (
            kind("softmax_topk"),
            {"precision": "bf16", "capacity_factor": 1.0, "drop_order": "probability"},
            "rounding to bf16 changes who is dropped by probability",
        ),
        (kind("mixer"), {"precision": "bf16", "traffic": "router"}, "which takes x as it comes; fp32 can be run"),
        (kind("sparsemixer"), {"precision": "bf16"}, "which compares scores finely; fp32 can be run"),
        (kind("cosine"), {"precision": "fp16", "traffic": "router"}, "which takes x as it comes; fp32 can be run"),
    ],
    ids=str,
)  # fmt: skip
def test_named_reasons(layer: LayerSpec, asked: dict[str, Any], words: str) -> None:
    found = refused(layer, **asked)
    assert found is not None
    assert words in found
    assert "\n" not in found


@pytest.mark.parametrize(
    ("layer", "asked"),
    [
        (kind("cosine"), {"scope": "experts"}),
        (kind("cosine"), {"traffic": "router"}),
        (kind("hash"), {"precision": "bf16"}),
        (kind("hash"), {"traffic": "zipf:1"}),
        (kind("soft_moe"), {"traffic": "router", "precision": "bf16"}),
        (kind("expert_choice"), {"traffic": "zipf:1"}),
        (kind("noisy_topk", training=True), {"traffic": "router"}),
        (kind("noisy_topk"), {"traffic": "zipf:1"}),
        (kind("expert_choice"), {"traffic": "zipf:1", "precision": "bf16"}),
        (kind("softmax_topk"), {"capacity_factor": 0.0, "capacity_rounding": "tutel"}),
        (kind("softmax_topk"), {"capacity_factor": -2.0, "capacity_rounding": "tutel"}),
    ],
    ids=str,
)
def test_what_can_be_run_is_not_refused(layer: LayerSpec, asked: dict[str, Any]) -> None:
    assert refused(layer, **asked) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_presets_are_refused_only_what_their_traffic_cannot_be(precision: str) -> None:
    """Every published layer runs at scope `layer`, under its own router at least."""
    for spec in models().values():
        for each in spec.layers:
            info = router_info(each.layer.router.kind)
            found = refusal(Problem(spec.id, each.layer, 8, "router"), Variant("torch-loop", precision))
            near = each.layer.routed_experts > WELL_CONDITIONED * each.layer.hidden_size
            small_or_own = near or not info.imposable or each.layer.router.kind in FINE
            assert found is None or (precision == "bf16" and small_or_own), (spec.id, found)
            assert refusal(Problem(spec.id, each.layer, 8), Variant("torch-loop", precision, scope="experts")) is None


def test_a_choice_cannot_be_imposed_on_too_many_experts() -> None:
    layer = layer_of(64, 2, hidden=32)
    for scope in NEEDS_ROUTER:
        found = reason(layer, scope, "balanced")
        assert "can be imposed on at most 25 experts with 32 hidden units, not on 64" in found
        assert "traffic 'router' and scope 'experts' can be run" in found
        assert reason(layer, scope, "router") is None
    assert reason(layer, "experts") is None


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_rounding_near_a_square_router_is_refused(precision: str) -> None:
    square, near, fine = (layer_of(experts, 8, hidden=64) for experts in (64, 60, 51))
    for layer in (square, near):
        assert f"rounding to {precision} flips choices" in reason(layer, "layer", "router", precision)
        assert reason(layer, "gate", "router", precision)
        assert reason(layer, "layer", "router") is None
        for traffic in ("balanced", "router"):
            assert reason(layer, "experts", traffic, precision) is None
        assert "at most 51 experts" in reason(layer, "layer", "balanced")
    assert reason(fine, "layer", "balanced", precision) is None


def flips(experts: int, hidden: int) -> int:
    """Choices that bf16 flips, of 768."""
    layer, total = layer_of(experts, 8, hidden=hidden, router=router("softmax_topk")), 0
    for seed in range(3):
        weights = make_weights(layer, "bf16", "cpu", seed)
        draw = make_draw(Problem("m", layer, 256, "uniform", seed=seed), weights, 0)
        ids = route(layer, draw.x.to(DTYPES["bf16"]) @ weights.router.T).ids
        total += int((ids.sort(1).values != draw.routing.ids.sort(1).values).any(1).sum())
    return total


def test_the_limit_of_that_refusal_is_where_choices_flip() -> None:
    torch.manual_seed(0)
    assert flips(128, 128) > 5
    assert flips(128, int(128 / WELL_CONDITIONED)) == 0
