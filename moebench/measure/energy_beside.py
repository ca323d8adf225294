"""What is read beside an energy counter while its window is open: a second source, and what the GPU went through.

Two sources of one board have been seen to disagree by far (zeus issue 181), so a number that
both give is worth more than one. Neither replaces the counter: what a second source does not
give stays null.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from moebench.measure.device import THROTTLE_BITS
from moebench.measure.nvml import ask, open_gpu

INSTANT_POWER = 186  # NVML_FI_DEV_POWER_INSTANT, which older bindings do not name; of the GPU alone, in mW
EVERY_S = 0.05  # NVML's power sensors update every 20 to 100 ms
FEWEST_READINGS = 10
LONGEST_GAP_S = 10 * EVERY_S  # a host that was busy for longer has not watched

Reading = tuple[float, float]  # seconds on any clock, watts


def mean_watts(readings: Sequence[Reading]) -> float | None:
    """Mean power between the first and the last reading, by the trapezoidal rule.

    None where there are too few readings or a gap among them is too long: nothing is filled in.
    """
    from scipy.integrate import trapezoid

    times, watts = [at for at, _ in readings], [each for _, each in readings]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    if len(readings) < FEWEST_READINGS or max(gaps) > LONGEST_GAP_S or times[-1] <= times[0]:
        return None
    return float(trapezoid(watts, times) / (times[-1] - times[0]))


class GpuWatch:
    """Instant power, reasons for lowered clocks, temperature and other processes of one GPU, read by a thread.

    The power is NVML's field "instant power": `nvmlDeviceGetPowerUsage` is the mean of the last
    second on Ampere and later.

    Args:
        handle: NVML's.
    """

    def __init__(self, handle: Any, *, clock: Callable[[], float] = time.monotonic, every_s: float = EVERY_S) -> None:
        self.handle, self._clock, self._every_s = handle, clock, every_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._readings: list[Reading] = []
        self._reasons: set[str] = set()
        self._before_c: int | None = None

    @classmethod
    def find(cls, index: int = 0) -> GpuWatch | None:
        """That of CUDA device `index`, or None."""
        handle, _ = open_gpu(index)
        return None if handle is None else cls(handle)

    def begin(self) -> None:
        """Start reading."""
        self._readings, self._reasons = [], set()
        self._before_c = _temperature_c(self.handle)
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> dict[str, Any]:
        """What was seen since `begin`; see `moebench.measure.energy.Window`."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        watts = mean_watts(self._readings)
        return {
            "watts": {} if watts is None else {"nvml_power": watts},
            "temperature_c": [self._before_c, _temperature_c(self.handle)],
            "throttle_reasons": sorted(self._reasons),
            "other_processes": _other_processes(self.handle),
        }

    def read(self) -> None:
        """One reading."""
        watts = _instant_watts(self.handle)
        if watts is not None:
            self._readings.append((self._clock(), watts))
        self._reasons |= set(_throttle_reasons(self.handle))

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.read()
            self._stop.wait(self._every_s)


def _instant_watts(handle: Any) -> float | None:
    import pynvml

    found = ask(lambda: pynvml.nvmlDeviceGetFieldValues(handle, [INSTANT_POWER])[0])
    if found is None or found.nvmlReturn != pynvml.NVML_SUCCESS:
        return None
    return float(found.value.uiVal) / 1e3


def _throttle_reasons(handle: Any) -> list[str]:
    import pynvml

    bits = ask(lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)) or 0
    return [name for bit, name in THROTTLE_BITS.items() if bits & bit]


def _temperature_c(handle: Any) -> int | None:
    import pynvml

    found: int | None = ask(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
    return found


def _other_processes(handle: Any) -> int | None:
    """How many besides this one compute on the GPU. Not told by number: in a container NVML gives those of the host."""
    import pynvml

    found = ask(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
    return None if found is None else max(0, len(found) - 1)


class ZeusWindow:
    """Zeus's monitor (extra `zeus`) over the same window: the same counters, by another's code.

    Args:
        monitor: a `zeus.monitor.ZeusMonitor` that watches something.
    """

    def __init__(self, monitor: Any) -> None:
        self.monitor = monitor

    @classmethod
    def find(cls, device_kind: str, index: int = 0) -> ZeusWindow | None:
        """Zeus's view of CUDA device `index`, or of the CPU packages; None where it is absent or sees nothing."""
        try:
            from zeus.monitor import ZeusMonitor

            gpus = [index] if device_kind == "cuda" else []
            cpus: list[int] | None = [] if device_kind == "cuda" else None
            # It could put power times time where the counter has not moved; a window that counted nothing says nothing.
            monitor = ZeusMonitor(gpu_indices=gpus, cpu_indices=cpus, approx_instant_energy=False)
        except Exception:  # noqa: BLE001 - an optional library that does not work here is one that is not here
            return None
        return cls(monitor) if monitor.gpu_indices or monitor.cpu_indices else None

    def begin(self) -> None:
        """Open Zeus's window; one that was left open is dropped."""
        try:
            self.monitor.begin_window("moebench", sync_execution=False, restart=True)
        except Exception:  # noqa: BLE001 - then `end` finds no window, and says nothing
            return

    def end(self) -> dict[str, Any]:
        """Mean power by Zeus, or nothing where its window is empty or zero."""
        try:
            found = self.monitor.end_window("moebench", sync_execution=False)
            joules = sum(found.gpu_energy.values()) + sum((found.cpu_energy or {}).values())
            watts = joules / found.time
        except Exception:  # noqa: BLE001 - the counter stands without it
            return {}
        return {"watts": {"zeus": watts}} if watts > 0 else {}
