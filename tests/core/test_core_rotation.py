"""What the calls of an arm take turns over: copies of a small layer's weights, and what keeps them honest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from core_arms import arm_of, bench_of, layer_of, shared

from moebench.arm import Arm
from moebench.measure.latency import CpuTimer
from moebench.point import DRAWS
from moebench.providers.base import ExpertsProvider
from moebench.providers.torch_loop import PROVIDER as LOOP
from moebench.recheck import recheck
from moebench.rotation import rotate, stay_hot

PLENTY = 1e12
D, F, T = 32, 16, 37
INPUTS = DRAWS * T * (D * 4 + 2 * (8 + 4))  # x, ids, gate weights of top-2
EXPERTS = 8 * 3 * D * F * 4


def rotated(provider: Any = "torch-loop", times: float = 1.0, *, spare: float = PLENTY, **more: Any) -> Arm:
    """An arm on the small layer, made cold for a cache that holds `times` what its draws alone read."""
    options = {key: more.pop(key) for key in ("scope", "precision") if key in more}
    precision = options.get("precision", "fp32")
    arm = arm_of(provider, bench_of(more.pop("layer", layer_of()), precision=precision, **more), **options)
    rotate(arm, times * (EXPERTS + INPUTS), spare)
    return arm


def places(arm: Arm, calls: int) -> list[int]:
    """Which weights each of so many calls reads: 0 the layer's own, 1 the first copy, ..."""
    seen: list[int] = []
    known = [layer.w_down.data_ptr() for layer in arm.layers]

    def experts(x: Any, ids: Any, weights: Any, w_gate_up: Any, w_down: Any) -> Any:
        seen.append(known.index(w_down.data_ptr()))
        return x

    arm.states = [type(state)(state.weights, state.case, experts) for state in arm.states]
    for index in range(calls):
        arm.call(index)
    return seen


# How many


def test_bytes_that_rotate_by_hand() -> None:
    """All 8 experts are reached by 37 tokens; the scopes read no more than they run."""
    bench = bench_of(layer_of())
    assert rotate(arm_of("torch-loop", bench), 0.0, PLENTY) == EXPERTS + INPUTS
    assert rotate(arm_of("torch-loop", bench, scope="layer"), 0.0, PLENTY) == EXPERTS + 8 * D * 4 + INPUTS
    assert rotate(arm_of("torch-bmm", bench, scope="gate"), 0.0, PLENTY) == 8 * D * 4 + INPUTS
    assert stay_hot(arm_of("torch-loop", bench)) == EXPERTS + INPUTS / DRAWS


def test_only_the_experts_that_are_reached_count() -> None:
    arm = arm_of("torch-loop", bench_of(layer_of(64, 2), tokens=1))
    reached = {int(expert) for draw in arm.bench.draws[:DRAWS] for expert in draw.routing.ids.flatten()}
    inputs = INPUTS / T
    assert rotate(arm, 0.0, PLENTY) == len(reached) * EXPERTS / 8 + inputs
    assert len(reached) < 9


@pytest.mark.parametrize(("times", "copies"), [(0.5, 1), (1.0, 1), (1.5, 2), (3.0, 4), (5.0, 8), (5.5, 8), (6.0, 1)])
def test_as_few_copies_as_fill_the_cache_and_none_where_eight_are_not_enough(times: float, copies: int) -> None:
    arm = rotated(times=times)
    assert len(arm.states) == len(arm.layers) == copies
    assert arm.rotation == max(DRAWS, copies)
    assert len({layer.w_down.data_ptr() for layer in arm.layers}) == copies


def test_what_is_reached_is_what_the_copies_hold() -> None:
    bench = bench_of(layer_of())
    assert rotate(arm_of("torch-loop", bench), 3.0 * (EXPERTS + INPUTS), PLENTY) == 4 * EXPERTS + INPUTS
    assert rotate(arm_of("torch-loop", bench), 9.0 * (EXPERTS + INPUTS), PLENTY) == EXPERTS + INPUTS


def test_copies_stay_within_the_memory_that_is_spared() -> None:
    each = 2 * (EXPERTS + 8 * D * 4)
    assert len(rotated(times=1.5, spare=each).states) == 2
    assert len(rotated(times=1.5, spare=each - 1).states) == 1
    assert len(rotated(times=3.0, spare=each).states) == 1, "no half-measures: what does not fill the cache stays warm"


def test_the_arms_of_a_block_share_the_copies() -> None:
    bench = bench_of(layer_of())
    for name in ("torch-loop", "torch-bmm"):
        rotate(arm_of(name, bench), 3.0 * (EXPERTS + INPUTS), PLENTY)
    assert len(bench.copies) == 3


