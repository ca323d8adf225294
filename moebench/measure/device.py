"""The machine: what it is (for the manifest) and the state it was in while a block was measured.

Flags say what was seen; no number is ever dropped or corrected for it.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from moebench.measure.nvml import ask, open_gpu

PROC = Path("/proc")
CPUS = Path("/sys/devices/system/cpu")

STEAL_LIMIT = 0.02
CROWDED = 1.1  # cores wanted over cores there are
# Bits of NVML's clock-event reasons (nvml.h) that take clock away from a busy GPU; idle, user-set and
# display clocks do not.
THROTTLE_BITS = {
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "hw_power_brake",
}
PACKAGES = ("moebench", "torch", "triton", "numpy", "scipy", "pandas", "pyarrow", "plotly", "seaborn", "transformers")


def device_name(device_kind: str) -> str:
    """The GPU's or the CPU's own name."""
    if device_kind == "cuda":
        import torch

        return torch.cuda.get_device_name(0)
    return _cpu_model()


def versions() -> dict[str, str]:
    """Python and the packages that a number may depend on, without importing them; what is absent is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine_facts(device_kind: str) -> dict[str, Any]:
    """What the machine is: processor, cores, threads, caches, memory, system; the GPU where that is the device."""
    import torch

    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(logical=True),
        "usable_cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "llc_bytes": llc_bytes("cpu"),
        "memory_bytes": psutil.virtual_memory().total,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    return facts | (_gpu_facts() if device_kind == "cuda" else {})


def _gpu_facts() -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    facts: dict[str, Any] = {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "gpu_memory_bytes": properties.total_memory,
        "gpu_l2_bytes": properties.L2_cache_size,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }
    handle, reason = open_gpu()
    return facts | ({"nvml": reason} if handle is None else _nvml_facts(handle))


