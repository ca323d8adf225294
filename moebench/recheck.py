"""Recheck: was what has been timed the work that was checked? Asked of each arm when its samples are taken.

A provider may give the right answer when it is checked and something cheaper while it is timed,
in bad faith or by a cache that means well: an output that it keeps, work that goes on after it has
returned, an answer that is right for the first calls only. So after the race:

1. the inputs and the weights must be as they were (weights that nobody is seen to change again: a flag on every arm);
2. on inputs that have not changed, a second answer must be computed again (the first one has been
   overwritten with NaN by then), and must not change after it has been returned;
3. on new values in the same buffers, through whatever was timed (a graph's replay, too), the whole check again;
   and on the copies of the weights that the timed calls took turns over, the same answer;
4. calls on values that have just been written must not take far longer than the timed ones, whose values stood still.

The first three make a row `inaccurate`; the last one is a flag. The list of tricks is KernelBench's (its EVAL.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moebench.arm import Arm, poison, tensors_in
from moebench.measure.latency import Timer

REPEATS_FASTER = 1.5  # fresh values cost this much more at least before anything is said; noise rarely does both times
MIN_EXCESS_MS = 0.02  # below it the difference is the clock's
FEW, SLOW_MS = 5, 100.0
SETTLE_S = 0.005  # what still runs after a return shows within this, or within the call's own time twice over
LATE_SHARE, LATE_MS = 0.05, 0.05  # device work after its stream was done: that much of the call, and more than a launch


class Finding(NamedTuple):
    """What was found: why the row is wrong, or None; and flags."""

    wrong: str | None
    flags: list[str]


def recheck(arm: Arm, timer: Timer, latency_ms: float, device_kind: str) -> Finding:
    """Look at an arm again that has been timed.

    Args:
        latency_ms: the median of its samples.
    """
    for ask in (_unchanged, _computed_again, _right_through_the_timer, _right_on_copies, _right_again):
        wrong = ask(arm, timer, latency_ms, device_kind)
        if wrong is not None:
            return Finding(wrong, [])
    flags = ["weights_changed"] if arm.bench.tampered else []
    if _keeps_its_output(arm):
        flags.append("reuses_output")
    if _faster_on_repeats(arm, latency_ms, device_kind):
        flags.append("faster_on_repeats")
    return Finding(None, flags)


def _unchanged(arm: Arm, timer: Timer, latency_ms: float, device_kind: str) -> str | None:
    changed = arm.changed_input()
    if changed:
        return f"changed its input {changed} while it was timed"
    return _changes_weights(arm)


def _changes_weights(arm: Arm) -> str | None:
    """The weights are every arm's: where they have changed, whoever changes them again is the one who did."""
    arm.bench.tampered.update(filter(None, [arm.restore_weights()]))
    if not arm.bench.tampered:
        return None
    for index in range(arm.rotation):
        arm.call(index)
    changed = arm.restore_weights()
    return f"changed the layer's {changed} while it was timed" if changed else None


def _computed_again(arm: Arm, timer: Timer, latency_ms: float, device_kind: str) -> str | None:
    output = tensors_in(arm.call(0))
    kept = [value.detach().clone() for value in output]
    time.sleep(min(1.0, max(SETTLE_S, 2e-3 * latency_ms)))
    if not all(map(_same, output, kept)):
        return "its output changed after it had returned"
    if device_kind == "cuda" and all(_late(arm, latency_ms) for _ in range(2)):
        return "the device went on working after the stream it was called on was done"
    for value in output:
        poison(value)
    again = tensors_in(arm.call(0))
    if any(_lost(new, old) for new, old in zip(again, kept, strict=False)):
        return "the same inputs a second time were not computed again: its output had been kept"
    return None


def _right_through_the_timer(arm: Arm, timer: Timer, latency_ms: float, device_kind: str) -> str | None:
    """A graph that was captured while an answer lay in a cache replays the cache."""
    if timer.name != "cuda_graph" or arm.scoped[0] is not arm.buffers[0]:
        return None
    with arm.other_values(0):
        replayed = [value.detach().clone() for value in tensors_in(timer.once(arm.call, 0))]
        called = tensors_in(arm.call(0))
        right = all(map(_close, replayed, called))
    return None if right else "the replay of its CUDA graph does not follow new values in its inputs"


