"""Where the wall time went: every second counts once, and the phases are those of the worker's messages."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from moebench_suites.harness_cost import Straw, run_rows, straw_suite
from moebench_suites.harness_cost import main as harness_cost
from pipeline.stand_in import Answers, StandIn

from moebench import block_run, run
from moebench.options import Options
from moebench.run import Outcome, Progress, run_suite
from moebench.stopwatch import OWN, PHASE_OF, WINDOWS, Stopwatch, TimedWorker, added, spent
from moebench.suite import load_suite


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_second_counts_for_the_innermost_phase(clock: Clock) -> None:
    watch = Stopwatch(clock)
    clock.passes(1)
    with watch.phase("table"):
        clock.passes(2)
        with watch.phase("journal"):
            clock.passes(4)
        clock.passes(8)
    clock.passes(16)
    assert watch.seconds() == {OWN: 17.0, "table": 10.0, "journal": 4.0}
    clock.passes(32)
    assert sum(watch.seconds().values()) == clock.now - 100.0


def test_a_phase_that_ends_in_an_error_is_over(clock: Clock) -> None:
    watch = Stopwatch(clock)
    with contextlib.suppress(KeyError), watch.phase("sampling"):
        clock.passes(3)
        raise KeyError
    clock.passes(1)
    assert watch.seconds() == {OWN: 1.0, "sampling": 3.0}


def test_a_workers_answers_are_counted_by_kind(clock: Clock) -> None:
    class Slow(Straw):
        def ask(self, do: str, *, deadline_s: float, **arguments: Any) -> dict[str, Any]:
            clock.passes(1)
            return super().ask(do, deadline_s=deadline_s, **arguments)

    watch = Stopwatch(clock)
    worker = TimedWorker(Slow(), watch)
    for do in ("open", "arm", "check", "recheck", "burst", "burst", "burst"):
        assert worker.ask(do, deadline_s=1.0) == Straw().ask(do, deadline_s=1.0)
    assert watch.seconds() == {OWN: 0.0, "building": 2.0, "checking": 2.0, "sampling": 3.0}


def test_every_message_of_a_run_has_a_phase() -> None:
    """A message without one would count as the harness's own."""
    asked = {name for name in vars(Answers) if not name.startswith("_")}
    assert asked == set(PHASE_OF)
    assert set(WINDOWS) < set(PHASE_OF.values())
    sources = "".join(Path(module.__file__ or "").read_text() for module in (run, block_run))
    assert {do for do in PHASE_OF if f'"{do}"' in sources} == set(PHASE_OF)


def test_overhead_is_what_is_in_no_window() -> None:
    seconds = {OWN: 1.0, "starting": 2.0, "building": 4.0, "sampling": 8.0, "checking": 16.0, "journal": 0.5}
    assert spent(seconds) == {"seconds": 31.5, "overhead_seconds": 7.5, "building_seconds": 4.0}
    assert spent({}) == {"seconds": 0, "overhead_seconds": 0, "building_seconds": 0.0}


def test_sessions_are_added_up() -> None:
    assert added({"table": 1.0, "old": 2.0}, {"table": 0.5, "new": 0.0004}) == {"table": 1.5, "old": 2.0, "new": 0.0}


class Sleepy(Straw):
    """A worker for which a check takes half a second of a clock that only it moves."""

    clock: Clock

    def ask(self, do: str, *, deadline_s: float, **arguments: Any) -> dict[str, Any]:
        self.clock.passes(0.5 if do == "check" else 0.0)
        return super().ask(do, deadline_s=deadline_s, **arguments)


@pytest.fixture
def ended(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    Sleepy.clock = clock
    monkeypatch.setattr(run, "Stopwatch", lambda: Stopwatch(clock))
    return run_suite(load_suite([str(straw_suite(tmp_path, 8))]), Options(tmp_path / "run"), start=Sleepy)


def test_a_runs_manifest_says_where_its_time_went(tmp_path: Path, ended: Outcome) -> None:
    checks = 2 * (4 + 3)  # two blocks of four arms and three yardsticks
    assert ended.seconds["checking"] == 0.5 * checks
    assert sum(ended.seconds.values()) == ended.seconds["checking"], "no other message took time"
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["seconds"] == ended.seconds


def test_a_resumed_run_adds_its_sessions(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    Sleepy.clock = clock
    monkeypatch.setattr(run, "Stopwatch", lambda: Stopwatch(clock))
    suite = load_suite([str(straw_suite(tmp_path, 8))])

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    first = run_suite(suite, Options(tmp_path / "run"), Progress(block_done=stop), start=Sleepy)
    second = run_suite(suite, Options(tmp_path / "run", resume=True), start=Sleepy)
    assert first.interrupted
    assert not second.interrupted
    assert second.seconds["checking"] == first.seconds["checking"] == 0.5 * 7
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["seconds"]["checking"] == 0.5 * 14


def test_the_benchmark_counts_points_and_what_lies_outside_the_run(tmp_path: Path, ended: Outcome) -> None:
    rows = {row["phase"]: row for row in run_rows(ended.path, 10.0)}
    assert rows["checking"]["seconds"] == 7.0
    assert rows[OWN]["seconds"] == rows["overhead"]["seconds"] == 3.0, "Python's start and end are the harness's"
    assert rows["overhead"]["ms_a_point"] == 3000 / 8
    assert rows["overhead"]["percent"] == 30.0


def test_the_benchmarks_straw_says_what_the_tests_straw_says() -> None:
    """Which is held against the real worker."""
    arguments = {
        "hello": {"device_kind": "cpu"}, "hold": {"threads": 1}, "provider": {"name": "torch-loop"},
        "ceilings": {"precisions": ["fp32"], "seconds": 1.0},
        "arm": {"index": 0, "variant": {"provider": "torch-loop"}},
        "yardstick": {"index": 0, "name": "gemm", "precision": "fp32", "flops": 1.0}, "check": {"index": 0},
        "warm": {"index": 0, "max_seconds": 1.0, "timer": "auto", "cache": "cold"}, "memory": {"index": 0},
        "burst": {"index": 0, "count": 10, "start": 0}, "recheck": {"index": 0, "latency_ms": 1.0},
    }  # fmt: skip
    told = StandIn({}, Answers())
    for do, reply in Straw().replies.items():
        missing = set(told.ask(do, deadline_s=1.0, **arguments[do])) - set(reply)
        assert do in ("arm", "ceilings") or not missing, (do, missing)


def test_the_benchmark_of_a_device_names_what_a_layer_costs() -> None:
    words = ["device", "--device", "cpu", "--model", "olmoe-1b-7b", "--tokens", "8"]
    done = CliRunner().invoke(harness_cost, words)
    assert done.exit_code == 0, done.output
    for part in ("a reading of the state", "weights of olmoe-1b-7b", "a draw of 8 tokens", "statistics"):
        assert part in done.output
