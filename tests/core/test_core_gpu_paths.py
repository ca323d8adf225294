"""What only a GPU needs of weights, draws, yardsticks and the worker, as far as a CPU can show it."""

from __future__ import annotations

import io
import json
import math
import queue
from dataclasses import asdict
from typing import Any

import pytest
import torch
from core_arms import arm_of, bench_of, layer_of

from moebench import workload
from moebench.measure.errors import errors_of
from moebench.point import Problem
from moebench.routing.logits import impose_logits
from moebench.weights import PART, make_weights, needed_bytes, normal, weight_bytes, weights_beside
from moebench.worker import Worker, serve
from moebench.workload import make_draw
from moebench.yardsticks import make_yardstick

LAYER = layer_of(experts=4, top_k=2, hidden=64, ffn=48)


# Draws


def test_hidden_states_lie_where_the_weights_do_in_their_dtype() -> None:
    """Eight arms copy each draw a dozen times: from the host, in float32, that is minutes for the largest layers."""
    x, logits = torch.randn(10, 64), torch.randn(10, 4)
    moved = workload._moved(x, make_weights(LAYER, "bf16", "cpu", 0).router.to("meta"), logits)
    assert (moved.device.type, moved.dtype, moved.shape) == ("meta", torch.bfloat16, x.shape)
    draw = make_draw(Problem("m", LAYER, 10, direction="forward_backward"), make_weights(LAYER, "bf16", "cpu", 0), 0)
    assert draw.upstream is not None
    assert draw.x.dtype == draw.upstream.dtype == torch.bfloat16
    assert make_draw(Problem("m", LAYER, 10), make_weights(LAYER, "bf16", "cpu", 0), 0).upstream is None


def test_tokens_are_moved_some_at_a_time_to_the_same_places(monkeypatch: pytest.MonkeyPatch) -> None:
    router = make_weights(LAYER, "fp32", "cpu", 0).router
    x, logits = torch.randn(11, 64), torch.randn(11, 4)
    monkeypatch.setattr(workload, "MOVED_TOKENS", 4)
    moved = workload._moved(x, router, logits)
    assert torch.allclose(moved, impose_logits(x, router, logits).float(), atol=1e-6)
    assert torch.allclose(moved @ router.T, logits, atol=1e-4)


def test_large_normal_numbers_are_drawn_on_all_threads_and_depend_on_the_seed_alone() -> None:
    first, again, other = (normal((2 * PART,), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(first.std()) == pytest.approx(1, rel=0.01)
    assert abs(float(first.mean())) < 0.01


# Weights in several precisions


def test_precisions_of_one_base_share_it() -> None:
    held: dict[Any, Any] = {}
    for precision in ("fp8:row", "bf16", "fp8:128", "fp32"):
        held[LAYER, precision, 0] = weights_beside(held, (LAYER, precision, 0), "cpu")
        alone = make_weights(LAYER, precision, "cpu", 0).tensors()
        found = held[LAYER, precision, 0].tensors()
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[name].float(), alone[name].float()) for name in alone)
    places = {precision: made.w_gate_up.data_ptr() for (_, precision, _), made in held.items()}
    assert places["bf16"] == places["fp8:row"] == places["fp8:128"] != places["fp32"]


def test_other_layers_and_seeds_share_nothing() -> None:
    held = {(LAYER, "bf16", 0): make_weights(LAYER, "bf16", "cpu", 0)}
    other = weights_beside(held, (LAYER, "fp8:row", 1), "cpu")
    assert not torch.equal(other.w_gate_up, held[LAYER, "bf16", 0].w_gate_up)


def test_what_is_shared_is_needed_once() -> None:
    bf16, fp32, fp8 = (weight_bytes(LAYER, precision) for precision in ("bf16", "fp32", "fp8:row"))
    assert needed_bytes(LAYER, ["bf16"], []) == bf16
    assert needed_bytes(LAYER, ["fp8:row"], []) == fp8 > bf16
    assert needed_bytes(LAYER, ["bf16", "fp8:row"], []) == fp8
    assert needed_bytes(LAYER, ["fp32", "bf16", "fp8:row"], []) == fp8 + fp32
    assert needed_bytes(LAYER, ["fp8:row"], [(LAYER, "bf16", 0)]) == fp8 - bf16
    assert needed_bytes(LAYER, ["bf16"], [(LAYER, "fp8:row", 0)]) == 0


# Yardsticks


@pytest.mark.parametrize("flops", [1.0, 1e5, 2.0 * 1000**3, 2.0 * 1008**3, 2.0 * 1024**3])
@pytest.mark.parametrize(("precision", "least", "step"), [("bf16", 8, 8), ("int8", 32, 16), ("fp8:row", 32, 16)])
def test_a_gemm_has_a_size_that_a_gpu_takes(flops: float, precision: str, least: int, step: int) -> None:
    """cuBLAS wants rows of 16 bytes of fp8 and int8, and more than 16 of them."""
    from moebench.measure.gemm import DTYPES
    from moebench.yardsticks import _side

    size = _side(flops, DTYPES[precision])
    assert size % step == 0
    assert size >= least
    assert flops < 1e6 or 2 * size**3 == pytest.approx(flops, rel=0.05)