@dataclass(frozen=True)
class OnceProvider(ExpertsProvider):
    """Can be made ready once."""

    times: list[int] = field(default_factory=list)

    def prepare(self, weights: Any, case: Any) -> Any:
        self.times.append(1)
        if len(self.times) > 1:
            raise RuntimeError("one handle a process")
        return super().prepare(weights, case)


def test_who_cannot_be_made_ready_again_is_timed_on_the_weights_themselves() -> None:
    arm = rotated(OnceProvider("once", LOOP.experts), 3.0)
    assert (len(arm.states), arm.rotation) == (1, DRAWS)
    assert arm.check().wrong is None
    assert torch.isfinite(arm.call(7)).all()


# What each call does


def test_calls_take_turns_over_draws_and_copies() -> None:
    assert places(rotated(times=1.0), 5) == [0] * 5
    assert places(rotated(times=1.5), 5) == [0, 1, 0, 1, 0]
    assert places(rotated(times=5.0), 9) == [0, 1, 2, 3, 4, 5, 6, 7, 0]


def test_a_hot_arm_calls_one_draw_on_one_layer() -> None:
    arm = rotated(times=0.0)
    stay_hot(arm)
    ran: list[int] = []
    CpuTimer(arm.rotation).burst(lambda index: ran.append(index), 5, 3)
    assert (arm.rotation, ran) == (1, [0] * 5)


@pytest.mark.parametrize("provider", ["torch-loop", "torch-bmm", "torch-grouped"])
@pytest.mark.parametrize("scope", ["experts", "layer"])
def test_every_copy_gives_the_answer_of_the_weights(provider: str, scope: str) -> None:
    arm = rotated(provider, 5.0, scope=scope, layer=shared())
    assert len(arm.states) == 8
    for index in range(8):
        assert torch.equal(arm.call(index), arm.run(index % DRAWS))


@pytest.mark.parametrize("scope", ["gate", "permute", "up_projection", "down_projection", "combine"])
def test_stages_rotate_too(scope: str) -> None:
    arm = arm_of("torch-bmm", bench_of(layer_of()), scope=scope)
    rotate(arm, 2.0 * rotate(arm, 0.0, PLENTY) - 1, PLENTY)
    assert len(arm.states) in (1, 2, 4, 8)
    assert (len(arm.states) == 1) == (scope in ("permute", "combine", "gate")), "inputs outweigh the gate's weights"
    for index in range(arm.rotation):
        arm.call(index)


def test_quantised_copies_hold_the_same_values() -> None:
    arm = arm_of("torch-loop", bench_of(layer_of(), precision="int8"), precision="int8")
    rotate(arm, 3.0 * (EXPERTS / 4 + INPUTS), PLENTY)
    assert len(arm.states) > 1
    assert len({layer.quantised[0].values.data_ptr() for layer in arm.layers}) == len(arm.states)
    for index in range(arm.rotation):
        assert torch.equal(arm.call(index), arm.run(index % DRAWS))


def test_gradients_are_those_of_the_copy_that_ran() -> None:
    arm = rotated("torch-loop", 1.5, direction="forward_backward")
    assert len(arm.layers) == 2
    arm.call(1)
    assert arm.layers[0].w_down.grad is None
    first = arm.layers[1].w_down.grad.clone()
    arm.run(1, 0)
    assert torch.equal(arm.layers[0].w_down.grad, first)
    arm.call(1)
    assert torch.equal(arm.layers[1].w_down.grad, first), "cleared between calls, not added up"


# What keeps them honest


def test_whoever_writes_to_a_copy_is_found_and_all_are_put_right() -> None:
    arm = rotated(times=3.0)
    before = arm.weights.w_down.clone()
    arm.layers[2].w_down[0, 0, 0] += 1
    assert arm.restore_weights() == "w_down"
    assert all(torch.equal(layer.w_down, before) for layer in arm.layers)
    assert arm.restore_weights() is None


def test_a_shortcut_on_copies_is_found_afterwards() -> None:
    arm = rotated(times=3.0)
    assert arm.check().wrong is None
    timer = CpuTimer(arm.rotation)
    assert recheck(arm, timer, 1.0, "cpu").wrong is None
    honest = arm.states[0]
    cheap = type(honest)(honest.weights, honest.case, lambda x, *_, **__: torch.zeros_like(x))
    arm.states = [honest, cheap, honest, honest]
    assert arm.check().wrong is None, "the check looks at the weights themselves"
    assert recheck(arm, timer, 1.0, "cpu").wrong == "on a copy of the weights its answer is another"


def test_the_first_call_is_the_very_first() -> None:
    arm = rotated()
    assert arm.first_call_ms is None
    arm.check()
    first = arm.first_call_ms
    assert first is not None
    assert first > 0
    arm.check()
    assert arm.first_call_ms == first
