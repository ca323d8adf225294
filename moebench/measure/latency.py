"""Latency: warm-up, timers, the interval of a median, and the rule that says when samples suffice. No torch.

`call(index)` runs the `index`-th of `draws` rotating calls (input buffers, the same for every
arm, and where the layer is small also copies of its weights), so that a call does not find
in the cache what the call before had just read.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import NamedTuple, Protocol

Call = Callable[[int], object]

CONFIDENCE = 0.95
MIN_SAMPLES = 10
SLOW_CALL_MS = 500.0  # a call slower than this may stop at MIN_SLOW_SAMPLES
MIN_SLOW_SAMPLES = 5
INTERVAL_TOLERANCE = {"cuda": 0.01, "cpu": 0.05}  # half-width of the median's interval over the median

SHORT_CALL_MS = 0.05  # below this a CPU sample is a mean of several calls: reading the clock costs about 0.1 us
SETTLED = 0.02  # relative change of the windowed median below which a warm-up is over
MIN_WARM_S = 0.05  # clocks and caches take a while: a drift below 2 % in a few short calls is no sign of rest
LOOK_AGAIN = 1.1  # a warm-up of many short calls is looked at again when it has grown by a tenth
COLD_CACHES = 2  # what rotates counts as cold from twice the last-level cache on: under LRU nothing of it is then left
TIMERS = ("auto", "cuda_graph", "cuda_events", "cuda_profiler")  # that a suite may ask for
ASKED = "the suite asks for it"


class Samples(NamedTuple):
    """One burst: milliseconds per call on the device's clock and on the host's, in the order taken."""

    device_ms: list[float]
    wall_ms: list[float]


class Warmth(NamedTuple):
    """What a warm-up saw.

    Attributes:
        first_call_ms: its very first call.
        estimate_ms: median of the last window.
        settled: whether the median had come to rest, and not only the time to its end.
        calls: how many there were.
    """

    first_call_ms: float
    estimate_ms: float
    settled: bool
    calls: int


class Timer(Protocol):
    """A way to time calls.

    Attributes:
        name: goes into every record: "cpu_wall", "cuda_graph", "cuda_profiler" or "cuda_events".
        why: why no better timer was possible, or that it was asked for; "" where this is the best.
    """

    @property
    def name(self) -> str: ...

    @property
    def why(self) -> str: ...

    def burst(self, call: Call, count: int, start: int) -> Samples:
        """`count` samples; sample k runs draw `start` + k, modulo the number of draws."""
        ...

    def once(self, call: Call, index: int) -> object:
        """One untimed call, launched as the device samples are (energy windows, profilers)."""
        ...


@dataclass(frozen=True)
class CpuTimer:
    """Host wall time. A sample of a very short call is the mean of `number` calls that go on rotating.

    The device's clock and the host's are the same here, and so are both columns.
    """

    draws: int
    number: int = 1
    name: str = "cpu_wall"
    why: str = ""

    def burst(self, call: Call, count: int, start: int) -> Samples:
        with no_collection():
            samples = [self._sample(call, start + k) for k in range(count)]
        return Samples(samples, list(samples))

    def once(self, call: Call, index: int) -> object:
        return call(index % self.draws)

    def _sample(self, call: Call, first: int) -> float:
        order = [(first + n) % self.draws for n in range(self.number)]
        begin = time.perf_counter_ns()
        for index in order:
            call(index)
        return (time.perf_counter_ns() - begin) / 1e6 / self.number


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's cyclic collector off: its pauses walk the harness's objects and are no part of the call."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def make_timer(device_kind: str, call: Call, draws: int, wanted: str = "auto") -> Timer:
    """The best timer for a warmed-up call on "cpu" or "cuda"; the choice stays fixed for all of its samples.

    Args:
        wanted: one of `TIMERS`; without meaning on a CPU, which has one clock.
    """
    if device_kind == "cuda":
        from moebench.measure import cuda

        return cuda.make_timer(call, draws, wanted)
    return CpuTimer(draws, _inner_calls(call))


def _inner_calls(call: Call) -> int:
    fastest = math.inf
    for _ in range(5):
        fastest = min(fastest, CpuTimer(1)._sample(call, 0))
        if fastest >= SHORT_CALL_MS:
            return 1
    return math.ceil(2 * SHORT_CALL_MS / max(fastest, 1e-4))


def synchronizer(device_kind: str) -> Callable[[], object]:
    """What waits for the device: nothing on a CPU."""
    if device_kind != "cuda":
        return lambda: None
    import torch

    return torch.cuda.synchronize


def warm(call: Call, draws: int, *, min_calls: int = 6, max_seconds: float = 5.0, device_kind: str = "cpu") -> Warmth:
    """Call until the running median settles, or until `max_seconds` have passed.

    Settled: the medians of the last two windows of calls differ by less than 2 %. A window holds
    whole rotations, so that draws of unequal cost do not look like a drift, and a third of all calls
    so far, so that a slow drift shows as the warm-up goes on. Nothing is settled before `min_calls`
    and 0.05 s. The time limit wins over both; a single call is never cut short.
    """
    synchronize = synchronizer(device_kind)
    window = draws * math.ceil(3 / draws)
    began = now = time.perf_counter()
    times: list[float] = []
    look_at = min_calls
    while not times or now - began < max_seconds:
        begin = time.perf_counter_ns()
        call(len(times) % draws)
        synchronize()
        times.append((time.perf_counter_ns() - begin) / 1e6)
        now = time.perf_counter()
        if len(times) >= look_at and now - began >= MIN_WARM_S:
            if _settled(times[1:], window):
                break
            look_at = max(len(times) + 1, int(len(times) * LOOK_AGAIN))
    return Warmth(times[0], median(times[1:][-window:] or times), _settled(times[1:], window), len(times))


def _settled(times: Sequence[float], window: int) -> bool:
    width = max(window, len(times) // 3 // window * window)
    if len(times) < 2 * width:
        return False
    now, before = median(times[-width:]), median(times[-2 * width : -width])
    return abs(now - before) < SETTLED * before


def run_for(timer: Timer, call: Call, seconds: float, *, device_kind: str, batch_s: float = 0.02) -> int:
    """Repeat the call back to back for at least `seconds`; returns how often it ran (at least once).

    The device is waited for once per batch of calls, so that the host's waiting leaves no idle gaps.
    """
    synchronize = synchronizer(device_kind)
    begin = now = time.perf_counter()
    done, batch = 0, 1
    while not done or now - begin < seconds:
        for index in range(done, done + batch):
            timer.once(call, index)
        synchronize()
        done += batch
        took, now = time.perf_counter() - now, time.perf_counter()
        batch = batch * 2 if took < batch_s / 2 else batch
    return done


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Distribution-free interval of the median, from order statistics.

    The number of samples below the true median is Binomial(n, 1/2), so the ranks l and n + 1 - l
    hold it with at least `confidence`. Below 6 samples no pair of ranks reaches 95 %: then
    (min, max), whose confidence is 1 - 2^(1-n). Samples are taken as independent.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("the interval of a median needs at least one sample")
    ordered = sorted(samples)
    rank = max(1, _lower_rank(len(ordered), confidence))
    return ordered[rank - 1], ordered[-rank]


@lru_cache(maxsize=4096)
def _lower_rank(n: int, confidence: float) -> int:
    from scipy.stats import binom

    return int(binom.ppf((1 - confidence) / 2, n, 0.5))


def enough(samples: Sequence[float], *, device_kind: str, min_samples: int = MIN_SAMPLES) -> bool:
    """Whether sampling may stop: enough samples (ms), and the median known well enough for this kind of device."""
    return len(samples) >= _needed(samples, min_samples) and not _wide(samples, device_kind)


def shortfall(samples: Sequence[float], *, device_kind: str, min_samples: int = MIN_SAMPLES) -> list[str]:
    """What the samples (ms) do not reach, as flags: `few_samples`, `wide_interval`."""
    flags = ["few_samples"] if len(samples) < min_samples else []
    return flags + (["wide_interval"] if _wide(samples, device_kind) else [])


def _needed(samples: Sequence[float], min_samples: int) -> int:
    slow = bool(samples) and median(samples) > SLOW_CALL_MS
    return min(min_samples, MIN_SLOW_SAMPLES) if slow else min_samples


def _wide(samples: Sequence[float], device_kind: str) -> bool:
    # Four samples or fewer always lie close by chance now and then: their range says too little to call it narrow.
    if len(samples) < MIN_SLOW_SAMPLES:
        return True
    middle = median(samples)
    low, high = median_interval(samples)
    return max(high - middle, middle - low) > INTERVAL_TOLERANCE[device_kind] * middle