def _nvml_facts(handle: Any) -> dict[str, Any]:
    import pynvml

    limit_mw = ask(lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle))
    return {
        "driver": ask(pynvml.nvmlSystemGetDriverVersion),
        "power_limit_w": None if limit_mw is None else limit_mw / 1e3,
        "max_sm_mhz": ask(lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        "max_memory_mhz": ask(lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
    }


def _cpu_model(proc: Path = PROC) -> str:
    try:
        lines = (proc / "cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return " ".join((names or [platform.processor() or platform.machine() or "unknown CPU"])[0].split())


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def llc_bytes(device_kind: str, *, cpus: Path = CPUS) -> int | None:
    """Bytes of last-level cache within reach: the GPU's L2, or the highest CPU level summed over its instances."""
    if device_kind == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    instances = {}
    for core in _usable_core_ids():
        for index in (cpus / f"cpu{core}" / "cache").glob("index*"):
            try:
                level, size, shared = (_text(index / name) for name in ("level", "size", "shared_cpu_list"))
                instances[int(level), shared] = int(size.removesuffix("K")) << 10
            except (OSError, ValueError):
                continue
    last = max((level for level, _ in instances), default=0)
    return sum(size for (level, _), size in instances.items() if level == last) or None


def _usable_core_ids() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _text(path: Path) -> str:
    return path.read_text().strip()


class _Ticks(NamedTuple):
    """Seconds of all cores together since boot, and of this process."""

    total: float
    busy: float
    steal: float
    own: float


class StateProbe:
    """The machine's state over a block: `begin()`, any number of `sample()`s while it is busy, `end()`."""

    def __init__(self, device_kind: str, *, threads: int | None = None, proc: Path = PROC, cpus: Path = CPUS) -> None:
        """`threads`: how many cores the measured work wants; by default torch's threads, or 1 that feeds a GPU."""
        self.device_kind = device_kind
        self.threads = threads or _torch_threads(device_kind)
        self.proc, self.cpus = proc, cpus
        opened: tuple[Any, str | None] = open_gpu() if device_kind == "cuda" else (None, None)
        self.gpu, self.gpu_reason = opened

    def begin(self) -> None:
        self._ticks = _read_ticks(self.proc)
        self._began = time.perf_counter()
        self._readings: list[dict[str, Any]] = []
        self.sample()

    def sample(self, arm: int | None = None) -> None:
        """Read clocks, temperature, power and throttle reasons now, just after an arm's work or nobody's.

        These are states, not counters. Of a GPU's arm the GPU's alone: a server's cores are hundreds of files, which
        take longer to read than a burst.
        """
        reading: dict[str, Any] = {"arm": arm}
        if arm is None or self.device_kind != "cuda":
            reading["cpu_mhz"] = _cpu_mhz(self.proc, self.cpus)
        self._readings.append(reading | (_gpu_reading(self.gpu) if self.gpu is not None else {}))

    def end(self) -> dict[str, Any]:
        """What was seen since `begin`; null where the system does not tell.

        cpu_mhz, sm_mhz, memory_mhz: lowest of the samples; temperature_c, power_w: highest; throttle_reasons: all that
        occurred; load1: the load average; steal_share: of all core time, taken by the hypervisor;
        other_cores: cores kept busy by other processes; wanted_cores: those and our threads.
        """
        self.sample()
        state: dict[str, Any] = {
            "seconds": time.perf_counter() - self._began,
            "cores": os.cpu_count() or 1,
            "threads": self.threads,
            "load1": os.getloadavg()[0],
            "cpu_mhz": _extreme(min, self._readings, "cpu_mhz"),
            **_shares(self._ticks, _read_ticks(self.proc), os.cpu_count() or 1, self.threads),
        }
        if self.device_kind == "cuda":
            state |= {"nvml": self.gpu_reason} if self.gpu is None else _gpu_state(self._readings)
        return state

    def arm_states(self) -> dict[int, dict[str, Any]]:
        """The GPU after each arm's own bursts, by arm, as in `end`; nothing where there is none to read."""
        arms = {reading["arm"] for reading in self._readings} - {None} if self.gpu is not None else set()
        return {arm: _gpu_state([each for each in self._readings if each["arm"] == arm]) for arm in sorted(arms)}


def _gpu_state(readings: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "sm_mhz": _extreme(min, readings, "sm_mhz"),
        "memory_mhz": _extreme(min, readings, "memory_mhz"),
        "temperature_c": _extreme(max, readings, "temperature_c"),
        "power_w": _extreme(max, readings, "power_w"),
        "throttle_reasons": sorted(set().union(*(reading["throttle_reasons"] for reading in readings))),
    }


def contended(state: dict[str, Any]) -> list[str]:
    """The flag `contended` where others took the cores or the hypervisor took time."""
    stolen = (state.get("steal_share") or 0.0) > STEAL_LIMIT
    crowded = (state.get("wanted_cores") or 0.0) > CROWDED * state["cores"]
    return ["contended"] if stolen or crowded else []


def throttled(state: dict[str, Any]) -> list[str]:
    """A flag `throttled:REASON` for each reason that the GPU gave."""
    return [f"throttled:{reason}" for reason in state.get("throttle_reasons", [])]


def _torch_threads(device_kind: str) -> int:
    if device_kind == "cuda":
        return 1
    import torch

    return torch.get_num_threads()


def _read_ticks(proc: Path) -> _Ticks | None:
    try:
        fields = (proc / "stat").read_text().splitlines()[0].split()[1:9]
    except (OSError, IndexError):
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = (int(field) / os.sysconf("SC_CLK_TCK") for field in fields)
    busy = user + nice + system + irq + softirq
    return _Ticks(busy + idle + iowait + steal, busy, steal, time.process_time())


def _shares(before: _Ticks | None, after: _Ticks | None, cores: int, threads: int) -> dict[str, float | None]:
    if before is None or after is None or after.total <= before.total:
        return {"steal_share": None, "other_cores": None, "wanted_cores": None}
    total, busy, steal, own = (new - old for new, old in zip(after, before, strict=True))
    # Not the load average: it looks back a minute and counts our own threads.
    others = max(0.0, busy - own) / total * cores
    return {"steal_share": steal / total, "other_cores": others, "wanted_cores": others + threads}


def _cpu_mhz(proc: Path, cpus: Path) -> float | None:
    """Mean over the cores, from cpufreq or, where there is none (virtual machines), /proc/cpuinfo."""
    try:
        speeds = [float(_text(path)) / 1e3 for path in cpus.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
        if not speeds:
            lines = (proc / "cpuinfo").read_text().splitlines()
            speeds = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    except (OSError, ValueError):
        return None
    return sum(speeds) / len(speeds) if speeds else None


def _gpu_reading(handle: Any) -> dict[str, Any]:
    import pynvml

    power_mw = ask(lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
    bits = ask(lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)) or 0
    return {
        "sm_mhz": ask(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        "memory_mhz": ask(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
        "temperature_c": ask(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
        "power_w": None if power_mw is None else power_mw / 1e3,
        "throttle_reasons": [name for bit, name in THROTTLE_BITS.items() if bits & bit],
    }


def _extreme(pick: Callable[[list[float]], float], readings: list[dict[str, Any]], key: str) -> float | None:
    known = [reading[key] for reading in readings if reading.get(key) is not None]
    return pick(known) if known else None
