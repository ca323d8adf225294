"""Energy of a call: windows of back-to-back calls between two ticks of an energy counter.

A counter ticks (NVML: about every 100 ms), so a window is opened and closed on a tick, with the
calls running at both ends: what is counted is steady work, and the error is one short burst of
calls. Board-level (NVML) or package-level (RAPL, without DRAM) joules: not the wall socket's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Protocol

from moebench.measure.nvml import ask, open_gpu

POWERCAP = Path("/sys/class/powercap")

MIN_PERIODS = 50  # shorter than this many ticks, one tick is over 2 % of the window
PATIENCE = 5  # ticks waited for before a counter is called stuck
NOISY_SPREAD = 0.10

RunFor = Callable[[float], int]
Clock = Callable[[], float]


class EnergyMeter(Protocol):
    """A monotonic energy counter.

    Attributes:
        name: the record's `energy_source`.
        update_period_s: how often the counter ticks.
    """

    @property
    def name(self) -> str: ...

    @property
    def update_period_s(self) -> float: ...

    def read_j(self) -> float:
        """Joules since some fixed moment."""
        ...


@dataclass(frozen=True)
class Energy:
    """Medians over the trials; null where the counter gave nothing.

    Attributes:
        gross_j_per_call: all joules of the window over its calls.
        net_j_per_call: the same less idle power times the window; below zero means noise, and is flagged.
        idle_w: idle power with the context and its tensors alive.
        spread: (max - min) / median of the trials' gross values.
        source: the meter's name.
        flags: `energy_window_short`, `energy_counter_stuck`, `energy_noisy`, `energy_below_idle`.
    """

    gross_j_per_call: float | None
    net_j_per_call: float | None
    idle_w: float | None
    spread: float | None
    source: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class NvmlMeter:
    """NVML's total-energy counter of one GPU board (Volta and later)."""

    handle: Any
    name: str = "nvml"
    update_period_s: float = 0.1

    @classmethod
    def find(cls, index: int = 0) -> tuple[NvmlMeter | None, str | None]:
        """The meter of CUDA device `index`, or the reason why there is none."""
        handle, reason = open_gpu(index)
        if handle is None:
            return None, reason
        meter = cls(handle)
        if ask(meter.read_j) is None:
            return None, "NVML: this GPU has no total-energy counter (before Volta, or a MIG slice)"
        return meter, None

    def read_j(self) -> float:
        import pynvml

        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1e3


@dataclass
class RaplMeter:
    """Sum of the CPU packages' RAPL counters; each wraps at `max_energy_range_uj`, which is undone here."""

    packages: list[Path]
    name: str = "rapl"
    update_period_s: float = 0.001
    _last_uj: list[int] = field(init=False)
    _total_uj: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._ranges_uj = [_number(package / "max_energy_range_uj") for package in self.packages]
        self._last_uj = self._read_uj()

    @classmethod
    def find(cls, powercap: Path = POWERCAP) -> tuple[RaplMeter | None, str | None]:
        """The meter of this machine's packages, or the reason why there is none."""
        domains = sorted(powercap.glob("intel-rapl:*"))  # AMD's driver uses the same name
        try:
            packages = [each for each in domains if (each / "name").read_text().startswith("package")]
            if not packages:
                return None, f"no RAPL package counter under {powercap}"
            return cls(packages), None
        except PermissionError:
            return None, "RAPL counters are readable by root only here (CVE-2020-8694)"
        except (OSError, ValueError) as error:
            return None, f"RAPL counters cannot be read ({error})"

    def read_j(self) -> float:
        now = self._read_uj()
        for last, new, span in zip(self._last_uj, now, self._ranges_uj, strict=True):
            self._total_uj += new - last if new >= last else new - last + span
        self._last_uj = now
        return self._total_uj / 1e6

    def _read_uj(self) -> list[int]:
        return [_number(package / "energy_uj") for package in self.packages]


def _number(path: Path) -> int:
    return int(path.read_text())


def find_meter(device_kind: str, *, index: int = 0, powercap: Path = POWERCAP) -> tuple[EnergyMeter | None, str | None]:
    """(the meter of "cuda" or "cpu", None), or (None, the reason): then energy is null and its source "none"."""
    return NvmlMeter.find(index) if device_kind == "cuda" else RaplMeter.find(powercap)


class _Mark(NamedTuple):
    joules: float
    at: float


class _Window(NamedTuple):
    joules: float
    seconds: float
    calls: int
    ticked: bool


def measure_energy(
    meter: EnergyMeter,
    run_for: RunFor,
    *,
    window_s: float = 5.0,
    trials: int = 3,
    cool_down_s: float = 5.0,
    sleep: Callable[[float], object] = time.sleep,
    clock: Clock = time.monotonic,
) -> Energy:
    """Joules of one call: one idle window, then `trials` busy ones, a cool-down before each.

    Args:
        run_for: repeats the warmed-up call for at least so many seconds, waits for the device,
            and returns how often it ran (see `moebench.measure.latency.run_for`).
    """

    def rest(seconds: float) -> int:
        sleep(seconds)
        return 0

    sleep(cool_down_s)
    idle = _window(meter, rest, window_s, clock)
    busy = []
    for _ in range(trials):
        sleep(cool_down_s)
        busy.append(_window(meter, run_for, window_s, clock))
    return _summary(meter, idle, busy)


def _window(meter: EnergyMeter, advance: RunFor, seconds: float, clock: Clock) -> _Window:
    begin, _, ticked = _next_tick(meter, advance, clock)
    calls = advance(seconds)
    end, more, ticked_again = _next_tick(meter, advance, clock)
    return _Window(end.joules - begin.joules, end.at - begin.at, calls + more, ticked and ticked_again)


def _next_tick(meter: EnergyMeter, advance: RunFor, clock: Clock) -> tuple[_Mark, int, bool]:
    """Advance in tenths of a period until the counter moves; (where, the calls it took, whether it moved)."""
    period = meter.update_period_s
    before, calls = meter.read_j(), 0
    deadline = clock() + PATIENCE * period
    while True:
        calls += advance(period / 10)
        mark = _Mark(meter.read_j(), clock())
        if mark.joules != before or mark.at >= deadline:
            return mark, calls, mark.joules != before


def _summary(meter: EnergyMeter, idle: _Window, busy: list[_Window]) -> Energy:
    flags = []
    if any(window.seconds < MIN_PERIODS * meter.update_period_s for window in busy):
        flags.append("energy_window_short")
    if not all(window.ticked for window in (idle, *busy)):
        return Energy(None, None, None, None, meter.name, (*flags, "energy_counter_stuck"))
    idle_w = idle.joules / idle.seconds
    gross = [window.joules / window.calls for window in busy]
    net = median((window.joules - idle_w * window.seconds) / window.calls for window in busy)
    spread = (max(gross) - min(gross)) / median(gross)
    if spread > NOISY_SPREAD:
        flags.append("energy_noisy")
    if net < 0:
        flags.append("energy_below_idle")
    return Energy(median(gross), net, idle_w, spread, meter.name, tuple(flags))
