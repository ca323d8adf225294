"""`make nightly` on a small repository of its own: a slower commit is told once, by exit code 3.

asv, its step detection, its site and our run directories are the real ones; a worker of straw says how
long calls take, so that the truth is known and no clock can make the test flake.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline.tiny import CHECKOUT, environment, write_suite

from moebench.analyse.load import load_run

BENCHMARKS = f"""
import sys
from moebench_suites import nightly as _nightly
from moebench_suites.nightly import Energy, Error, Latency, Memory, Relative, setup_cache
_nightly.HARNESS = [sys.executable, {str(CHECKOUT / "tests" / "nightly" / "straw_harness.py")!r}]
"""


class Project:
    """A repository with asv benchmarks that import ours."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "project"
        self.path.mkdir()
        shutil.copy(CHECKOUT / "asv.conf.json", self.path)
        shutil.copy(CHECKOUT / ".gitignore", self.path)
        (self.path / "suites").mkdir()
        (self.path / "suites" / "__init__.py").touch()
        (self.path / "suites" / "nightly.py").write_text(BENCHMARKS)
        suite = write_suite(self.path)
        suite.write_text("replicates = 3\n" + suite.read_text())
        here = environment()["PYTHONPATH"]
        self.environment = environment(
            HOME=str(folder), STRAW_PROJECT=str(self.path), MOEBENCH_NIGHTLY_SUITE=str(suite),
            PYTHONPATH=f"{here}{os.pathsep}{CHECKOUT / 'tests'}",
            GIT_AUTHOR_NAME="a", GIT_AUTHOR_EMAIL="a@b", GIT_COMMITTER_NAME="a", GIT_COMMITTER_EMAIL="a@b",
        )  # fmt: skip
        self.git("init", "-q", "-b", "main")

    def git(self, *words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=self.path, env=self.environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def commit(self, **files: str) -> str:
        for name, text in files.items():
            (self.path / name).write_text(text)
        self.git("add", ".")
        self.git("commit", "-q", "-m", " ".join(files), "--allow-empty")
        return self.git("rev-parse", "HEAD")

    def night(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "moebench_suites.run_nightly", "--device", "cpu", "--machine", "straw", *words],
            cwd=self.path, env=self.environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    def results(self, commit: str) -> dict:
        (path,) = (self.path / ".asv" / "results" / "straw").glob(f"{commit[:8]}-*.json")
        return json.loads(path.read_text())


@pytest.mark.slow
def test_a_slower_commit_is_found_once_and_an_equal_one_is_no_news(tmp_path):
    project = Project(tmp_path)
    base = project.commit(speed_ms="1.0")
    first = project.night()
    assert first.returncode == 0, first.stderr
    assert first.stdout == ""

    slower = project.commit(speed_ms="3.0")
    second = project.night()
    assert second.returncode == 3, second.stderr
    told = second.stdout.splitlines()
    named = sorted(line.partition("(")[0] for line in told)
    assert named == sorted(2 * ["nightly.Latency.track_device", "nightly.Relative.track_latency_over_control"])
    assert all(f"since {slower[:10]}" in line for line in told)
    assert any("1 -> 3 ms (+200 %)" in line and "torch-bmm" in line for line in told)

    equal = project.commit(unrelated="a change that changes no speed")
    third = project.night()
    assert third.returncode == 0, third.stdout + third.stderr
    assert third.stdout == ""

    # A night that is repeated ends as it did; what is stored is the same.
    assert [project.night("--again").returncode for _ in range(2)] == [0, 0]
    project.git("checkout", "-q", slower)
    repeated = project.night("--again")
    assert (repeated.returncode, repeated.stdout) == (3, second.stdout)

    project.git("checkout", "-q", "main")
    project.commit(broken="torch-bmm gives a wrong answer from here on")
    fourth = project.night()
    assert (fourth.returncode, fourth.stdout) == (1, ""), fourth.stderr
    assert "inaccurate: is off" in fourth.stderr

    for commit in (base, slower, equal):
        run = load_run(project.path / ".asv" / "runs" / commit)
        assert run.table["replicate"].nunique() == 3
    assert_asv_keeps_samples_as_it_does_timings(project.results(slower))
    site = project.path / ".asv" / "html"
    assert (site / "index.html").is_file()
    assert "torch-bmm" in (site / "regressions.json").read_text()


def assert_asv_keeps_samples_as_it_does_timings(stored):
    """What a `track_*` returns as samples has a median, quartiles and an interval; asv promises it nowhere."""
    columns = dict(zip(stored["result_columns"], stored["results"]["nightly.Latency.track_device"], strict=False))
    assert columns["result"] == pytest.approx([3.0, 3.0], rel=0.01)
    for case in range(2):
        low, high = columns["stats_ci_99_a"][case], columns["stats_ci_99_b"][case]
        assert 2.98 < low <= columns["stats_q_25"][case] < 3.0 < columns["stats_q_75"][case] <= high < 3.02
        assert columns["stats_repeat"][case] >= 3 * 10
    ratios = dict(
        zip(stored["result_columns"], stored["results"]["nightly.Relative.track_latency_over_control"], strict=False)
    )
    assert ratios["stats_repeat"] == [3, 3], "one a process"
    for gap in ("Latency.track_wall", "Energy.track_per_token"):
        values = stored["results"][f"nightly.{gap}"][0]
        assert all(value != value for value in values), "NaN: a gap and not a zero"
