"""What a nightly takes from a run: all of it, in equal parts, and a gap or a failure where there is nothing."""

from __future__ import annotations

import itertools
import math

import pytest
from moebench_suites import nightly
from moebench_suites.cases import cases
from moebench_suites.nightly_numbers import numbers_of
from nightly.straw_harness import Slow
from pipeline.stand_in import StandIn
from pipeline.tiny import write_suite

from moebench.failures import RunError
from moebench.options import Options
from moebench.remote import WorkerLost
from moebench.run import run_suite
from moebench.suite import load_suite


@pytest.fixture
def numbers(tmp_path):
    """Numbers of a run of straw, by provider; `cues` go to the worker of each replicate in turn."""

    def run(*cues, energy=False, providers=("torch-loop", "torch-bmm"), milliseconds=(2.0, 3.0, 4.0)):
        suite = write_suite(tmp_path, list(providers))
        suite.write_text(f"replicates = 3\nenergy = {str(energy).lower()}\n" + suite.read_text())
        speeds, faults = iter(milliseconds), itertools.chain(cues, itertools.repeat({}))

        def start(*_):
            return StandIn(next(faults), Slow(next(speeds)))

        out = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        run_suite(load_suite([str(suite)]), Options(out, device="cpu"), start=start)
        found = numbers_of(out, cases("cpu", str(suite)), 3)
        return {name.split("/")[3]: each for name, each in found.items()}

    return run


def test_each_replicate_gives_as_many_samples_as_the_others(numbers):
    found = numbers()["torch-bmm"]
    assert found["fault"] is None
    rounded = [round(value) for value in found["device_ms"]]
    assert rounded.count(2) == rounded.count(3) == rounded.count(4) >= 10
    assert found["wall_ms"] == [], "a CPU's clock is the host's"
    assert found["over_control"] == pytest.approx([4.0, 6.0, 8.0], rel=0.02), "over 0.5 ms of the yardstick"
    assert found["control"] == "gemm"
    assert found["peak_memory_bytes"] == [1 << 20] * 3
    assert found["rel_error"] == [1e-7] * 3


def test_energy_is_a_gap_where_there_is_no_meter(numbers):
    without = {("", "idle"): {"source": "none", "reason": "no counter"}}
    assert numbers(*3 * [without], energy=True)["torch-bmm"]["energy_j_per_token"] == []


def test_energy_is_one_number_a_replicate(numbers):
    assert numbers(energy=True)["torch-bmm"]["energy_j_per_token"] == [3.0 / 4] * 3


def test_a_fault_in_one_replicate_is_the_cases_and_not_the_others(numbers):
    found = numbers({}, {("torch-bmm", "check"): {"wrong": "is off"}})
    assert found["torch-bmm"]["fault"] == "inaccurate: is off"
    assert found["torch-loop"]["fault"] is None
    assert len(found["torch-loop"]["over_control"]) == 3


def test_what_cannot_be_timed_here_is_a_gap(numbers):
    found = numbers(*3 * [{("torch-bmm", "arm"): {"timed": False}}])["torch-bmm"]
    assert found["fault"] is None
    assert found["device_ms"] == found["over_control"] == found["peak_memory_bytes"] == []
    assert found["rel_error"] == [1e-7] * 3, "it was checked all the same"


def test_what_one_replicate_could_not_time_is_a_gap_and_not_two_thirds(numbers):
    found = numbers({}, {("torch-bmm", "arm"): {"timed": False}})
    assert found["torch-bmm"]["fault"] is None
    assert found["torch-bmm"]["device_ms"] == found["torch-bmm"]["over_control"] == []
    assert len(found["torch-loop"]["over_control"]) == 3


class Dead(StandIn):
    """A worker that is gone before it says hello."""

    def ask(self, *_, **__):
        raise WorkerLost("crashed", "killed by the system")


def test_a_run_that_broke_off_gives_no_numbers(tmp_path):
    suite = write_suite(tmp_path, ["torch-bmm"])
    suite.write_text("replicates = 3\n" + suite.read_text())
    workers = iter([StandIn({}, Slow(2.0)), Dead({}, Slow(2.0))])
    with pytest.raises(RunError, match="the worker does not start"):
        run_suite(load_suite([str(suite)]), Options(tmp_path / "run", device="cpu"), start=lambda *_: next(workers))
    (found,) = numbers_of(tmp_path / "run", cases("cpu", str(suite)), 3).values()
    assert found["fault"] == "the run has 1 of 3 replicates of this point"
    assert found["device_ms"] == found["over_control"] == []


def test_a_point_that_the_run_does_not_have_is_a_fault(numbers, tmp_path):
    numbers()
    other = cases("cpu")
    faults = {each["fault"] for each in numbers_of(tmp_path / "run0", other, 3).values()}
    assert faults == {"the run has 0 of 3 replicates of this point"}


def test_asv_gets_samples_a_gap_or_a_failure():
    found = {"a": {"fault": None, "device_ms": [1.0, 2.0], "wall_ms": []}, "b": {"fault": "crashed: gone"}}
    assert nightly.tracked(found, "a", "device_ms") == {"samples": [1.0, 2.0], "number": 1}
    assert math.isnan(nightly.tracked(found, "a", "wall_ms"))
    with pytest.raises(RuntimeError, match="b: crashed: gone"):
        nightly.tracked(found, "b", "device_ms")


def test_a_run_that_does_not_end_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(nightly, "SUITE", "no-such-suite")
    with pytest.raises(RuntimeError, match=r"ended with exit code 2:\nmoebench: unknown suite 'no-such-suite'"):
        nightly.measure(tmp_path / "run")


def test_a_run_that_broke_off_is_said_though_its_exit_code_is_that_of_failed_points(tmp_path, monkeypatch):
    leaves = "mkdir -p run; echo '{\"finished\": null}' > run/manifest.json; echo the disk is full >&2; exit 1"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nightly, "HARNESS", ["sh", "-c", leaves])
    with pytest.raises(RuntimeError, match=r"ended with exit code 1:\nthe disk is full"):
        nightly.measure(tmp_path / "run")


def test_only_an_earlier_run_gives_way(tmp_path, monkeypatch):
    monkeypatch.setattr(nightly, "HARNESS", ["false"])
    (tmp_path / "mine.txt").touch()
    with pytest.raises(RuntimeError):
        nightly.measure(tmp_path)
    assert (tmp_path / "mine.txt").exists()
