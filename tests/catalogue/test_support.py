"""What is not built is named; what is built is not."""

from __future__ import annotations

from dataclasses import replace

from moebench.catalogue.models import resolve_layer
from moebench.catalogue.routers import ROUTERS
from moebench.catalogue.spec import ACTIVATIONS, SHARED_COMBINES, LayerSpec, RouterSpec
from moebench.catalogue.support import BUILT_ACTIVATIONS, BUILT_SHARED, missing

PLAIN = LayerSpec(64, 32, 8, 2)


def test_built_layers_miss_nothing() -> None:
    for name in ("mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b", "qwen1.5-moe-a2.7b", "switch-base-128", "dbrx"):
        assert missing(resolve_layer(name)[1].layer) == {}


def test_gpt_oss_misses_three_parts() -> None:
    assert set(missing(resolve_layer("gpt-oss-20b")[1].layer)) == {"router", "activation", "expert_bias"}


def test_each_router() -> None:
    for kind, info in ROUTERS.items():
        reasons = missing(replace(PLAIN, router=RouterSpec(kind)))
        assert ("router" in reasons) != info.built
        assert info.built or kind in reasons["router"]
    assert "8 groups" in missing(replace(PLAIN, router=RouterSpec("softmax_topk", groups=8)))["router"]
    assert "bias" in missing(replace(PLAIN, router=RouterSpec("topk_softmax", logit_bias=True)))["router"]
    assert "unknown" in missing(replace(PLAIN, router=RouterSpec("no_such")))["router"]


def test_each_activation_and_shared_form() -> None:
    for activation in ACTIVATIONS:
        assert ("activation" in missing(replace(PLAIN, activation=activation))) != (activation in BUILT_ACTIVATIONS)
    for form in SHARED_COMBINES[1:]:
        layer = replace(PLAIN, shared_experts=1, shared_ffn_size=32, shared_combine=form)
        assert ("shared" in missing(layer)) != (form in BUILT_SHARED)


def test_the_routers_called_built_are_those_routing_has() -> None:
    from moebench.routing import routers

    assert {kind for kind, info in ROUTERS.items() if info.built} == set(routers._RULES)


def test_the_activations_called_built_are_those_of_the_providers() -> None:
    from moebench.providers.base import BUILT_ACTIVATIONS as PROVIDED

    assert set(PROVIDED) == set(BUILT_ACTIVATIONS)
