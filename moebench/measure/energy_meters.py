"""Energy counters: NVML's of a GPU board, RAPL's of the CPU packages; and what is read beside them.

Without a counter there is a reason and no number: nothing here guesses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moebench.measure.energy import Advance, Beside, EnergyMeter, MeterError, measure_window
from moebench.measure.energy_beside import GpuWatch, ZeusWindow
from moebench.measure.nvml import ask, open_gpu

POWERCAP = Path("/sys/class/powercap")
# No board and no package draws as much; what seems to has been reset, or has wrapped.
MAX_BOARD_WATTS, MAX_PACKAGE_WATTS = 5000.0, 2000.0


@dataclass(frozen=True)
class NvmlMeter:
    """NVML's total-energy counter of one GPU board (Volta and later)."""

    handle: Any
    name: str = "nvml"
    update_period_s: float = 0.1
    wrap_s: float = math.inf
    max_watts: float = MAX_BOARD_WATTS

    @classmethod
    def find(cls, index: int = 0) -> tuple[NvmlMeter | None, str | None]:
        """The meter of CUDA device `index`, or the reason why there is none."""
        handle, reason = open_gpu(index)
        if handle is None:
            return None, reason
        meter = cls(handle)
        try:
            meter.read_j()
        except MeterError:
            return None, "NVML: this GPU has no total-energy counter (before Volta, or a MIG slice)"
        return meter, None

    def read_j(self) -> float:
        import pynvml

        millijoules = ask(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle))
        if millijoules is None:
            raise MeterError("NVML: the total-energy counter cannot be read")
        return float(millijoules) / 1e3


@dataclass
class RaplMeter:
    """Sum of the CPU packages' RAPL counters; each wraps at `max_energy_range_uj`, which is undone here.

    A wrap is seen as a step back, and two of them look like one: who measures has to read once in `wrap_s` at least.
    """

    packages: list[Path]
    name: str = "rapl"
    update_period_s: float = 0.001
    wrap_s: float = field(init=False)
    max_watts: float = field(init=False)
    _last_uj: list[int] = field(init=False)
    _total_uj: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._ranges_uj = [_number(package / "max_energy_range_uj") for package in self.packages]
        self.wrap_s = min(self._ranges_uj) / 1e6 / MAX_PACKAGE_WATTS
        self.max_watts = MAX_PACKAGE_WATTS * len(self.packages)
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
        try:
            now = self._read_uj()
        except (OSError, ValueError) as error:
            raise MeterError(f"RAPL counters cannot be read ({error})") from None
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


@dataclass(frozen=True)
class Meters:
    """The counter of this process, or the reason why there is none, and what is read beside it."""

    counter: EnergyMeter | None
    reason: str | None
    beside: Sequence[Beside] = ()

    def window(self, advance: Advance | None, window_s: float, cool_down_s: float) -> dict[str, Any]:
        """One `moebench.measure.energy.Window` as JSON-ready data; or its "source" and the "reason" for no number."""
        if self.counter is None:
            return {"source": "none", "reason": self.reason}
        beside = self.beside if advance else ()
        try:
            found = measure_window(self.counter, advance, window_s=window_s, cool_down_s=cool_down_s, beside=beside)
        except MeterError as error:
            return {"source": self.counter.name, "reason": str(error)}
        return asdict(found)


def open_meters(device_kind: str) -> Meters:
    """All that measures the energy of "cuda" or "cpu" here."""
    counter, reason = find_meter(device_kind)
    if counter is None:
        return Meters(None, reason)
    found: list[Beside | None] = [GpuWatch.find() if device_kind == "cuda" else None, ZeusWindow.find(device_kind)]
    return Meters(counter, None, [each for each in found if each is not None])
