"""CUDA timers: their logic on a fake GPU, and a few real runs where there is one."""

from statistics import median

import pytest
import torch

from moebench.measure import cuda, latency, profiler
from moebench.measure.profiler import Ran, device_work, per_call_ms
from tests.measure.fake_cuda import HOST_LAUNCH_MS, FakeCuda, FakeProfile, event

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(cuda.torch, "cuda", fake)
    monkeypatch.setattr(cuda, "_SHARED", cuda._Shared())
    monkeypatch.setattr(cuda.time, "perf_counter_ns", fake.perf_counter_ns)
    monkeypatch.setattr(profiler, "profile", FakeProfile(fake))
    return fake


@pytest.fixture
def blind(gpu, monkeypatch):
    """A GPU whose profiler sees nothing, as without the permission to read its counters."""
    monkeypatch.setattr(profiler, "profile", FakeProfile(gpu, sees=lambda name: False))
    return gpu


def waits(gpu, ran=None):
    """Two kernels of 1 ms, and between them the host reads what the first one has made, and thinks for 3 ms."""

    def call(index):
        if ran is not None:
            ran.append(gpu.current.name)
        gpu.kernel(1)
        gpu.item()
        gpu.host += 3
        gpu.kernel(1)

    return call


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
    assert {stream for _, stream in ran[:6]} == {"side 1"}
    assert ran[6:] == [(draw, "capture on side 1") for draw in (0, 1, 2)], "workspaces are made per stream, by warming"
    assert [sum(graph.kernels) for graph in timer.graphs] == pytest.approx([1, 2, 3])
    assert {graph.pool for graph in timer.graphs} == {"pool 1"}, "four draws must not cost four times the memory"


def test_arms_that_live_together_share_a_pool_and_one_that_outlives_them_all_takes_a_new_one(gpu):
    """PyTorch refuses a pool whose graphs have all died."""
    first, second = (cuda.make_timer(layer(gpu), 2) for _ in range(2))
    assert {graph.pool for timer in (first, second) for graph in timer.graphs} == {"pool 1"}
    del first
    assert {graph.pool for graph in cuda.make_timer(layer(gpu), 2).graphs} == {"pool 1"}
    del second
    assert {graph.pool for graph in cuda.make_timer(layer(gpu), 2).graphs} == {"pool 2"}


@pytest.mark.parametrize("cut_short", [False, True])
def test_what_a_failed_capture_has_begun_is_ended(gpu, monkeypatch, cut_short):
    """Once, and by PyTorch itself where CUDA has let it; the next graph takes another pool."""
    done, keeps = [], cuda.make_timer(layer(gpu), 2)

    def end(device, pool):
        if not cut_short:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        done.append(("end", device, pool))

    monkeypatch.setattr(cuda.torch._C, "_cuda_endAllocateToPool", end, raising=False)
    release = lambda device, pool: done.append(("release", device, pool))  # noqa: E731
    monkeypatch.setattr(cuda.torch._C, "_cuda_releasePool", release, raising=False)

    def call(index):
        gpu.kernel(1)
        if gpu.captured is not None:
            gpu.synchronize()

    assert cuda.make_timer(call, 2).name == "cuda_profiler"
    assert done == ([("end", 0, "pool 1"), ("release", 0, "pool 1")] if cut_short else [])
    assert {graph.pool for graph in cuda.make_timer(layer(gpu), 2).graphs} == {"pool 2"}
    assert {graph.pool for graph in keeps.graphs} == {"pool 1"}


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


def test_a_replay_gives_what_its_capture_returned_for_the_first_draw(gpu):
    """What a recheck looks at; the other draws' outputs are let go with their memory."""
    run, outputs = layer(gpu), []

    def call(index):
        run(index)
        outputs.append(f"output {len(outputs)} of draw {index}")
        return outputs[-1]

    timer = cuda.make_timer(call, 2)
    captured = outputs[-2]
    assert captured.endswith("of draw 0")
    assert [timer.once(call, index) for index in (0, 1, 2)] == [captured, None, captured]


def test_a_call_that_waits_for_the_device_is_found_before_any_capture(gpu):
    ran = []
    timer = cuda.make_timer(waits(gpu, ran), 2)
    assert timer.name == "cuda_profiler"
    assert timer.why == "no CUDA graph: called a synchronizing CUDA operation"
    assert "capture" not in ran
    assert gpu.mode == "default", "torch's sync debug mode was not put back"
    assert gpu.current.name == "default"


def test_the_profiler_timer_gives_the_kernels_time_without_the_gaps_and_the_wall_time_with_them(gpu):
    call = waits(gpu)
    samples = cuda.make_timer(call, 2).burst(call, count=3, start=1)
    assert samples.device_ms == pytest.approx([2, 2, 2])
    assert all(wall > 5 for wall in samples.wall_ms)
    by_events = cuda.CudaEventTimer(2, "test").burst(call, count=1, start=0).device_ms
    assert by_events[0] > 5, "events enclose the gap"


