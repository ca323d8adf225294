"""A whole tuning in the interpreter: real kernels, real checks, times that mean nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from moebench.tune import run
from moebench.tune.case import cases, layers_of
from moebench.tune.product import Product, product_of
from moebench.tune.thin import Field, thin
from moebench.tune.worker import Worker
from moebench_kernels import grouped_gemm_torch, permute_torch, ragged_gemm_torch
from moebench_kernels.activation import activate_torch
from moebench_kernels.ragged_tiles import RaggedConfig
from moebench_kernels.tiles import GemmConfig
from moebench_kernels.tuned_tiles import load_tuned

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="tuning races on the GPU here"),
]


def test_it_checks_races_writes_and_resumes(tmp_path: Path) -> None:
    every = cases(layers_of([], ["3,32,64,2"]), [5], ["fp32"])
    seen: list[str] = []
    progress = run.Progress(done=lambda case, result: seen.append(f"{case.map} {len(result.runners)}"))
    path = tmp_path / "t.json"
    run.tune(every[:1], path, keep=3, progress=progress, interpreter=True, max_rounds=1)
    run.tune(every, path, keep=3, resume=True, progress=progress, interpreter=True, max_rounds=1)
    assert seen == ["up 3", "down 3"]
    content = json.loads(path.read_text())
    assert content["failed"] == []
    assert [entry["kind"] for entry in content["entries"]] == ["gated_gather", "rows"]
    assert all(entry["median_ms"] > 0 for entry in content["entries"])
    assert load_tuned(path).nearest("rows", torch.float32, every[1].block_m, 32, 64) is not None


def test_the_weight_gradients(tmp_path: Path) -> None:
    every = [case for case in cases(layers_of([], ["3,32,64,2"]), [5], ["fp32"], backward=True) if case.weight_gradient]
    path = tmp_path / "t.json"
    assert run.tune(every, path, keep=2, interpreter=True, max_rounds=1).failed == 0
    tuned = load_tuned(path)
    for case in every:
        assert isinstance(tuned.nearest(case.kind, torch.float32, case.block_m, case.n, case.k), RaggedConfig)


def test_a_case_that_cannot_be_made_costs_only_itself(tmp_path: Path) -> None:
    every = cases(layers_of([], ["2,32,16,1"]), [3], ["fp32"])[:2]
    impossible = replace(every[0], n=2**40)
    kept = run.tune([impossible, every[1]], tmp_path / "t.json", keep=1, interpreter=True, max_rounds=1)
    content = json.loads(kept.path.read_text())
    assert len(content["entries"]) == kept.failed == 1
    assert "memory" in content["failed"][0]["reasons"][0]


@pytest.mark.parametrize("each", ["up", "down", "d_hidden", "d_rows", "dw_up", "dw_down"])
def test_the_answers_are_those_of_autograd(each: str) -> None:
    """A product's own float64 answer, which judges every tile, against the reference of another file."""
    case = next(c for c in cases(layers_of([], ["3,8,16,2"]), [40], ["fp32"], backward=True) if c.map == each)
    product = product_of(case, "cpu", 1)
    for draw in (0, 1):
        numbers, answer = product.answer(draw)
        plan = product.plans[draw]
        if case.weight_gradient:
            left, right = product.operands[draw]
            gather = {"gather_left": case.map == "dw_down", "gather_right": case.map == "dw_up"}
            whole = ragged_gemm_torch(left.double(), right.double(), plan, **gather).flatten(0, 1)
        else:
            rows = product.rows[draw].double()
            rows = permute_torch(rows, plan) if case.gather else rows
            whole = grouped_gemm_torch(rows, product.weights.double(), plan, transpose=case.transpose)
            whole = activate_torch(whole, case.activation) if case.activation else whole
        torch.testing.assert_close(answer, whole[numbers])
        assert len(numbers.unique()) == len(whole)


@pytest.mark.parametrize("fault", ["one expert", "nothing", "the other draw", "another time"])
def test_a_wrong_tile_is_seen_wherever_it_is_wrong(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases(layers_of([], ["64,8,16,2"]), [8192], ["fp32"])[1]
    worker, right = Worker(), grouped_gemm_torch
    calls = []

    def launch(self: Product, config: object, draw: int) -> torch.Tensor:
        calls.append(draw)
        out = right(self.rows[draw if fault != "the other draw" else 0], self.weights, self.plans[draw])
        if fault == "one expert":
            out[self.plans[draw].offsets[63] :] = 0
        if fault == "nothing":
            out = torch.empty_like(out).fill_(float("nan"))
        return out + (len(calls) * 1e-7 if fault == "another time" else 0)

    monkeypatch.setattr("moebench.tune.product.Grouped._launch", launch)
    worker.open(asdict(case), 0)
    found = worker.candidate(0, asdict(GemmConfig(64, 32, 4, 2)))["wrong"]
    assert found
    assert ("two calls" in found) is (fault == "another time")


@pytest.mark.parametrize("lost", [False, True])
def test_a_tile_that_takes_the_device_with_it_is_not_taken_for_a_wrong_one(
    lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those after it would all fail in this process; a refused launch costs its own tile only."""
    case = cases(layers_of([], ["2,32,16,1"]), [3], ["fp32"])[1]
    worker, config = Worker(), asdict(GemmConfig(16, 16, 4, 2))

    def launch(self: Product, config: object, draw: int) -> torch.Tensor:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    worker.open(asdict(case), 0)
    monkeypatch.setattr("moebench.tune.product.Grouped._launch", launch)
    monkeypatch.setattr("moebench.tune.worker.device_is_lost", lambda: lost)
    if lost:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            worker.candidate(0, config)
    else:
        assert "illegal memory access" in worker.candidate(0, config)["wrong"]


def test_timed_tiles_keep_no_answer() -> None:
    """A graph keeps what its call returns: thirty tiles' answers of a large load would fill a GPU."""
    case = cases(layers_of([], ["2,32,16,1"]), [3], ["fp32"])[1]
    worker = Worker()
    worker.open(asdict(case), 0)
    assert worker.candidate(0, asdict(GemmConfig(16, 16, 4, 2)))["wrong"] is None
    assert worker.timers[0].once(worker.calls[0], 0) is None


def test_a_tile_that_cannot_run_is_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """block_n 48 is no power of two: Triton refuses it, the others race on."""

    def with_a_bad_one(cases: list, family: str, keep: int, limit: int | None) -> list[Field]:
        fields = thin(cases, family, keep, limit)
        fields[0].configs.append(replace(fields[0].configs[0], block_n=48))
        return fields

    monkeypatch.setattr(run, "thin", with_a_bad_one)
    results = []
    progress = run.Progress(done=lambda case, result: results.append(result))
    every = cases(layers_of([], ["2,32,16,1"]), [3], ["fp32"])[:1]
    run.tune(every, tmp_path / "t.json", keep=2, progress=progress, interpreter=True, max_rounds=1)
    assert results[0].runners[-1].wrong is not None
    assert results[0].config is not None
    assert results[0].config.block_n != 48
