"""CUDA timers: events on the device's clock, around graph replays where the call can be captured.

Where it cannot, the profiler's kernel times stand in (`moebench.measure.profiler`), and where those cannot be had,
events around the plain call.

Two clocks a sample. Device time: before each sample a spin kernel keeps the device busy
while the host queues the call, so that the time between the events is the device's work and
not the host's launching. Wall time: the plain call from the host, launches included, until
the device is done; it is taken the same way whatever the timer, and so stays comparable.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

from moebench.measure.latency import ASKED, Call, Samples, Timer, no_collection

if TYPE_CHECKING:
    from collections.abc import Iterator

SPIN_CYCLES_PER_MS = 2_000_000  # at or above the clock of every current GPU: a spin is never shorter than asked
GRAPH_HOLD_MS = 0.1  # queueing one replay and two events takes the host some tens of microseconds
MAX_HOLD_MS = 5.0  # a host slower than this shows up in the device time of "cuda_events"


@dataclass(frozen=True)
class CudaGraphTimer:
    """Events around replays of one CUDA graph per draw.

    Attributes:
        graphs: by draw.
        output: what the call of draw 0 returned when it was captured; its replay writes there. The other draws'
            outputs are let go, so that the graphs can share their memory.
    """

    graphs: list[torch.cuda.CUDAGraph]
    output: object = None
    name: str = "cuda_graph"
    why: str = ""

    def burst(self, call: Call, count: int, start: int) -> Samples:
        order = [(start + k) % len(self.graphs) for k in range(count)]
        with no_collection():
            device_ms = time_on_device(lambda index: self.graphs[index].replay(), order, GRAPH_HOLD_MS)
            return Samples(device_ms, time_on_host(call, order))

    def once(self, call: Call, index: int) -> object:
        self.graphs[index % len(self.graphs)].replay()
        return self.output if index % len(self.graphs) == 0 else None


@dataclass(frozen=True)
class CudaEventTimer:
    """Events around the call itself, where no graph can be captured and the profiler sees nothing.

    A call that waits for the device half-way, or takes the host longer than 5 ms to queue, has its
    gaps counted in its device time. That is what such a call costs, but it is no kernel time.
    """

    draws: int
    why: str
    name: str = "cuda_events"

    def burst(self, call: Call, count: int, start: int) -> Samples:
        order = [(start + k) % self.draws for k in range(count)]
        with no_collection():
            wall_ms = time_on_host(call, order)
            device_ms = time_on_device(call, order, min(max(wall_ms, default=0.0), MAX_HOLD_MS))
        return Samples(device_ms, wall_ms)

    def once(self, call: Call, index: int) -> object:
        return call(index % self.draws)


def time_on_device(launch: Call, order: Iterable[int], hold_ms: float) -> list[float]:
    """Milliseconds between events around each launch, the queue held back by a spin of `hold_ms` before each."""
    pairs = []
    for index in order:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(hold_ms * SPIN_CYCLES_PER_MS))
        begin.record()
        launch(index)
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]


def time_on_host(call: Call, order: Iterable[int]) -> list[float]:
    """Milliseconds from the host's call until an idle device is idle again."""
    torch.cuda.synchronize()
    return [_wall_ms(call, index) for index in order]


def _wall_ms(call: Call, index: int) -> float:
    begin = time.perf_counter_ns()
    call(index)
    torch.cuda.synchronize()
    return (time.perf_counter_ns() - begin) / 1e6


def make_timer(call: Call, draws: int, wanted: str = "auto") -> Timer:
    """The wanted timer or the next best of graph, profiler and events, which says why. `call` is warmed up.

    Args:
        wanted: one of `moebench.measure.latency.TIMERS`; "auto" is the graph.
    """
    reasons = [] if wanted in ("auto", "cuda_graph") else [ASKED]
    if not reasons:
        try:
            return CudaGraphTimer(*capture(call, draws))
        except Exception as error:  # noqa: BLE001 - whatever a provider raises under capture, its plain call still counts
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            reasons.append(f"no CUDA graph: {_line(error)}")
    if wanted != "cuda_events":
        from moebench.measure import profiler

        try:
            return profiler.make_timer(call, draws, reasons[0])
        except RuntimeError as error:
            reasons = [reason for reason in reasons if reason != ASKED]
            reasons.append(f"no kernel times from the profiler: {_line(error)}")
    return CudaEventTimer(draws, "; ".join(reasons))


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class _Shared:
    """What the graphs that live at one time are captured with: one stream, and one pool of memory.

    They never run beside each other, so what each needs while it runs they need together once: for eight arms of the
    largest layers that is 60 GB less. A pool lasts as long as one of its graphs.
    """

    def __init__(self) -> None:
        self.graphs: WeakSet[Any] = WeakSet()
        self.stream: Any = None
        self.pool: Any = None

    def ready(self) -> None:
        """A stream and a pool of today."""
        if not self.graphs:
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def leave(self) -> None:
        """Later graphs take another pool."""
        self.graphs.clear()


_SHARED = _Shared()


def capture(call: Call, draws: int) -> tuple[list[torch.cuda.CUDAGraph], object]:
    """One graph per draw, each replayed once, and the output of draw 0's; they never run together, and share memory.

    Raises:
        Exception: the call waits for the device, or cannot be captured for another reason, or
            captures to an empty graph (its work ran elsewhere and a replay would time nothing).
    """
    _SHARED.ready()
    # A capture that raises leaves torch's capture stream current (torch.cuda.graph does not unwind it).
    with torch.cuda.stream(torch.cuda.current_stream()), warnings.catch_warnings():
        warnings.filterwarnings("error", message="The CUDA Graph is empty")
        _warm_on(_SHARED.stream, call, draws)
        first, output = _capture_one(partial(call, 0))
        graphs = [first] + [_capture_one(partial(call, index))[0] for index in range(1, draws)]
        for graph in graphs:
            graph.replay()
        torch.cuda.synchronize()
    return graphs, output


def _warm_on(stream: torch.cuda.Stream, call: Call, draws: int) -> None:
    # Handles and workspaces are made per stream and must exist before capture: what is made inside one lies in
    # memory that other graphs use too. A call that waits for the device is found here, before any capture.
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for index in range(draws):
            call(index)
        with _waiting_is_an_error():
            for index in range(draws):
                call(index)
    current.wait_stream(stream)


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _capture_one(call: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=_SHARED.pool, stream=_SHARED.stream):
            output = call()
    except Exception:
        _stop_recording(_SHARED.pool)
        _SHARED.leave()
        raise
    _SHARED.graphs.add(graph)
    return graph, output


def _stop_recording(pool: Any) -> None:
    """End what a capture that CUDA cut short has begun.

    PyTorch's `capture_end` raises before it tells the allocator, which would then record for good: no cached memory
    would be freed any more when it is short, and later captures would fill the dead graph's pool.
    """
    with suppress(Exception):  # the capture had been ended in order, and so has been the recording
        device = torch.cuda.current_device()
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
