"""The triton provider: in the interpreter it is checked on a reduced twin and never timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core_arms import arm_of, bench_of, layer_of, router, shared, verdict_of

import moebench_kernels
from moebench.bench import TWIN_TOKENS, twin
from moebench.catalogue.routers import needed_picks
from moebench.point import STAGES
from moebench.providers.load import Unavailable, load
from moebench.routing import route

try:
    load("triton")
except Unavailable as missing:
    pytest.skip(f"triton provider unavailable: {missing}", allow_module_level=True)
interpreted = pytest.mark.skipif(
    not load("triton").interpreted("cpu"), reason="kernels are compiled here, not interpreted"
)
TINY = {"hidden": 32, "ffn": 16}


@interpreted
@pytest.mark.parametrize(
    ("direction", "scope", "capacity", "activation", "precision", "tokens", "experts", "top_k"),
    [
        ("forward", "experts", "dropless", "swiglu", "fp32", 1, 1, 1),
        ("forward", "layer", 0.5, "swiglu", "fp32", 37, 8, 2),
        ("forward", "layer", "dropless", "gelu", "fp32", 5, 3, 3),
        ("forward", "experts", 1.0, "relu", "bf16", 16, 8, 2),
        ("forward", "layer", "dropless", "geglu", "fp16", 5, 8, 2),
        ("forward_backward", "experts", 0.5, "swiglu", "fp32", 7, 8, 2),
        ("forward_backward", "layer", "dropless", "silu", "fp32", 5, 8, 1),
    ],
)
def test_against_the_oracle(
    direction: str, scope: str, capacity: Any, activation: str, precision: str, tokens: int, experts: int, top_k: int
) -> None:
    layer = (
        shared(activation=activation)
        if scope == "layer" and experts == 8 and top_k == 2
        else layer_of(experts, top_k, activation=activation)
    )
    verdict = verdict_of(
        "triton", layer, tokens, direction=direction, scope=scope, capacity=capacity, precision=precision
    )
    assert verdict.wrong is None


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("scope", ["experts", "layer"])
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("capacity", ["dropless", 1.0, 0.5])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "relu", "gelu", "silu"])
def test_all_against_the_oracle(activation: str, capacity: Any, direction: str, scope: str) -> None:
    for tokens, experts, top_k in [(1, 8, 2), (5, 3, 3), (16, 8, 1)]:
        layer = layer_of(experts, top_k, activation=activation)
        verdict = verdict_of("triton", layer, tokens, capacity=capacity, direction=direction, scope=scope)
        assert verdict.wrong is None, (tokens, experts, top_k, verdict.wrong)


@interpreted
@pytest.mark.parametrize(
    "spec", [router("softmax_topk", normalise=True, scale=2.5), router("topk_softmax"), router("switch_top1")], ids=str
)
def test_gate(spec: Any) -> None:
    layer = layer_of(8, 1 if spec.kind == "switch_top1" else 3, router=spec)
    assert verdict_of("triton", layer, 9, scope="gate").wrong is None


@interpreted
@pytest.mark.parametrize("scope", STAGES)
def test_stages(scope: str) -> None:
    assert verdict_of("triton", layer_of(), 9, scope=scope, capacity=0.75).wrong is None


@interpreted
def test_everything_to_one_expert() -> None:
    verdict = verdict_of("triton", layer_of(8, 1), 9, traffic="zipf:20", capacity=0.5, direction="forward_backward")
    assert verdict.wrong is None


@interpreted
def test_a_wrong_kernel_is_caught_on_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    right = moebench_kernels.moe_layer

    def weak(x: Any, ids: Any, weights: Any, *rest: Any, **more: Any) -> Any:
        return right(x, ids, weights * 0.9, *rest, **more)

    assert verdict_of("triton", layer_of(), 9).wrong is None
    monkeypatch.setattr(moebench_kernels, "moe_layer", weak)
    assert "relative error 0.1 " in verdict_of("triton", layer_of(), 9).wrong


@interpreted
def test_it_is_never_timed() -> None:
    arm = arm_of("triton", bench_of(layer_of()))
    assert not arm.timed
    assert arm.buffers == []  # so nothing that a timer could call
    with pytest.raises(IndexError):
        arm.call(0)
    assert arm.checked_on == "T16 D32 F16 E8 K2, reduced twin in Triton's interpreter"
    assert arm_of("torch-loop", bench_of(layer_of())).timed


@interpreted
def test_its_record_still_knows_the_routing() -> None:
    facts = arm_of("triton", bench_of(layer_of(), tokens=64, traffic="balanced"), capacity=0.5).routing_facts()
    assert facts["drop_rate"] == pytest.approx(0.5, abs=0.1)
    assert facts["active_experts"] == 8


# The twin itself needs no Triton.


def big_bench(**more: Any) -> Any:
    layer = layer_of(
        experts=48, top_k=6, hidden=256, ffn=128, shared_experts=1, shared_ffn_size=200, shared_combine="add"
    )
    return bench_of(layer, tokens=40, **more)


def test_the_twin_keeps_experts_picks_and_router() -> None:
    full = big_bench(traffic="zipf:1", direction="forward_backward")
    small = twin(full, "fp32")
    was, now = full.problem.layer, small.problem.layer
    assert (now.routed_experts, now.top_k, now.router, now.activation) == (
        was.routed_experts,
        was.top_k,
        was.router,
        was.activation,
    )
    assert (now.shared_experts, now.shared_combine) == (1, "add")
    assert now.total_params() < was.total_params() / 5
    assert (small.problem.tokens, small.problem.direction) == (TWIN_TOKENS, "forward_backward")
    assert now.hidden_size >= 2 * now.routed_experts  # so that rounding x flips no imposed choice


def test_the_twin_keeps_the_routing_of_the_first_tokens() -> None:
    full = big_bench(traffic="zipf:1")
    small = twin(full, "bf16")
    assert len(small.draws) == len(full.draws)
    for was, now in zip(full.draws, small.draws, strict=True):
        assert torch.equal(now.routing.ids, was.routing.wanted_ids[:TWIN_TOKENS])
        assert torch.equal(now.routing.weights, was.routing.wanted_weights[:TWIN_TOKENS])
        x = now.x.bfloat16()
        ids = route(small.problem.layer, x @ small.weights.router.T).ids  # the twin's own router makes that choice
        assert torch.equal(ids.sort(1).values, now.routing.ids.sort(1).values)


def test_the_twin_is_never_larger() -> None:
    tiny = bench_of(layer_of(4, 2, hidden=16, ffn=8), tokens=3)
    small = twin(tiny, "fp32")
    assert small.problem == tiny.problem
    assert small.weights.w_down.shape == tiny.weights.w_down.shape


@pytest.mark.parametrize("kind", ["cosine", "expert_choice", "hash", "soft_moe"])
def test_the_twin_of_a_router_that_x_cannot_be_moved_for_makes_its_own_choice(kind: str) -> None:
    layer = layer_of(8, needed_picks(kind, 8) or 2, hidden=128, router=router(kind))
    small = twin(bench_of(layer, tokens=40, traffic="router"), "fp32")
    for scope in ("experts", "layer"):
        assert arm_of("torch-loop", small, scope=scope).check().wrong is None
    assert arm_of("triton", small, scope="layer").check().wrong is None


@pytest.mark.parametrize(
    "kind", ["sigmoid_bias", "softmax_bias", "sqrt_softplus_bias", "sigmoid_logit_bias", "batch_mask"]
)
def test_the_twin_keeps_what_the_router_chooses_by(kind: str) -> None:
    """Its biases and thresholds do not depend on widths, and the logits of the full layer were made for them."""
    full = bench_of(layer_of(16, 4, hidden=128, ffn=64, router=router(kind)), tokens=16, traffic="router")
    assert arm_of("triton", full, scope="layer").check().wrong is None
    for name, value in full.weights.gate.items():
        assert torch.equal(twin(full, "fp32").weights.gate[name], value)
