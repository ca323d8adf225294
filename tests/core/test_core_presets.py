"""Every published layer, with its own router, biases, activation and shared experts, at widths a test can afford."""

from __future__ import annotations

from dataclasses import replace

import pytest
from core_arms import layer_of, router, verdict_of

from moebench.catalogue.models import models
from moebench.catalogue.routers import imposable
from moebench.catalogue.spec import LayerSpec
from moebench.point import Problem, Variant
from moebench.refusal import refusal

MOST_EXPERTS = 512  # shazeer-moe-137b has 131,072
SHRUNK: dict[str, LayerSpec] = {
    f"{spec.id}:{kind.name}".rstrip(":"): kind.layer
    for spec in models().values()
    for kind in spec.layers
    if kind.layer.routed_experts <= MOST_EXPERTS and spec.alias_of is None
}


def shrunk(layer: LayerSpec) -> LayerSpec:
    return replace(
        layer,
        hidden_size=max(32, 2 * layer.routed_experts),
        expert_ffn_size=4,
        shared_ffn_size=4 if layer.shared_ffn_size else 0,
    )


@pytest.mark.parametrize("model", SHRUNK)
def test_its_layer_is_right_under_its_own_router(model: str) -> None:
    layer = shrunk(SHRUNK[model])
    traffics = ["router", "zipf:1"] if imposable(layer.router) else ["router"]
    for traffic in traffics:
        assert refusal(Problem(model, layer, 12, traffic), Variant("torch-bmm")) is None
        verdict = verdict_of("torch-bmm", layer, 12, scope="layer", traffic=traffic)
        assert verdict.wrong is None, verdict.wrong
    assert verdict_of("torch-grouped", layer, 12, scope="gate", traffic="router").wrong is None


def test_most_published_layers_are_tried() -> None:
    assert len(SHRUNK) > 55
    assert len({layer.router.kind for layer in SHRUNK.values()}) > 12


def test_zero_experts_return_their_input() -> None:
    """LongCat-Flash: no provider runs them, all add them."""
    layer = layer_of(8, 3, router=router("softmax_bias_zero", zero_experts=4, scale=2.0))
    for provider in ("torch-loop", "torch-bmm", "torch-grouped", "torch-dense"):
        for traffic in ("router", "zipf:1"):
            for scope in ("layer", "experts"):
                for direction in ("forward", "forward_backward"):
                    verdict = verdict_of(provider, layer, 40, scope=scope, traffic=traffic, direction=direction)
                    assert verdict.wrong is None, (provider, traffic, scope, direction, verdict.wrong)