def _right_on_copies(arm: Arm, timer: Timer, latency_ms: float, device_kind: str) -> str | None:
    """Only the weights themselves have been checked, and the timed calls took turns over copies of them."""
    wanted = [value.detach().clone() for value in tensors_in(arm.run(0))]
    for copy in range(1, len(arm.states)):
        found = tensors_in(arm.run(0, copy))
        if len(found) != len(wanted) or not all(map(_close, wanted, found)):
            return "on a copy of the weights its answer is another"
    return None


def _right_again(arm: Arm, timer: Timer, latency_ms: float, device_kind: str) -> str | None:
    wrong = arm.check().wrong
    return f"after it was timed: {wrong}" if wrong else None


def _keeps_its_output(arm: Arm) -> bool:
    """Whether a second output lies where the first one still is: no allocation is in its time."""
    first, second = tensors_in(arm.run(0)), tensors_in(arm.run(min(1, len(arm.buffers) - 1)))
    places = {value.untyped_storage().data_ptr() for value in first if value.numel()}
    return any(value.untyped_storage().data_ptr() in places for value in second)


def _faster_on_repeats(arm: Arm, latency_ms: float, device_kind: str) -> bool:
    """Whether values that stand still are answered faster than new ones: twice, and by the best of the new ones."""
    count = FEW if latency_ms < SLOW_MS else 1
    fresh = [_fresh_ms(arm, n, device_kind) for n in range(count)]
    if device_kind == "cpu" and not _exceeds(fresh, latency_ms):
        return False
    repeated, fresh = [], []
    for n in range(max(count, 3)):
        arm.call(0)  # what the fresh call before has put back looks new, too
        repeated.append(_host_ms(arm.call, device_kind))
        fresh.append(_fresh_ms(arm, count + n, device_kind))
    return _exceeds(fresh, median(repeated))


def _exceeds(fresh_ms: list[float], repeated_ms: float) -> bool:
    return min(fresh_ms) > REPEATS_FASTER * repeated_ms + MIN_EXCESS_MS


def _fresh_ms(arm: Arm, n: int, device_kind: str) -> float:
    """One call on values that nothing has seen: those of its first draw, scaled a little."""
    floats = [value for value in tensors_in(arm.scoped[0]) if value.is_floating_point() and value.ndim > 1]
    kept = [value.clone() for value in floats]
    with torch.no_grad():
        for value in floats:
            value.mul_(1 + (n + 1) / 128)
        taken = _host_ms(arm.call, device_kind)
        for value, before in zip(floats, kept, strict=True):
            value.copy_(before)
    return taken


def _host_ms(call: Callable[[int], Any], device_kind: str) -> float:
    _wait(device_kind)
    begin = time.perf_counter_ns()
    call(0)
    _wait(device_kind)
    return (time.perf_counter_ns() - begin) / 1e6


def _wait(device_kind: str) -> None:
    if device_kind == "cuda":
        torch.cuda.synchronize()


def _late(arm: Arm, latency_ms: float) -> bool:
    """Whether the device is still busy when the stream of the call is not: its events then enclose too little."""
    torch.cuda.synchronize()
    arm.call(0)
    torch.cuda.current_stream().synchronize()
    begin = time.perf_counter_ns()
    torch.cuda.synchronize()
    return (time.perf_counter_ns() - begin) / 1e6 > max(LATE_MS, LATE_SHARE * latency_ms)


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(_finite(one.detach()), _finite(other))


def _finite(value: Tensor) -> Tensor:
    return value.nan_to_num() if value.is_floating_point() else value


def _lost(new: Tensor, old: Tensor) -> bool:
    """Whether NaN stands where a number was."""
    return new.is_floating_point() and bool((new.detach().isnan() & ~old.isnan()).any())


def _close(one: Tensor, other: Tensor) -> bool:
    """Up to the order of additions, which may differ from call to call."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.allclose(one.float(), other.detach().float(), rtol=5e-2, atol=5e-2 * float(one.float().std() + 1e-9))
