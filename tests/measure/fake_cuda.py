"""A GPU made of two clocks: kernels queue up on one stream, the host launches them and may wait."""

from contextlib import contextmanager
from types import SimpleNamespace

HOST_LAUNCH_MS = 0.01
CYCLES_PER_MS = 2_000_000


class FakeCuda:
    """Stands in for `torch.cuda`, as far as the timers use it. Times in ms.

    `host` and `device` are the clocks; a kernel starts when it is launched or when the one before it
    ends, whichever is later. While a graph is captured, kernels are recorded instead, and waiting
    raises, as CUDA does.
    """

    def __init__(self):
        self.host = self.device = 0.0
        self.captured = None
        self.mode = "default"
        self.current = SimpleNamespace(name="default", wait_stream=lambda other: None)
        self.log = []
        self.ran = []  # (name, start, end)
        self.empty_captures = False
        self.streams = self.pools = 0

    def kernel(self, ms):
        self.host += HOST_LAUNCH_MS
        if self.captured is not None:
            if not self.empty_captures:
                self.captured.append(ms)
        else:
            self._run("kernel", ms)

    def item(self):
        """What `.item()` does: wait for the device."""
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        self.synchronize()

    def synchronize(self):
        if self.captured is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")
        self.host = max(self.host, self.device)

    def perf_counter_ns(self):
        return round(self.host * 1e6)

    def _sleep(self, cycles):
        self._run("at::cuda::spin_kernel(long)", cycles / CYCLES_PER_MS)

    def _run(self, name, ms):
        begin = max(self.device, self.host)
        self.device = begin + ms
        self.ran.append((name, begin, self.device))

    def Event(self, enable_timing):  # noqa: N802
        return FakeEvent(self)

    def Stream(self):  # noqa: N802
        self.streams += 1
        return SimpleNamespace(name=f"side {self.streams}", wait_stream=lambda other: None)

    def current_stream(self):
        return self.current

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    def graph_pool_handle(self):
        self.pools += 1
        return f"pool {self.pools}"

    def CUDAGraph(self):  # noqa: N802
        return FakeGraph(self)

    @contextmanager
    def graph(self, graph, pool, stream):
        import warnings

        graph.pool = pool
        self.current = SimpleNamespace(name=f"capture on {stream.name}")  # like torch, not put back when it raises
        self.captured = graph.kernels
        try:
            yield
        finally:
            self.captured = None
        if not graph.kernels:
            warnings.warn("The CUDA Graph is empty. Was it captured on the wrong stream?", UserWarning, stacklevel=2)

    def current_device(self):
        return 0

    def empty_cache(self):
        self.log.append("empty_cache")


class FakeProfile:
    """Stands in for `torch.profiler.profile`: what ran on the fake GPU meanwhile, in no order."""

    def __init__(self, cuda, sees=lambda name: True):
        self.cuda, self.sees = cuda, sees

    def __call__(self, activities):
        return self

    def __enter__(self):
        self.first = len(self.cuda.ran)
        return self

    def __exit__(self, *_):
        self.seen = self.cuda.ran[self.first :]

    def events(self):
        made = [event(name, begin, end) for name, begin, end in reversed(self.seen) if self.sees(name)]
        return [*made, event("cudaLaunchKernel", 0.0, 1.0, device="CPU")]


def event(name, begin_ms, end_ms, device="CUDA", named=False):
    """One of the profiler's, which counts in microseconds."""
    span = SimpleNamespace(start=begin_ms * 1e3, end=end_ms * 1e3)
    kind = SimpleNamespace(name=device)
    return SimpleNamespace(name=name, device_type=kind, time_range=span, is_user_annotation=named)


class FakeEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        # An event happens when the device reaches it, and not before the host has asked for it.
        self.at = self.cuda.device = max(self.cuda.device, self.cuda.host)

    def elapsed_time(self, end):
        return end.at - self.at


class FakeGraph:
    def __init__(self, cuda):
        self.cuda, self.kernels, self.replays = cuda, [], 0

    def replay(self):
        self.replays += 1
        self.cuda.host += HOST_LAUNCH_MS
        self.cuda.device = max(self.cuda.device, self.cuda.host) + sum(self.kernels)
