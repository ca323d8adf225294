"""CUDA timers: their logic on a fake GPU, and a few real runs where there is one."""

from statistics import median

import pytest
import torch

from moebench.measure import cuda, latency
from tests.measure.fake_cuda import HOST_LAUNCH_MS, FakeCuda

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(cuda.torch, "cuda", fake)
    monkeypatch.setattr(cuda.time, "perf_counter_ns", fake.perf_counter_ns)
    return fake


def layer(gpu, ran=None, kernels=5):
    """Five kernels, together 1 ms for draw 0, 2 ms for draw 1, ..."""

    def call(index):
        if ran is not None:
            ran.append((index, gpu.current.name))
        for _ in range(kernels):
            gpu.kernel((1 + index) / kernels)

    return call


def test_each_draw_is_captured_once_after_warming_on_a_side_stream(gpu):
    ran = []
    timer = latency.make_timer("cuda", layer(gpu, ran), 3)
    assert (timer.name, timer.why) == ("cuda_graph", "")
    assert {stream for _, stream in ran[:6]} == {"side"}
    assert ran[6:] == [(0, "capture"), (1, "capture"), (2, "capture")]
    assert [sum(graph.kernels) for graph in timer.graphs] == pytest.approx([1, 2, 3])
    assert {graph.pool for graph in timer.graphs} == {"pool"}, "four draws must not cost four times the memory"


def test_the_graph_timer_gives_the_devices_time_and_the_plain_calls_wall_time(gpu):
    call = layer(gpu, kernels=200)  # 200 launches of 10 us: the host is slower than the device for draw 0
    samples = cuda.make_timer(call, 2).burst(call, count=4, start=1)
    assert samples.device_ms == pytest.approx([2, 1, 2, 1])
    launches = 200 * HOST_LAUNCH_MS
    assert all(launches <= wall <= launches + 1.2 for wall in samples.wall_ms)


def test_replays_do_not_run_the_call(gpu):
    ran = []
    call = layer(gpu, ran)
    timer = cuda.make_timer(call, 2)
    ran.clear()
    timer.once(call, 3)
    assert ran == []
    assert [graph.replays for graph in timer.graphs] == [1, 2]


def test_a_call_that_waits_for_the_device_is_found_before_any_capture(gpu):
    ran = []

    def call(index):
        ran.append(gpu.current.name)
        gpu.kernel(1)
        gpu.item()
        gpu.kernel(1)

    timer = cuda.make_timer(call, 2)
    assert timer.name == "cuda_events"
    assert timer.why == "no CUDA graph: called a synchronizing CUDA operation"
    assert "capture" not in ran
    assert gpu.mode == "default", "torch's sync debug mode was not put back"
    assert gpu.current.name == "default"


def test_a_failed_capture_falls_back_says_why_in_one_line_and_leaves_the_stream_as_it_was(gpu):
    def call(index):
        gpu.kernel(1)
        if gpu.captured is not None:
            gpu.synchronize()

    timer = cuda.make_timer(call, 2)
    assert timer.name == "cuda_events"
    assert timer.why == "no CUDA graph: operation not permitted when stream is capturing"
    assert gpu.current.name == "default"
    assert gpu.log == ["empty_cache"]


def test_an_empty_graph_is_not_timed(gpu):
    gpu.empty_captures = True
    timer = cuda.make_timer(layer(gpu), 2)
    assert timer.name == "cuda_events"
    assert "empty" in timer.why


def test_the_event_timer_counts_the_devices_work_and_not_the_launches(gpu):
    call = layer(gpu, kernels=100)  # 1 ms of launches for 1 ms of work
    samples = cuda.CudaEventTimer(2, "test").burst(call, count=4, start=1)
    assert samples.device_ms == pytest.approx([2, 1, 2, 1])
    assert all(wall >= 1.0 for wall in samples.wall_ms)


def test_a_host_too_slow_to_hide_shows_in_the_event_timer(gpu):
    call = layer(gpu, kernels=1000)  # 10 ms of launches for 1 ms of work, 5 ms of which can be hidden
    (device_ms,) = cuda.CudaEventTimer(1, "test").burst(call, 1, 0).device_ms
    assert device_ms > 4


def test_run_for_repeats_the_graph(gpu, monkeypatch):
    call = layer(gpu)
    timer = cuda.make_timer(call, 2)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: gpu.host / 1e3)
    before = sum(graph.replays for graph in timer.graphs)
    done = latency.run_for(timer, call, 0.1, device_kind="cuda")
    assert done == sum(graph.replays for graph in timer.graphs) - before
    assert 100 <= done * 1.5 < 200


@pytest.mark.gpu
@needs_gpu
def test_real_graph_and_event_timers_agree_on_a_large_gemm():
    a = [torch.randn(4096, 4096, device="cuda") for _ in range(2)]

    def call(index):
        return a[index] @ a[index]

    latency.warm(call, 2, device_kind="cuda")
    graph = latency.make_timer("cuda", call, 2)
    assert graph.name == "cuda_graph", graph.why
    by_graph = median(graph.burst(call, 20, 0).device_ms)
    by_events = median(cuda.CudaEventTimer(2, "test").burst(call, 20, 0).device_ms)
    assert by_graph == pytest.approx(by_events, rel=0.1)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("how", ["item", "pinned"])
def test_a_real_call_that_cannot_be_captured_falls_back_and_the_next_one_is_captured(how):
    x = torch.ones(1 << 20, device="cuda")

    def waits(index):
        if how == "item":
            return x.sum().item()
        torch.cuda.synchronize()  # not seen by the sync debug mode: fails inside the capture
        return x.sum()

    timer = latency.make_timer("cuda", waits, 2)
    assert timer.name == "cuda_events"
    assert timer.why
    assert len(timer.burst(waits, 5, 0).device_ms) == 5
    assert latency.make_timer("cuda", lambda index: x.add_(1), 2).name == "cuda_graph"
