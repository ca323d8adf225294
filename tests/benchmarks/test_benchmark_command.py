"""What is stored of the benchmarks, and that a stored baseline is compared with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline.tiny import CHECKOUT, environment

# The shortest of the cases, by what is in its name.
PART = "permute"


def benchmarks(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`pytest tests/benchmarks --benchmark-only`, of one case, storing under `folder`."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/benchmarks", "-k", PART, "--benchmark-only"]
    storage = [f"--benchmark-storage={folder}", "--benchmark-max-time=0.2", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, *storage, *words],
        cwd=CHECKOUT, env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_case_is_timed_stored_and_held_against_its_baseline(tmp_path):
    stored = benchmarks(tmp_path, "--benchmark-save=baseline")
    assert stored.returncode == 0, stored.stdout
    (path,) = tmp_path.rglob("*_baseline.json")
    whole = json.loads(path.read_text())
    (found,) = whole["benchmarks"]
    assert found["group"] == PART
    assert found["options"]["timer"] == "timer", "torch's, which waits for the device"
    said = found["extra_info"]
    assert said["timer"] in ("cpu_wall", "cuda_graph", "cuda_profiler", "cuda_events")
    assert 0 < said["device_ms"] <= said["wall_ms"] * 1.1
    assert found["stats"]["rounds"] >= 5

    # A baseline a hundred times as fast: no machine is so noisy that this passes.
    found["stats"] |= {name: found["stats"][name] / 100 for name in ("min", "max", "mean", "median")}
    path.write_text(json.dumps(whole))
    compared = benchmarks(tmp_path, "--benchmark-compare", "--benchmark-compare-fail=median:10%")
    assert compared.returncode == 1, compared.stdout
    assert "Performance has regressed" in compared.stdout + compared.stderr
