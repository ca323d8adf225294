"""What is right when it is checked and something else while it is timed is found out afterwards."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core.core_arms import arm_of, assert_says, bench_of, layer_of, shared

from moebench import recheck as product
from moebench.arm import Arm
from moebench.measure.latency import CpuTimer
from moebench.point import DRAWS
from moebench.providers.load import load
from moebench.recheck import Finding, recheck

CHEATS = Path(__file__).with_name("cheating_kernels.py")
SHARED_MACHINE_CASES = 3  # a flag that rests on times may need another look on a busy machine


def timed_arm(provider: str, **more: Any) -> tuple[Arm, CpuTimer, float]:
    """A checked and sampled arm, its timer and its median in ms."""
    direction = more.pop("direction", "forward")
    layer = more.pop("layer", layer_of())
    arm = arm_of(provider, bench_of(layer, direction=direction), **more)
    verdict = arm.check()
    assert verdict.wrong is None, verdict.wrong
    timer = CpuTimer(DRAWS)
    return arm, timer, median(timer.burst(arm.call, 3 * DRAWS, 0).device_ms)


def finding(provider: str, **more: Any) -> Finding:
    """What is found of a provider after it has been timed."""
    return recheck(*timed_arm(provider, **more), "cpu")


def cheat(name: str) -> str:
    found = load(f"{CHEATS}:{name}")
    found.experts.__globals__["forget"]()  # type: ignore[attr-defined]
    return f"{CHEATS}:{name}"


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("scope", ["experts", "layer"])
@pytest.mark.parametrize("provider", ["torch-loop", "torch-bmm", "torch-grouped", f"{CHEATS}:right"])
def test_honest_work_is_not_suspected(provider: str, scope: str, direction: str) -> None:
    for _ in range(SHARED_MACHINE_CASES):
        found = finding(provider, scope=scope, direction=direction, layer=shared())
        assert found.wrong is None
        if not found.flags:
            return
    pytest.fail(f"flags {found.flags}")


@pytest.mark.parametrize("scope", ["gate", "plan", "permute", "up_projection", "down_projection", "combine"])
def test_honest_stages_are_not_suspected(scope: str) -> None:
    assert finding("torch-grouped", scope=scope).wrong is None


WRONG = {
    "keeps_while_unchanged": "the same inputs a second time were not computed again: its output had been kept",
    "right_at_first": "after it was timed: relative error",
    "changes_x_later": "changed its input x while it was timed",
    "changes_w_down_later": "changed the layer's w_down while it was timed",
    # On a machine so busy that the thread comes late even for that, the check that follows finds it.
    "finishes_late": "its output changed after it had returned|after it was timed: relative error",
}


@pytest.mark.parametrize("name", list(WRONG))
def test_work_that_is_not_what_was_checked_is_wrong(name: str) -> None:
    found = finding(cheat(name))
    assert_says(WRONG[name], found.wrong)
    assert found.flags == []


def test_weights_that_were_changed_are_put_right_for_the_others() -> None:
    arm, timer, latency_ms = timed_arm(cheat("changes_w_down_later"))
    assert recheck(arm, timer, latency_ms, "cpu").wrong
    assert arm_of("torch-loop", arm.bench).check().wrong is None


def test_whoever_changes_the_weights_is_blamed_and_nobody_else() -> None:
    arm, timer, latency_ms = timed_arm(cheat("changes_w_down_later"))
    honest = arm_of("torch-loop", arm.bench)
    assert honest.check().wrong is None
    arm.call(0)
    assert recheck(honest, timer, 1.0, "cpu") == Finding(None, ["weights_changed"])
    assert_says("changed the layer's w_down while it was timed", recheck(arm, timer, latency_ms, "cpu").wrong)


def test_the_inputs_are_as_they_were_after_a_recheck() -> None:
    arm, timer, latency_ms = timed_arm("torch-loop")
    before = [buffer.clone() for buffer in arm.buffers]
    recheck(arm, timer, latency_ms, "cpu")
    for one, other in zip(before, arm.buffers, strict=True):
        assert all(torch.equal(value, getattr(other, name)) for name, value in one.tensors().items())


def test_a_cache_that_hands_out_copies_is_seen_by_its_speed() -> None:
    found = finding(cheat("keeps_a_copy_while_unchanged"))
    assert found == Finding(None, ["faster_on_repeats"])


def test_one_output_for_all_calls_is_a_flag() -> None:
    found = finding(cheat("one_buffer"))
    assert found.wrong is None
    assert found.flags == ["reuses_output"]


def test_an_answer_in_the_memory_of_an_input_is_wrong() -> None:
    verdict = arm_of(cheat("grows_into_x"), bench_of(layer_of())).check()
    assert verdict.wrong == "returned a view of its input x"
    assert verdict.rel_error < 1e-5


# CUDA, as far as it can be played


def stale_graph(arm: Arm) -> SimpleNamespace:
    """What replays of a graph give that was captured while the answer lay in a cache."""
    stale = arm.call(0).clone()
    return SimpleNamespace(name="cuda_graph", once=lambda call, index: stale)


def test_a_graph_that_does_not_follow_its_inputs_is_wrong() -> None:
    arm, _, latency_ms = timed_arm("torch-loop")
    assert_says("does not follow new values", recheck(arm, stale_graph(arm), latency_ms, "cpu").wrong)
    honest = SimpleNamespace(name="cuda_graph", once=lambda call, index: call(index))
    assert recheck(arm, honest, latency_ms, "cpu").wrong is None


@pytest.mark.parametrize(("late_ms", "wrong"), [(0.0, False), (5.0, True)])
def test_work_on_a_stream_of_its_own_is_wrong(monkeypatch: pytest.MonkeyPatch, late_ms: float, wrong: bool) -> None:
    """The device is waited for `late_ms` longer than the stream that was timed, of a call that took 1 ms."""
    arm, timer, _ = timed_arm("torch-loop")
    clock = SimpleNamespace(now=0, busy=0)

    def synchronize() -> None:
        clock.now, clock.busy = clock.now + clock.busy, 0

    def called(index: int, call: Any = arm.call) -> Any:
        clock.busy = round(late_ms * 1e6)
        return call(index)

    cuda = SimpleNamespace(synchronize=synchronize, current_stream=lambda: SimpleNamespace(synchronize=lambda: None))
    arm.call = called  # type: ignore[method-assign]
    monkeypatch.setattr(product, "torch", SimpleNamespace(**{**vars(torch), "cuda": cuda}))
    monkeypatch.setattr(product, "time", SimpleNamespace(perf_counter_ns=lambda: clock.now, sleep=lambda seconds: None))
    found = product._computed_again(arm, timer, 1.0, "cuda")
    assert (found == "the device went on working after the stream it was called on was done") == wrong
    assert (found is None) == (not wrong)
