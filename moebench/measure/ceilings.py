"""Ceilings: what this machine reaches on the two things every layer is made of, GEMM and memory traffic.

Each figure is the best of medians: the median of five repetitions, and the highest over such groups
and over sizes (or operations). One lucky repetition does not make a ceiling, and a neighbour's short
burst of work does not lower it. Higher figures may exist; none is invented.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch

from moebench.measure.device import llc_bytes
from moebench.measure.gemm import DTYPES, for_right, multiply, operand
from moebench.measure.memory import available_bytes

GEMM_SIZES = {"cpu": (128, 256, 512, 1024, 2048, 4096), "cuda": (1024, 2048, 4096, 8192, 16384)}
GROUP = 5
SAMPLES = 4 * GROUP
FIRST_SAMPLES = 4  # a size is begun when its warm-up and three samples still fit
MIN_BUFFER_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
CACHES = 4  # a buffer of this many last-level caches finds next to nothing of itself in them


Thunk = Callable[[], object]
Seconds = Callable[[Thunk], float]


class Probe(NamedTuple):
    """Something to time: its work (FLOPs or bytes), and what allocates its buffers and returns the call."""

    work: float
    build: Callable[[], Thunk]


class Rate(NamedTuple):
    """Work per second, and (max - min) / median of the times behind it."""

    value: float
    spread: float


def measure_ceilings(device: str, precisions: Sequence[str], *, seconds_per_probe: float = 2.0) -> dict[str, Any]:
    """GEMM FLOP/s by precision, copy and read bandwidth of "cpu" or "cuda".

    Returns:
        {"gemm_tflops": {precision: x}, "copy_gbs": x, "read_gbs": x, "spread": {probe: x},
        "seconds": all of it took, "bytes": size of a bandwidth buffer, "reasons": {probe: why it is null}}.
        Copied bytes count twice (read and written); a cache's read-for-ownership is not counted.

    Raises:
        ValueError: a precision has no plain dense GEMM here.
    """
    begin = time.perf_counter()
    kind = torch.device(device).type
    buffer_bytes = _buffer_bytes(kind)
    probes = {
        **{f"gemm_{name}": _gemms(kind, _dtype(name)) for name in precisions},
        "copy": [_copy(kind, buffer_bytes)],
        "read": [_read(kind, buffer_bytes, torch.amax), _read(kind, buffer_bytes, torch.sum)],
    }
    rates, reasons = _run(probes, seconds_per_probe, stopwatch(kind))
    return {
        "gemm_tflops": {name: _scaled(rates[f"gemm_{name}"], 1e12) for name in precisions},
        "copy_gbs": _scaled(rates["copy"], 1e9),
        "read_gbs": _scaled(rates["read"], 1e9),
        "spread": {name: rate.spread for name, rate in rates.items() if rate},
        "seconds": time.perf_counter() - begin,
        "bytes": buffer_bytes,
        "reasons": reasons,
    }


def _run(
    probes: dict[str, list[Probe]], seconds: float, timed: Seconds
) -> tuple[dict[str, Rate | None], dict[str, str]]:
    rates: dict[str, Rate | None] = {}
    reasons = {}
    for name, candidates in probes.items():
        try:
            rates[name] = best_rate(candidates, seconds, timed)
        except (RuntimeError, MemoryError) as error:  # no kernel for this precision, or no memory
            rates[name], reasons[name] = None, str(error).splitlines()[0]
    return rates, reasons


def best_rate(
    candidates: Iterable[Probe],
    seconds: float,
    timed: Seconds,
    clock: Callable[[], float] = time.perf_counter,
) -> Rate:
    """The highest median rate over the candidates, in order, until the next would not fit in `seconds`.

    The time of a candidate is predicted from the one before it and the ratio of their work; the first is
    always tried. Over by one call at most, where a prediction was too low.
    """
    deadline = clock() + seconds
    best = Rate(0.0, 0.0)
    per_work = 0.0
    for probe in candidates:
        if per_work * probe.work * FIRST_SAMPLES > deadline - clock():
            break
        times = _sample(probe.build(), deadline, timed, clock)
        per_work = median(times) / probe.work
        best = max(best, Rate(probe.work / _best_median(times), (max(times) - min(times)) / median(times)))
    return best


def _best_median(times: list[float]) -> float:
    groups = [times[start : start + GROUP] for start in range(0, len(times), GROUP)]
    whole = [group for group in groups if len(group) == GROUP]
    return min(median(group) for group in whole or [times])


def _sample(call: Thunk, deadline: float, timed: Seconds, clock: Callable[[], float]) -> list[float]:
    first = timed(call)  # kept only where there was no time for another
    times: list[float] = []
    while len(times) < SAMPLES and clock() < deadline:
        times.append(timed(call))
    return times or [first]


def stopwatch(kind: str) -> Seconds:
    """Seconds of one call on the device's own clock."""
    if kind == "cuda":
        from moebench.measure.cuda import GRAPH_HOLD_MS, time_on_device

        return lambda call: time_on_device(lambda _: call(), [0], GRAPH_HOLD_MS)[0] / 1e3
    return _host_seconds


def _host_seconds(call: Thunk) -> float:
    begin = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begin) / 1e9


def _dtype(precision: str) -> torch.dtype:
    if precision not in DTYPES:
        raise ValueError(f"no dense GEMM ceiling for precision {precision!r}; allowed: {', '.join(DTYPES)}")
    return DTYPES[precision]


def _gemms(kind: str, dtype: torch.dtype) -> list[Probe]:
    room = available_bytes(kind) / 4
    sizes = [n for n in GEMM_SIZES[kind] if 3 * n * n * dtype.itemsize <= room]
    return [Probe(2.0 * n**3, partial(_gemm, kind, n, dtype)) for n in sizes or GEMM_SIZES[kind][:1]]


def _gemm(kind: str, n: int, dtype: torch.dtype) -> Thunk:
    random = torch.Generator(kind).manual_seed(0)  # not the global one, whose state others rely on
    a, b = (operand(n, dtype, kind, random) for _ in range(2))
    return partial(multiply, a, for_right(b)) if a.itemsize == 1 else partial(torch.mm, a, b, out=torch.empty_like(a))


def _buffer_bytes(kind: str) -> int:
    wanted = max(MIN_BUFFER_BYTES[kind], CACHES * (llc_bytes(kind) or 0))
    return max(1 << 20, min(wanted, available_bytes(kind) // 8)) // 4 * 4


def _copy(kind: str, size: int) -> Probe:
    def build() -> Thunk:
        source = torch.ones(size // 4, device=kind)
        return partial(torch.zeros_like(source).copy_, source)

    return Probe(2.0 * size, build)


def _read(kind: str, size: int, reduce: Callable[[torch.Tensor], torch.Tensor]) -> Probe:
    return Probe(1.0 * size, lambda: partial(reduce, torch.ones(size // 4, device=kind)))


def _scaled(rate: Rate | None, unit: float) -> float | None:
    return rate.value / unit if rate and math.isfinite(rate.value) else None