def test_the_profiler_timer_rotates_the_draws(gpu):
    call = layer(gpu)
    timer = latency.make_timer("cuda", call, 3, "cuda_profiler")
    assert (timer.name, timer.why) == ("cuda_profiler", "the suite asks for it")
    assert timer.burst(call, count=5, start=2).device_ms == pytest.approx([3, 1, 2, 3, 1])


def test_where_the_profiler_sees_no_kernel_events_enclose_the_call_and_both_reasons_are_given(blind):
    timer = cuda.make_timer(waits(blind), 2)
    assert timer.name == "cuda_events"
    assert timer.why == (
        "no CUDA graph: called a synchronizing CUDA operation; no kernel times from the profiler: it saw 0 of 1 calls"
    )


def test_a_call_that_runs_nothing_has_no_kernel_times(gpu):
    timer = latency.make_timer("cuda", lambda index: None, 2, "cuda_profiler")
    assert (timer.name, timer.why) == ("cuda_events", "no kernel times from the profiler: it saw no kernel in the call")


@pytest.mark.parametrize(
    ("wanted", "name", "why"),
    [
        ("auto", "cuda_graph", ""),
        ("cuda_graph", "cuda_graph", ""),
        ("cuda_profiler", "cuda_profiler", "the suite asks for it"),
        ("cuda_events", "cuda_events", "the suite asks for it"),
    ],
)
def test_the_timer_that_is_asked_for(gpu, wanted, name, why):
    timer = latency.make_timer("cuda", layer(gpu), 2, wanted)
    assert (timer.name, timer.why) == (name, why)


def test_a_graph_that_is_asked_for_and_cannot_be_had_says_so(gpu):
    timer = latency.make_timer("cuda", waits(gpu), 2, "cuda_graph")
    assert (timer.name, timer.why) == ("cuda_profiler", "no CUDA graph: called a synchronizing CUDA operation")


# What the profiler saw, as milliseconds of each call


MARK = "at::cuda::(anonymous namespace)::spin_kernel(long)"


def test_what_lies_between_two_marks_belongs_to_the_first():
    ran = [Ran(MARK, 0, 1), Ran("a", 5, 100), Ran("b", 200, 50), Ran(MARK, 300, 1), Ran("a", 310, 120)]
    assert per_call_ms(ran, 2) == pytest.approx([0.150, 0.120])
    assert per_call_ms(ran[::-1], 2) == pytest.approx([0.150, 0.120])


def test_kernels_at_the_same_time_count_one_by_one_and_gaps_do_not_count():
    ran = [Ran(MARK, 0, 1), Ran("a", 10, 100), Ran("b", 20, 100), Ran("c", 9000, 10)]
    assert per_call_ms(ran, 1) == pytest.approx([0.210])


def test_what_was_running_before_the_first_mark_is_nobodys_and_a_call_may_run_nothing():
    assert per_call_ms([Ran("late", 0, 500), Ran(MARK, 600, 1), Ran(MARK, 700, 1), Ran("a", 800, 7)], 2) == [0.0, 0.007]


@pytest.mark.parametrize("marks", [0, 1, 3])
def test_lost_marks_are_an_error_and_no_number(marks):
    with pytest.raises(RuntimeError, match=f"it saw {marks} of 2 calls"):
        per_call_ms([Ran(MARK, 10.0 * k, 1) for k in range(marks)], 2)


def test_only_work_on_the_device_counts():
    seen = [
        event("kernel", 1.0, 1.5),
        event("Memcpy DtoD", 2.0, 2.25),
        event("cudaLaunchKernel", 0.0, 1.0, device="CPU"),
        event("a library's own range", 0.0, 9.0, named=True),
    ]
    assert device_work(seen) == [Ran("kernel", 1000.0, 500.0), Ran("Memcpy DtoD", 2000.0, 250.0)]


def test_a_failed_capture_falls_back_says_why_in_one_line_and_leaves_the_stream_as_it_was(gpu):
    def call(index):
        gpu.kernel(1)
        if gpu.captured is not None:
            gpu.synchronize()

    timer = cuda.make_timer(call, 2)
    assert timer.name == "cuda_profiler"
    assert timer.why == "no CUDA graph: operation not permitted when stream is capturing"
    assert gpu.current.name == "default"
    assert gpu.log == ["empty_cache"]


def test_an_empty_graph_is_not_timed(gpu):
    gpu.empty_captures = True
    timer = cuda.make_timer(layer(gpu), 2)
    assert timer.name == "cuda_profiler"
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
    by_profiler = median(profiler.make_timer(call, 2, "test").burst(call, 20, 0).device_ms)
    assert by_graph == pytest.approx(by_events, rel=0.1)
    assert by_graph == pytest.approx(by_profiler, rel=0.1)


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
    assert timer.name in ("cuda_profiler", "cuda_events")  # the profiler needs permission to read counters
    assert timer.why
    assert len(timer.burst(waits, 5, 0).device_ms) == 5
    assert latency.make_timer("cuda", lambda index: x.add_(1), 2).name == "cuda_graph"
