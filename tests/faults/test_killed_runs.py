"""A hundred runs killed with SIGKILL at random moments, and runs whose files may not grow past some size."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from faults.fault_checks import PER_BLOCK, complete
from pipeline.tiny import CHECKOUT, environment

YARD = Path(__file__).with_name("yard.py")
BLOCKS = 4
KILLS = 100


def yard(folder, what, *numbers):
    """What `yard.py` saw; nothing in it may have ended with a traceback."""
    path = os.pathsep.join([str(CHECKOUT / "tests"), environment()["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, str(YARD), what, str(folder), *map(str, numbers)],
        env=environment(PYTHONPATH=path), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert [each.read_text() for each in folder.glob("*.traceback")] == []
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing(tmp_path):
    """FAULTS_SEED says which hundred; `any` takes others each time."""
    seed = os.environ.get("FAULTS_SEED", "5")
    seed = secrets.randbelow(10**6) if seed == "any" else int(seed)
    print(f"FAULTS_SEED={seed}")  # shown where the test fails
    seen = yard(tmp_path, "kills", KILLS, seed)
    assert seen["faults"] == []
    assert sum(seen["landed"].values()) == KILLS
    assert set(seen["landed"]) >= {"start", "block", "journal", "table", "manifest"}, seen["landed"]
    assert len(seen["runs"]) >= KILLS // 4
    for run in seen["runs"]:
        rows = complete(tmp_path / run, BLOCKS)
        assert {row.status for row in rows} == {"measured"}


def test_files_that_end_at_any_size_lose_nothing(tmp_path):
    """From nothing to three quarters of the largest: every write of a run is the first that fails in some of them."""
    seen = yard(tmp_path, "full", 24)["runs"]
    for run in seen:
        path = tmp_path / run["run"]
        assert run["code"] == 1, run
        assert run["said"] == f"{path} cannot be written any more: File too large; what was measured is kept"
        assert run["torn"] == 0, "what fitted of a block is taken back"
        assert (run["faults"], run["last"]) == ([], 0), run
        assert {row.status for row in complete(path, BLOCKS)} == {"measured"}
    assert {run["kept"] for run in seen} >= {0, PER_BLOCK, 2 * PER_BLOCK}
