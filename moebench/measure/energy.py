"""One energy window: back-to-back calls between two ticks of an energy counter.

A counter ticks (NVML: about every 100 ms) and may lag behind, so the calls already run when
the window opens, it opens and closes on a tick, and they run until it has closed: what is
counted is steady work. Board-level (NVML) or package-level (RAPL, without DRAM) joules: not
the wall socket's. What several windows say together is `moebench.measure.energy_summary`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

PATIENCE, PATIENCE_S = 5, 0.5  # ticks and seconds waited for before a counter is called stuck
LEAD_SHARE, LEAD_PERIODS = 0.1, 5  # of a window and of ticks: clocks have risen and a lagging sensor sees the calls
READS_PER_WRAP = 4

Advance = Callable[[float], int]  # repeats the call for at least so many seconds; how often it ran
Clock = Callable[[], float]


class MeterError(Exception):
    """A counter that could be read before cannot be read now; one line says why."""


class EnergyMeter(Protocol):
    """A monotonic energy counter.

    Attributes:
        name: the record's `energy_source`.
        update_period_s: how often the counter ticks.
        wrap_s: it may wrap unseen when it is not read for longer than this; infinite: it does not wrap.
        max_watts: more than this is no power, but a counter that was reset.
    """

    @property
    def name(self) -> str: ...

    @property
    def update_period_s(self) -> float: ...

    @property
    def wrap_s(self) -> float: ...

    @property
    def max_watts(self) -> float: ...

    def read_j(self) -> float:
        """Joules since some fixed moment.

        Raises:
            MeterError: the counter is gone.
        """
        ...


class Beside(Protocol):
    """What is read beside the counter while a window is open; it never raises."""

    def begin(self) -> None: ...

    def end(self) -> dict[str, Any]:
        """Fields of `Window.beside`; "watts" holds the mean power by source over its own period."""
        ...


@dataclass(frozen=True)
class Window:
    """What one window counted.

    Attributes:
        source: the meter's name.
        joules, seconds, calls: between the two ticks; no calls: it was idle.
        ticked: whether the counter moved where the window opened and where it closed.
        period_s, max_watts: the meter's.
        wrap_missed: whether the counter was left unread for so long that it may have wrapped unseen.
        jumped: whether it went back, or on faster than any power, between two readings.
        beside: "watts": {second source: mean W}; of a GPU also "temperature_c": [before, after],
            "throttle_reasons" and "other_processes".
    """

    source: str
    joules: float
    seconds: float
    calls: int
    ticked: bool
    period_s: float
    max_watts: float
    wrap_missed: bool
    jumped: bool
    beside: dict[str, Any] = field(default_factory=dict)


class _Mark(NamedTuple):
    joules: float
    at: float
    calls: int
    ticked: bool


def measure_window(
    meter: EnergyMeter,
    advance: Advance | None,
    *,
    window_s: float,
    cool_down_s: float,
    beside: Sequence[Beside] = (),
    sleep: Callable[[float], object] = time.sleep,
    clock: Clock = time.monotonic,
) -> Window:
    """Rest, lead in, and count one window.

    Args:
        advance: repeats the warmed-up call, waits for the device, and says how often it ran
            (see `moebench.measure.latency.run_for`); None: the machine is left idle.

    Raises:
        MeterError: the counter is gone.
    """

    def rest(seconds: float) -> int:
        sleep(seconds)
        return 0

    run = advance or rest
    sleep(cool_down_s)
    run(max(LEAD_SHARE * window_s, LEAD_PERIODS * meter.update_period_s))
    for each in beside:
        each.begin()
    try:
        begin = _next_tick(meter, run, clock)
        calls, gap_s, jumped = _run(meter, run, window_s, clock)
        end = _next_tick(meter, run, clock)
    finally:  # a call may raise, and nothing goes on watching then
        seen = _seen(beside)
    return Window(
        source=meter.name,
        joules=end.joules - begin.joules,
        seconds=end.at - begin.at,
        calls=calls + end.calls,
        ticked=begin.ticked and end.ticked,
        period_s=meter.update_period_s,
        max_watts=meter.max_watts,
        wrap_missed=gap_s > meter.wrap_s,
        jumped=jumped,
        beside=seen,
    )


def _seen(beside: Sequence[Beside]) -> dict[str, Any]:
    found: dict[str, Any] = {"watts": {}}
    for each in beside:
        seen = each.end()
        found["watts"] |= seen.pop("watts", {})
        found |= seen
    return found


def _run(meter: EnergyMeter, advance: Advance, seconds: float, clock: Clock) -> tuple[int, float, bool]:
    """Advance, reading a counter that wraps often enough: calls, the longest time without a reading, any jump."""
    end, calls, longest_s, jumped = clock() + seconds, 0, 0.0, False
    joules, at = meter.read_j(), clock()
    while True:
        calls += advance(min(max(end - at, 0.0), meter.wrap_s / READS_PER_WRAP))
        step, took = meter.read_j() - joules, clock() - at
        jumped |= not 0 <= step <= meter.max_watts * (took + meter.update_period_s)
        longest_s = max(longest_s, took)
        joules, at = joules + step, at + took
        if at >= end:
            return calls, longest_s, jumped


def _next_tick(meter: EnergyMeter, advance: Advance, clock: Clock) -> _Mark:
    """Advance in tenths of a period until the counter moves."""
    period = meter.update_period_s
    before, calls = meter.read_j(), 0
    deadline = clock() + max(PATIENCE * period, PATIENCE_S)
    while True:
        calls += advance(period / 10)
        joules, at = meter.read_j(), clock()
        if joules != before or at >= deadline:
            return _Mark(joules, at, calls, joules != before)
