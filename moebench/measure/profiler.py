"""CUDA timer: the profiler's kernel times, for calls that no graph can hold.

A sample is the sum of what one call ran on the device: kernels, copies and fills. The gaps between them, in which
the device waits for the host, do not count; kernels that run at the same time, on several streams, count one by one.
So a call that waits for the host half-way reads as its work, and one that overlaps its kernels reads as more than
its device time.

A short spin kernel marks where each call begins, and the device is waited for before the next, so that what lies
between two marks belongs to one call, on whatever stream it ran.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from moebench.measure.cuda import time_on_host
from moebench.measure.latency import Call, Samples, no_collection

MARK = "spin_kernel"  # what torch.cuda._sleep launches (ATen/native/cuda/Sleep.cu)
MARK_CYCLES = 1000


class Ran(NamedTuple):
    """Something the device did.

    Attributes:
        start_us, duration_us: on the profiler's clock.
    """

    name: str
    start_us: float
    duration_us: float


@dataclass(frozen=True)
class CudaProfilerTimer:
    """Sums of kernel times, one call a sample."""

    draws: int
    why: str
    name: str = "cuda_profiler"

    def burst(self, call: Call, count: int, start: int) -> Samples:
        order = [(start + k) % self.draws for k in range(count)]
        with no_collection():
            wall_ms = time_on_host(call, order)
            return Samples(kernel_times(call, order), wall_ms)

    def once(self, call: Call, index: int) -> object:
        return call(index % self.draws)


def make_timer(call: Call, draws: int, why: str) -> CudaProfilerTimer:
    """A profiler timer, once it has been seen to find the kernels of the first call. `call` is warmed up.

    Raises:
        RuntimeError: it finds none (no permission to read the device's counters, or the call runs nothing there).
    """
    (found,) = kernel_times(call, [0])
    if not found:
        raise RuntimeError("it saw no kernel in the call")
    return CudaProfilerTimer(draws, why)


def kernel_times(call: Call, order: Iterable[int]) -> list[float]:
    """Milliseconds of device work of each call in `order`.

    Raises:
        RuntimeError: the profiler did not see the marks.
    """
    every = list(order)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for index in every:
            torch.cuda._sleep(MARK_CYCLES)
            call(index)
            torch.cuda.synchronize()
    return per_call_ms(device_work(seen.events()), len(every))


def device_work(events: Iterable[Any]) -> list[Ran]:
    """What ran on the device, of the profiler's events; ranges that a library names are no work."""
    return [
        Ran(event.name, float(event.time_range.start), float(event.time_range.end - event.time_range.start))
        for event in events
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
    ]


def per_call_ms(ran: Sequence[Ran], calls: int) -> list[float]:
    """Milliseconds between the marks of `calls` calls: durations of the same call are added up.

    Raises:
        RuntimeError: there are not as many marks as calls.
    """
    sums: list[float] = []
    for each in sorted(ran, key=lambda each: each.start_us):
        if MARK in each.name:
            sums.append(0.0)
        elif sums:  # what was still running before the first mark is nobody's
            sums[-1] += each.duration_us / 1e3
    if len(sums) != calls:
        raise RuntimeError(f"it saw {len(sums)} of {calls} calls")
    return sums
