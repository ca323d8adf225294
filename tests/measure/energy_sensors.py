"""Energy counters of straw, with a clock of their own: the tick, the lag and the part-time look of real sensors.

These are models of what is published of such sensors; no number here was recorded on a device.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field

from moebench.measure.energy import measure_window


@dataclass
class Sensor:
    """A counter that shows, at each tick, the joules up to `lag_s` before.

    Attributes:
        duty: the share of each period in which it looks; it takes the rest to be the same (arXiv 2312.02741).
        resets_at: when it starts from zero again.
        sticks_at: when it stops moving.
    """

    update_period_s: float = 0.1
    offset_s: float = 0.03
    lag_s: float = 0.0
    duty: float = 1.0
    resets_at: float = math.inf
    sticks_at: float = math.inf
    name: str = "sensor"
    wrap_s: float = math.inf
    max_watts: float = 5000.0
    now: float = 0.0
    _times: list[float] = field(default_factory=lambda: [-1.0, 0.0])
    _joules: list[float] = field(default_factory=lambda: [0.0, 0.0])
    _looked: list[float] = field(default_factory=lambda: [0.0])  # counted up to the start of each period

    def pass_s(self, seconds: float, watts: float) -> None:
        """Let time go by at a power."""
        self.now += seconds
        self._joules.append(self._joules[-1] + watts * seconds)
        self._times.append(self.now)

    def read_j(self) -> float:
        tick = self._tick_before(min(self.now, self.sticks_at))
        reset = self._tick_before(self.resets_at) if tick > self.resets_at else None
        return self._counted(tick - self.lag_s) - (0.0 if reset is None else self._counted(reset))

    def true_j(self, at: float) -> float:
        """What really flowed until then."""
        place = min(max(bisect_right(self._times, at), 1), len(self._times) - 1)
        (t0, t1), (e0, e1) = self._times[place - 1 : place + 1], self._joules[place - 1 : place + 1]
        return e0 + (e1 - e0) * (at - t0) / (t1 - t0) if t1 > t0 else e1

    def _tick_before(self, at: float) -> float:
        return self.offset_s + math.floor((at - self.offset_s) / self.update_period_s + 1e-9) * self.update_period_s

    def _counted(self, until: float) -> float:
        if self.duty == 1.0 or until <= 0:
            return self.true_j(max(until, 0.0))
        period = self.update_period_s
        whole = math.floor(until / period + 1e-9)
        while len(self._looked) <= whole:
            start = (len(self._looked) - 1) * period
            seen = self.true_j(start + self.duty * period) - self.true_j(start)
            self._looked.append(self._looked[-1] + seen / self.duty)
        return self._looked[whole]


@dataclass
class Bench:
    """A call of `call_s` at `busy_w` (or a function of the time), on a machine that idles at `idle_w`."""

    meter: object
    clock_of: Sensor
    call_s: float = 0.002
    busy_w: object = 300.0
    idle_w: float = 60.0
    slept: list[float] = field(default_factory=list)
    runs: list[float] = field(default_factory=list)

    def clock(self) -> float:
        return self.clock_of.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.clock_of.pass_s(seconds, self.idle_w)

    def run_for(self, seconds: float) -> int:
        self.runs.append(seconds)
        begin, done = self.clock(), 0
        while not done or self.clock() - begin < seconds:
            self._call()
            done += 1
        return done

    def _call(self) -> None:
        if not callable(self.busy_w):
            self.clock_of.pass_s(self.call_s, self.busy_w)
            return
        for part in range(4):  # of a call whose power changes inside it
            self.clock_of.pass_s(self.call_s / 4, self.busy_w(self.clock(), part))

    def window(self, busy=True, **options):
        wanted = {"window_s": 5.0, "cool_down_s": 5.0, **options}
        advance = self.run_for if busy else None
        return measure_window(self.meter, advance, sleep=self.sleep, clock=self.clock, **wanted)


def bench_of(sensor: Sensor | None = None, **options) -> Bench:
    """A bench whose meter is the sensor itself."""
    sensor = sensor or Sensor()
    return Bench(sensor, sensor, **options)
