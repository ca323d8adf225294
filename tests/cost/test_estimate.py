"""The estimate: its phases, and what it learns from earlier runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from moebench_suites.harness_cost import Straw, estimate_rows, straw_suite
from pipeline.tiny import write_suite

from moebench import estimate
from moebench.earlier_runs import OTHER_SUITES, SAME_SUITE, known_from
from moebench.estimate import estimate_seconds, model_hash
from moebench.manifest import suite_hash
from moebench.options import Options
from moebench.plan_text import plan_rows, plan_text
from moebench.record import Manifest
from moebench.run import run_suite
from moebench.stopwatch import PHASE_OF
from moebench.suite import Suite, load_suite


def manifest(folder: Path, name: str, **changes: Any) -> None:
    """A run's manifest, newer than those before it."""
    path = folder / name / "manifest.json"
    path.parent.mkdir(parents=True)
    whole = {
        "device_kind": "cpu", "finished": "complete", "sessions": 1, "shard": [1, 1], "check_only": False,
        "suite_hash": "other", "ceilings": {"copy_gbs": 1.0}, "expected_by": model_hash(),
        "seconds": {"sampling": 15.0, "checking": 12.0}, "expected_seconds": {"sampling": 10.0, "checking": 20.0},
    }  # fmt: skip
    path.write_text(json.dumps(whole | changes))
    time = 1e9 + len(list(folder.iterdir()))
    os.utime(path, (time, time))


def tiny(tmp_path: Path, text: str = "", **options: Any) -> Suite:
    path = write_suite(tmp_path, **options)
    path.write_text(text + path.read_text())
    return load_suite([str(path)])


# What earlier runs tell


def test_nothing_is_known_where_nothing_has_run(tmp_path: Path) -> None:
    known = known_from(tmp_path / "none", "cpu")
    assert (known.ceilings, known.factors, known.runs) == (None, {}, 0)


def test_earlier_runs_are_taken_together_phase_by_phase(tmp_path: Path) -> None:
    manifest(tmp_path, "a")
    manifest(tmp_path, "b", seconds={"sampling": 60.0}, expected_seconds={"sampling": 50.0, "checking": 0.0})
    known = known_from(tmp_path, "cpu")
    assert known.runs == 2
    assert known.factors == {"sampling": 75.0 / 60.0, "checking": 0.6}


def test_the_same_suite_before_tells_alone_and_its_newest_run(tmp_path: Path) -> None:
    manifest(tmp_path, "same", suite_hash="mine")
    manifest(tmp_path, "same again", suite_hash="mine", seconds={"sampling": 5.0})
    manifest(tmp_path, "other", seconds={"sampling": 100.0})
    known = known_from(tmp_path, "cpu", "mine")
    assert (known.runs, known.factors["sampling"]) == (1, 0.5)
    assert known_from(tmp_path, "cpu", "nobody's").runs == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"finished": "interrupted"}, {"finished": None}, {"sessions": 2}, {"shard": [1, 2]}, {"check_only": True},
        {"device_kind": "cuda"}, {"seconds": None}, {"expected_seconds": None}, {"expected_by": "another model"},
    ],
)  # fmt: skip
def test_a_run_that_was_not_measured_from_end_to_end_tells_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    manifest(tmp_path, "a", **changes)
    assert known_from(tmp_path, "cpu").runs == 0


def test_ceilings_are_the_newest_runs_even_of_one_that_was_interrupted(tmp_path: Path) -> None:
    manifest(tmp_path, "a")
    manifest(tmp_path, "b", ceilings={"copy_gbs": 2.0}, finished="interrupted")
    manifest(tmp_path, "c", ceilings=None)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "manifest.json").write_text("[")
    assert known_from(tmp_path, "cpu").ceilings == {"copy_gbs": 2.0}


def test_phases_of_which_little_was_expected_say_nothing_and_factors_are_bounded(tmp_path: Path) -> None:
    told = {"sampling": 1000.0, "checking": 0.1, "memory": 9.0}
    manifest(tmp_path, "a", seconds=told, expected_seconds={"sampling": 10.0, "checking": 10.0, "memory": 0.5})
    assert known_from(tmp_path, "cpu").factors == {"sampling": OTHER_SUITES[1], "checking": OTHER_SUITES[0]}
    assert known_from(tmp_path, "cpu", "other").factors == {"sampling": SAME_SUITE[1], "checking": SAME_SUITE[0]}


# The model


def test_its_phases_are_the_stopwatchs(tmp_path: Path) -> None:
    phases = estimate_seconds(load_suite(["quick"]), "cpu").phases
    assert set(phases) <= {*PHASE_OF.values(), "harness", "journal", "table"}
    assert {"starting", "ceilings", "building", "checking", "warming", "memory", "sampling"} <= set(phases)


