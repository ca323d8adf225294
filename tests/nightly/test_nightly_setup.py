"""What asv finds, what the workflow does to its results branch, and that make knows the words used there."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess

import pytest
import yaml
from moebench_suites.cases import case_id, cases
from pipeline.tiny import CHECKOUT, environment

from moebench.point import Point, Problem, Variant
from moebench.suite import load_suite

WORKFLOW = CHECKOUT / ".github" / "workflows" / "nightly.yml"
BENCHMARKS = {
    "nightly.Energy.track_per_token": "J",
    "nightly.Error.track_relative": "relative",
    "nightly.Latency.track_device": "ms",
    "nightly.Latency.track_wall": "ms",
    "nightly.Memory.track_peak": "bytes",
    "nightly.Relative.track_latency_over_control": "yardsticks",
}


def steps():
    return yaml.safe_load(WORKFLOW.read_text())["jobs"]["nightly"]["steps"]


def step(name):
    (found,) = (each["run"] for each in steps() if each.get("name") == name)
    return found


# Cases


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_cases_are_about_ten_kernels_and_routers_with_names_of_their_own(kind):
    found = cases(kind)
    assert 9 <= len(found) <= 12
    assert {point.variant.scope for point in found.values()} > {"layer", "gate"}
    routers = {point.problem.layer.router.kind for point in found.values() if point.variant.scope == "gate"}
    assert len(routers) >= 3
    assert load_suite(["nightly"]).replicates >= 3, "what differs between processes is seen in no single one"


def test_names_are_keys_of_stored_histories_and_stay():
    found = cases("cpu")
    assert next(iter(found)) == "layer/D512-F256-E16-K2/T4/torch-bmm/fp32"
    assert "gate/D512-F16-E64-K2/T2048/torch-grouped/fp32/expert_choice/training/router" in found


def test_a_name_says_everything_that_is_not_as_usual():
    point = next(iter(cases("cpu").values()))
    problem, variant = vars(point.problem), vars(point.variant)
    changed = [
        Point(Problem(**{**problem, **change}), point.variant)
        for change in ({"tokens": 5}, {"traffic": "zipf:1"}, {"direction": "forward_backward"}, {"seed": 1})
    ] + [
        Point(point.problem, Variant(**{**variant, **change}))
        for change in ({"provider": "x"}, {"precision": "bf16"}, {"capacity_factor": 1.0}, {"scope": "experts"},
                       {"drop_order": "choice"}, {"capacity_rounding": "mesh"})
    ]  # fmt: skip
    names = {case_id(each) for each in (point, *changed)}
    assert len(names) == 1 + len(changed)


def test_two_points_of_one_name_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("moebench_suites.cases.case_id", lambda point: "same")
    with pytest.raises(ValueError, match="two points have one name"):
        cases("cpu")


# asv


def test_asv_finds_these_benchmarks_and_nothing_else(monkeypatch):
    discovery = pytest.importorskip("asv_runner.discovery")
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    monkeypatch.setattr("sys.meta_path", [*__import__("sys").meta_path])
    file = io.StringIO()
    discovery.list_benchmarks(str(CHECKOUT / "suites"), file)
    found = {each["name"]: each for each in json.loads(file.getvalue())}
    assert {name: each["unit"] for name, each in found.items()} == BENCHMARKS
    for each in found.values():
        assert each["version"] == "1", "a changed text must not drop the history"
        assert each["params"] == [[repr(name) for name in cases("cpu")]]
        assert each["setup_cache_timeout"] >= 3600
    assert len({each["setup_cache_key"] for each in found.values()}) == 1, "one run of the harness for all"


def test_every_benchmark_has_a_threshold():
    text = re.sub(r"^\s*//.*$", "", (CHECKOUT / "asv.conf.json").read_text(), flags=re.MULTILINE)
    thresholds = json.loads(text)["regressions_thresholds"]
    for name in BENCHMARKS:
        assert len([pattern for pattern in thresholds if re.match(pattern, f"{name}('case')@HEAD")]) == 1


# The workflow


def test_every_step_of_the_workflow_is_sound():
    for each in steps():
        if "run" in each:
            done = subprocess.run(["bash", "-n"], input=each["run"], text=True, capture_output=True, check=False)
            assert done.returncode == 0, done.stderr
    dry = subprocess.run(
        ["make", "--dry-run", "nightly", "ARGS=--device cuda"],
        cwd=CHECKOUT, env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "-m moebench_suites.run_nightly --device cuda" in dry.stdout


def test_the_results_branch_begins_and_grows(tmp_path):
    """The workflow's own steps, on a made-up origin, three nights in fresh checkouts."""
    identity = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    env = {**os.environ, **identity, "RESULTS_BRANCH": "results", "GITHUB_SHA": "abc", "HOME": str(tmp_path)}
    origin = tmp_path / "origin"

    def sh(script, folder, **more):
        done = subprocess.run(
            ["bash", "-e", "-c", script], cwd=folder, env={**env, **more}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    sh(f"git init -q -b main --bare {origin}; git clone -q {origin} first; cd first; echo .asv/ > .gitignore; "
       "git add .; git commit -qm one; git push -q origin HEAD:main", tmp_path)  # fmt: skip
    for night in range(3):
        folder = tmp_path / ("fresh" if night == 2 else "kept")  # a runner may keep its folder or not
        if not folder.exists():
            sh(f"git clone -q {origin} {folder}", tmp_path)
        sh(step("Fetch the results so far"), folder, GITHUB_RUN_ID=str(night), GITHUB_RUN_ATTEMPT="1")
        assert sorted(path.name for path in (folder / ".asv/results").glob("*.json")) == [
            f"{before}.json" for before in range(night)
        ]
        (folder / ".asv" / "results" / f"{night}.json").write_text("{}")
        sh(step("Keep the results"), folder)
        assert sh("git status --porcelain", folder) == ""
    assert sh("git rev-list --count results", origin).strip() == "3"
    assert sh("git ls-tree --name-only results", origin).split() == ["0.json", "1.json", "2.json"]
    assert "nothing new to keep" in sh(step("Keep the results"), folder)
