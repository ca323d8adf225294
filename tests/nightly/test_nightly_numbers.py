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

from moebench.options import Options
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

        run_suite(load_suite([str(suite)]), Options(tmp_path / "run", device="cpu"), start=start)
        found = numbers_of(tmp_path / "run", cases("cpu", str(suite)))
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
    assert numbers(energy=True)["torch-bmm"]["energy_j_per_token"] == []


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


def test_a_point_that_the_run_does_not_have_is_a_fault(numbers, tmp_path):
    numbers()
    other = cases("cpu")
    assert {each["fault"] for each in numbers_of(tmp_path / "run", other).values()} == {"the run has no such point"}


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


def test_only_an_earlier_run_gives_way(tmp_path, monkeypatch):
    monkeypatch.setattr(nightly, "HARNESS", ["false"])
    (tmp_path / "mine.txt").touch()
    with pytest.raises(RuntimeError):
        nightly.measure(tmp_path)
    assert (tmp_path / "mine.txt").exists()
