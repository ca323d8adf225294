"""What no provider can run is refused by the name of what is missing; it never runs as something else."""

from __future__ import annotations

import pytest
import torch
from core_arms import layer_of, router

from moebench.catalogue.models import models, resolve_layer
from moebench.catalogue.spec import LayerSpec
from moebench.catalogue.support import missing
from moebench.point import SCOPES, Problem, Variant
from moebench.refusal import NEEDS_ROUTER, WELL_CONDITIONED, refusal
from moebench.routing import route
from moebench.weights import DTYPES, make_weights
from moebench.workload import make_draw


def reason(model: str | LayerSpec, scope: str, traffic: str = "balanced", precision: str = "fp32") -> str | None:
    name, layer = (model, resolve_layer(model)[1].layer) if isinstance(model, str) else ("custom", model)
    return refusal(Problem(name, layer, 8, traffic), Variant("torch-loop", precision, scope=scope))


@pytest.mark.parametrize(
    ("model", "scope", "traffic", "words"),
    [
        ("deepseek-v3", "layer", "balanced", ["'sigmoid_bias' is not built yet", "scope 'layer' needs it"]),
        ("deepseek-v3", "gate", "balanced", ["router 'sigmoid_bias' is not built yet", "scope 'gate' needs it"]),
        ("deepseek-v3", "experts", "router", ["router 'sigmoid_bias' is not built yet", "traffic 'router' needs it"]),
        ("gpt-oss-20b", "layer", "balanced", ["activation 'clamped_swiglu' is not built yet"]),
        ("gpt-oss-20b", "experts", "balanced", ["activation 'clamped_swiglu' is not built yet"]),
        ("gpt-oss-20b", "down_projection", "balanced", ["'clamped_swiglu'"]),
        ("gpt-oss-20b", "gate", "balanced", ["router 'topk_softmax' with a bias on its logits is not built yet"]),
        ("gpt-oss-20b", "plan", "router", ["with a bias on its logits", "traffic 'router' needs it"]),
        ("arctic-480b", "layer", "balanced", ["form 'residual' is not built yet", "scope 'experts' runs without it"]),
        ("arctic-480b", "layer", "router", ["'residual'"]),
        ("llama4-scout", "layer", "balanced", ["'sigmoid_input' is not built yet", "scope 'experts' under balanced"]),
        ("llama4-scout", "experts", "router", ["router 'sigmoid_input' is not built yet", "traffic 'router' needs it"]),
    ],
)  # fmt: skip
def test_named_reasons(model: str, scope: str, traffic: str, words: list[str]) -> None:
    found = reason(model, scope, traffic)
    assert found is not None
    assert found.startswith(f"{model}: ")
    assert "\n" not in found
    for word in words:
        assert word in found


@pytest.mark.parametrize("model", ["deepseek-v3", "arctic-480b", "llama4-scout"])
def test_their_experts_run_on_given_traffic(model: str) -> None:
    assert reason(model, "experts", "balanced") is None
    assert reason(model, "up_projection", "zipf:1") is None


@pytest.mark.parametrize("model", ["olmoe-1b-7b", "mixtral-8x7b"])
@pytest.mark.parametrize("traffic", ["balanced", "router", "zipf:1"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_built_layers_are_refused_nothing(model: str, traffic: str, precision: str) -> None:
    assert missing(resolve_layer(model)[1].layer) == {}
    for scope in SCOPES:
        assert reason(model, scope, traffic, precision) is None


def test_expert_biases_are_named() -> None:
    for scope in ("layer", "experts", "combine"):
        assert reason(layer_of(expert_bias=True), scope) == "custom: biases in the experts are not built yet"
    assert reason(layer_of(expert_bias=True), "plan") is None


def test_whatever_is_missing_is_refused_somewhere() -> None:
    """All presets: a layer with an unbuilt part never passes at scope `layer`."""
    incomplete = 0
    for spec in models().values():
        for kind in spec.layers:
            if missing(kind.layer):
                incomplete += 1
                assert refusal(Problem(spec.id, kind.layer, 8), Variant("p")) is not None, spec.id
    assert incomplete > 10


def test_a_choice_cannot_be_imposed_on_too_many_experts() -> None:
    layer = layer_of(64, 2, hidden=32)
    for scope in NEEDS_ROUTER:
        found = reason(layer, scope, "balanced")
        assert "more experts (64) than hidden units (32)" in found
        assert "traffic 'router' and scope 'experts' can be run" in found
        assert reason(layer, scope, "router") is None
    assert reason(layer, "experts") is None


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_rounding_near_a_square_router_is_refused(precision: str) -> None:
    square, near, fine = (layer_of(experts, 8, hidden=64) for experts in (64, 60, 51))
    for layer in (square, near):
        for traffic in ("balanced", "router"):
            assert f"rounding to {precision} flips choices" in reason(layer, "layer", traffic, precision)
            assert reason(layer, "gate", traffic, precision)
            assert reason(layer, "layer", traffic) is None
            assert reason(layer, "experts", traffic, precision) is None
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