def test_factors_change_their_own_phase(tmp_path: Path) -> None:
    suite = tiny(tmp_path)
    plain, corrected = (estimate_seconds(suite, "cpu", None, factors) for factors in (None, {"sampling": 3.0}))
    assert corrected.seconds - plain.seconds == pytest.approx(2 * plain.phases["sampling"])
    assert corrected.phases | {"sampling": 0} == plain.phases | {"sampling": 0}


def test_it_grows_with_blocks_replicates_and_nothing_else(tmp_path: Path) -> None:
    one = estimate_seconds(tiny(tmp_path, tokens=[4]), "cpu").phases
    three = estimate_seconds(tiny(tmp_path, "replicates = 3\n", tokens=[4]), "cpu").phases
    two = estimate_seconds(tiny(tmp_path, tokens=[4, 5]), "cpu").phases
    for phase in ("sampling", "checking", "warming"):
        assert three[phase] == pytest.approx(3 * one[phase])
        assert two[phase] == pytest.approx(2 * one[phase], rel=0.3)
    assert three["starting"] == 3 * one["starting"]
    assert three["ceilings"] == one["ceilings"] == two["ceilings"], "they are probed once a run"


def test_yardsticks_take_time_but_not_beside_arms_that_only_an_interpreter_runs(tmp_path: Path) -> None:
    interpreted = estimate_seconds(tiny(tmp_path, providers=["triton"]), "cpu").phases
    assert interpreted.get("sampling", 0.0) == 0.0
    few, many = (estimate_seconds(tiny(tmp_path, providers=names), "cpu").phases["sampling"]
                 for names in (["torch-bmm"], ["torch-bmm", "torch-grouped"]))  # fmt: skip
    assert many < 1.9 * few, "the yardsticks are there either way"


def test_energy_takes_time_only_where_there_is_a_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = tiny(tmp_path, "energy = true\n")
    for has in (False, True):
        monkeypatch.setattr(estimate, "_has_meter", lambda kind, has=has: has)
        assert (estimate_seconds(suite, "cpu").phases.get("energy", 0.0) > 10) is has


# From a run to the next plan


def test_a_run_says_what_was_expected_of_it_and_the_next_plan_learns(tmp_path: Path) -> None:
    suite = load_suite([str(straw_suite(tmp_path, 400))])
    runs = tmp_path / "runs"
    (before,) = plan_rows(suite, "cpu", runs)
    run_suite(suite, Options(runs / "one", device="cpu"), start=Straw)
    told = Manifest.model_validate_json((runs / "one" / "manifest.json").read_text())
    assert told.suite_hash == suite_hash(suite, Options(runs))
    expected = estimate_seconds(suite, "cpu", told.ceilings).phases
    assert told.expected_seconds == {phase: round(seconds, 3) for phase, seconds in expected.items()}
    (after,) = plan_rows(suite, "cpu", runs)
    assert (before["basis"], before["earlier_runs"]) == ("uncalibrated", 0)
    assert (after["basis"], after["earlier_runs"]) == ("calibrated", 1)
    assert after["seconds"] < 0.5 * before["seconds"], "straw is quick"
    assert "(calibrated, corrected by 1 earlier run)" in plan_text(suite, [after])
    assert "corrected" not in plan_text(suite, [before])


def test_estimates_are_held_against_whole_runs_of_shipped_suites_only(tmp_path: Path) -> None:
    suite = load_suite(["smoke"])
    run_suite(suite, Options(tmp_path / "one", device="cpu"), start=Straw)
    told = json.loads((tmp_path / "one" / "manifest.json").read_text()) | {"seconds": {"sampling": 10.0}}
    for changed in ({"finished": "interrupted"}, {"sessions": 2}, {"suite": "mine"}, {"shard": [1, 2]}):
        assert estimate_rows([told | changed]) == []
    (row,) = estimate_rows([told])
    assert row["took_s"] == 10.0
    assert row["nominal"] == estimate_seconds(suite, "cpu").seconds / 10
    assert row["ceilings"] == row["corrected"] == estimate_seconds(suite, "cpu", told["ceilings"]).seconds / 10
    other = json.loads(json.dumps(told)) | {"suite": "quick"}
    expected = estimate_seconds(load_suite(["quick"]), "cpu", told["ceilings"]).phases["checking"]
    other["seconds"] = {"checking": 1.5 * expected}
    row, _ = estimate_rows([told, other])
    phases = estimate_seconds(suite, "cpu", told["ceilings"], {"checking": 1.5}).phases
    assert row["corrected"] * 10 >= phases["checking"], "the other run's checks took longer, and so will these"
    assert row["corrected"] < row["ceilings"], "its other phases took no time"
