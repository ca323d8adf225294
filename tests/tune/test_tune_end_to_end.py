"""A whole tuning in the interpreter: real kernels, real checks, times that mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moebench.tune import run
from moebench.tune.case import cases, layers_of
from moebench.tune.thin import Field, thin
from moebench_kernels.tuned_tiles import load_tuned

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="tuning races on the GPU here"),
]


def test_it_checks_races_writes_and_resumes(tmp_path: Path) -> None:
    every = cases(layers_of([], ["3,32,64,2"]), [5], ["fp32"])
    seen: list[str] = []
    progress = run.Progress(done=lambda case, result: seen.append(f"{case.map} {len(result.runners)}"))
    path = run.tune(every[:1], tmp_path / "t.json", keep=3, progress=progress, interpreter=True, max_rounds=1)
    run.tune(every, path, keep=3, resume=True, progress=progress, interpreter=True, max_rounds=1)
    assert seen == ["up 3", "down 3"]
    content = json.loads(path.read_text())
    assert content["failed"] == []
    assert [entry["kind"] for entry in content["entries"]] == ["gated_gather", "rows"]
    assert all(entry["median_ms"] > 0 for entry in content["entries"])
    assert load_tuned(path).nearest("rows", torch.float32, every[1].block_m, 32, 64) is not None


def test_a_tile_that_cannot_run_is_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """block_n 48 is no power of two: Triton refuses it, the others race on."""
    from dataclasses import replace

    def with_a_bad_one(cases: list, family: str, keep: int) -> list[Field]:
        fields = thin(cases, family, keep)
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