def test_yardsticks_leave_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for name in ("copy", "gemm"):
        make_yardstick(name, precision="fp32", device="cpu", flops=1e5, cache_bytes=0)
    assert torch.equal(torch.get_rng_state(), before)


# The worker


def test_precisions_of_one_base_have_the_same_draws() -> None:
    """They cost seconds each for the largest layers."""
    worker, problem = Worker(), Problem("m", LAYER, 10)
    worker.open(asdict(problem), ["bf16", "fp8:row", "fp32", "int8"])
    draws = {precision: bench.draws for precision, bench in worker.benches.items()}
    assert draws["bf16"] is draws["fp8:row"] is draws["int8"]
    for precision, dtype in (("int8", torch.bfloat16), ("fp32", torch.float32)):
        alone = make_draw(problem, make_weights(LAYER, precision, "cpu", 0), 0)
        assert torch.equal(draws[precision][0].x, alone.x)
        assert torch.equal(draws[precision][0].routing.counts(), alone.routing.counts())
        assert alone.x.dtype == dtype


class Fails(Worker):
    """Its `check` raises, holding a tensor in the frame of the exception."""

    def check(self, index: int) -> dict[str, Any]:
        held = self.arms[index]
        raise RuntimeError(f"CUDA out of memory beside {type(held).__name__}")


def answers(worker: Worker, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    waiting: queue.Queue[str | None] = queue.Queue()
    for request in [*map(json.dumps, requests), None]:
        waiting.put(request)
    said = io.StringIO()
    serve(worker, waiting, said)
    return [json.loads(line) for line in said.getvalue().splitlines()]


@pytest.mark.parametrize("lost", [False, True])
def test_what_a_failed_point_holds_is_freed_at_once(monkeypatch: pytest.MonkeyPatch, lost: bool) -> None:
    """The block goes on beside it; where the device is lost the process ends anyway, and would only raise again."""
    given_back: list[int] = []
    worker = Fails()
    worker.arms = {7: make_yardstick("gemm", precision="fp32", device="cpu", flops=1e5, cache_bytes=0)}
    worker.timers = {7: object(), 8: object()}  # type: ignore[dict-item]
    monkeypatch.setattr("moebench.worker.give_back_memory", lambda: given_back.append(1))
    monkeypatch.setattr("moebench.worker.device_is_lost", lambda: lost)
    (reply,) = answers(worker, {"do": "check", "index": 7})
    assert (reply["status"], reply["fatal"]) == ("out_of_memory", lost)
    assert (list(worker.arms), list(worker.timers)) == (([7], [7, 8]) if lost else ([], [8]))
    assert given_back == ([] if lost else [1])


def test_a_failure_without_a_point_is_no_fault_of_the_worker() -> None:
    failed, closed = answers(Worker(), {"do": "open", "problem": {}, "precisions": []}, {"do": "close"})
    assert failed["status"] == "failed"
    assert closed == {}


def test_gradients_of_the_call_before_are_not_resident_when_memory_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what a call returns: freed only inside it, they would be taken off what it needs."""
    arm = arm_of("torch-loop", bench_of(LAYER, 8, direction="forward_backward"))
    arm.call(0)
    worker, kept = Worker(), []
    worker.arms = {0: arm}

    def peak(call: Any, kind: str) -> tuple[int, None]:
        kept.extend(name for name, value in arm.weights.tensors().items() if value.grad is not None)
        return 1, None

    assert arm.weights.w_down.grad is not None
    monkeypatch.setattr("moebench.worker.memory.peak_memory", peak)
    assert worker.memory(0)["peak_memory_bytes"] == 1
    assert kept == []


# Errors


@pytest.mark.parametrize("fault", [None, 2, 9, 12])
def test_errors_are_the_same_whatever_is_compared_at_a_time(monkeypatch: pytest.MonkeyPatch, fault: int | None) -> None:
    expected = torch.randn(13, 5, dtype=torch.float64)
    actual = expected.float() + 1e-3 * torch.randn(13, 5)
    if fault is not None:
        actual[fault, 4] = float("nan") if fault == 12 else 100.0
    whole = errors_of(actual, expected)
    monkeypatch.setattr("moebench.measure.errors.PART", 7)
    found = errors_of(actual.T, expected.T)
    assert found.rel == pytest.approx(whole.rel, nan_ok=True)
    assert found.max == pytest.approx(whole.max, nan_ok=True)
    assert math.isnan(found.max) == math.isnan(found.rel) == (fault == 12)
    difference = actual.double() - expected
    assert found.rel == pytest.approx(float(difference.norm() / expected.norm()), nan_ok=True)
