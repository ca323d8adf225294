"""Runs of several blocks with workers of straw."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline.stand_in import Crew
from pipeline.tiny import write_suite

from moebench.options import Options
from moebench.run import Outcome, run_suite
from moebench.suite import Suite, load_suite

TOKENS = [4, 8, 16]  # three blocks; what goes wrong goes wrong in the second


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch) -> Crew:
    """What `run_suite` starts instead of worker processes."""
    crew = Crew()
    monkeypatch.setattr("moebench.run.Remote", crew.start)
    return crew


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """Two arms and three yardsticks in each of three blocks."""
    return load_suite([str(write_suite(tmp_path, tokens=TOKENS))])


@pytest.fixture
def go(tmp_path: Path, suite: Suite):
    """Run the suite, or another one, into `run`."""

    def run(other: Suite | None = None, **options) -> Outcome:
        return run_suite(other or suite, Options(tmp_path / "run", **options))

    return run
