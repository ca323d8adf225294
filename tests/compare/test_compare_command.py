"""`moebench compare` as a user runs it: on run directories written for the purpose, good and bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from compare.simulated_runs import QUIET_GPU, Plan, records_of, run_of, two_runs

from moebench.analyse import write_results
from moebench.analyse.compare import COLUMNS, VERDICTS
from moebench.cli import main
from moebench.record import Record

PLAN = Plan(blocks=2, arms=4, rounds=8)


def pair(folder: Path, change: float = 0.0, seed: int = 1, **manifest: Any) -> tuple[Path, Path]:
    """Two run directories; the first point of the second takes `change` longer."""
    changes = np.zeros(PLAN.points)
    changes[0] = np.log1p(change)
    samples = two_runs(QUIET_GPU, PLAN, np.random.default_rng(seed), changes)
    old, new = (
        write(folder / name, records_of(times, name), name) for name, times in zip(("old", "new"), samples, strict=True)
    )
    retell(new, **manifest)
    return old, new


def write(path: Path, records: list[Record], run_id: str) -> Path:
    path.mkdir()
    write_results(records, path / "results.parquet")
    manifest = run_of(np.zeros((1, 1, 2, 1, 1)), run_id).manifest
    (path / "manifest.json").write_text(manifest.model_dump_json())
    return path


def retell(run: Path, **changes: Any) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def rewrite(run: Path, change: Any) -> None:
    """Replace each record of a run by `change(record)`; None leaves it out."""
    from moebench.analyse import load_run

    table = load_run(run).table.astype(object)
    rows = table.where(table.notna(), None).to_dict("records")
    lists = ("samples_ms", "wall_samples_ms", "sample_round", "outlier_samples", "flags")
    for row in rows:
        row.update({name: None if row[name] is None else list(row[name]) for name in lists})
    changed = [change(Record(**row)) for row in rows]
    write_results([record for record in changed if record is not None], run / "results.parquet")


def compare(*words: object) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, words)])


def rows_of(done: Result) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def test_nothing_changed_is_exit_code_0(tmp_path: Path) -> None:
    done = compare(*pair(tmp_path), "--json")
    assert done.exit_code == 0, done.output
    rows = rows_of(done)
    assert {row["verdict"] for row in rows if row["metric"] == "latency"} == {"SAME"}
    assert len([row for row in rows if row["metric"] == "latency"]) == PLAN.points
    assert all(tuple(row) == COLUMNS for row in rows)
    assert "latency: 8 SAME" in done.stderr


def test_a_regression_is_exit_code_3_and_the_first_row(tmp_path: Path) -> None:
    old, new = pair(tmp_path, 0.08)
    done = compare(old, new, "--json")
    assert done.exit_code == 3
    first, *rest = rows_of(done)
    assert (first["point_id"], first["verdict"], first["regression"]) == ("b0a0", "SLOWER", True)
    assert first["ratio_low"] < 1.08 < first["ratio_high"]
    assert (first["control"], first["replicates_old"], first["replicates_new"]) == ("gemm", 3, 3)
    assert not any(row["regression"] for row in rest)
    assert compare(new, old, "--json").exit_code == 0, "the other way round it is faster"
    assert compare(old, new, "--min-effect", "0.2").exit_code == 0


def test_the_table_and_only_what_changed(tmp_path: Path) -> None:
    old, new = pair(tmp_path, 0.08)
    whole, changed = compare(old, new).stdout, compare(old, new, "--only-changed").stdout
    assert "SLOWER" in whole
    assert "SAME" in whole
    assert "SLOWER" in changed
    assert "SAME" not in changed
    assert len(rows_of(compare(old, new, "--only-changed", "--json"))) == 1


def test_too_few_replicates_are_unsure(tmp_path: Path) -> None:
    old, new = pair(tmp_path, 0.5)
    rewrite(new, lambda record: record if record.replicate < 2 else None)
    done = compare(old, new, "--json")
    assert done.exit_code == 0
    found = [row for row in rows_of(done) if row["metric"] == "latency"]
    assert {row["verdict"] for row in found} == {"UNSURE"}
    assert {row["reason"] for row in found} == {"2 replicates on one side; 3 are needed"}


def test_another_control_and_none(tmp_path: Path) -> None:
    old, new = pair(tmp_path, 0.08)
    done = compare(old, new, "--control", "arm3", "--json")
    assert done.exit_code == 3
    assert {row["control"] for row in rows_of(done) if row["metric"] == "latency"} >= {"arm3"}
    plain = compare(old, new, "--control", "none", "--json")
    assert "control none" in plain.stderr
    assert {row["control"] for row in rows_of(plain) if row["metric"] == "latency"} == {"none"}
    missing = compare(old, new, "--control", "torch-nothing")
    assert missing.exit_code == 2
    assert "torch-nothing" in missing.stderr


def test_a_control_that_has_changed_itself_is_refused(tmp_path: Path) -> None:
    old, new = pair(tmp_path)
    rewrite(new, lambda record: record.model_copy(update={"provider_hash": "1"} if record.provider == "gemm" else {}))
    done = compare(old, new)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert "gemm" in line
    assert "--control" in line
    assert compare(old, new, "--control", "none").exit_code == 0


@pytest.mark.parametrize("status", ["failed", "inaccurate", "crashed", "timeout", "out_of_memory"])
def test_what_is_not_measured_any_more_is_a_regression(tmp_path: Path, status: str) -> None:
    old, new = pair(tmp_path)
    identity = {name for name, field in Record.model_fields.items() if field.is_required()}

    def broken(record: Record) -> Record:
        if record.point_id != "b1a2":
            return record
        kept = record.model_dump(include=identity | {"replicate", "provider_hash", "role"})
        return Record(**{**kept, "status": status, "reason": "it broke"})

    rewrite(new, broken)
    done = compare(old, new, "--json")
    assert done.exit_code == 3
    first = rows_of(done)[0]
    assert (first["point_id"], first["verdict"], first["metric"]) == ("b1a2", "BROKEN", "status")
    assert "it broke" in first["reason"]


def test_points_of_one_run_only_are_named(tmp_path: Path) -> None:
    old, new = pair(tmp_path)
    rewrite(new, lambda record: None if record.point_id == "b0a1" else record)
    done = compare(old, new, "--json")
    assert done.exit_code == 0
    assert [row["verdict"] for row in rows_of(done) if row["point_id"] == "b0a1"] == ["GONE"]


@pytest.mark.parametrize(
    ("column", "factor", "metric", "verdict"),
    [
        ("peak_memory_bytes", 2.0, "memory", "HIGHER"),
        ("peak_memory_bytes", 0.5, "memory", "LOWER"),
        ("rel_error", 5.0, "error", "HIGHER"),
        ("energy_j_per_token", 1.5, "energy", "HIGHER"),
        ("energy_j_per_token", 1.0, "energy", "SAME"),
    ],
)
def test_memory_error_and_energy_are_compared(
    tmp_path: Path, column: str, factor: float, metric: str, verdict: str
) -> None:
    old, new = pair(tmp_path)
    base = {"peak_memory_bytes": 100 << 20, "rel_error": 1e-3, "energy_j_per_token": 0.5}[column]
    for run, value in ((old, base), (new, factor * base)):
        value = int(value) if column == "peak_memory_bytes" else value
        rewrite(run, lambda record, value=value: record.model_copy(update={column: value}))
    done = compare(old, new, "--json")
    found = {row["verdict"] for row in rows_of(done) if row["metric"] == metric}
    assert found == {verdict}
    assert done.exit_code == (3 if verdict == "HIGHER" else 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": "Another"}, "device"),
        ({"device_kind": "cuda"}, "device_kind"),
        ({"run_id": "old"}, "the same run"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    done = compare(*pair(tmp_path, **change))
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert said in line


def test_what_differs_is_named(tmp_path: Path) -> None:
    changes = {"versions": {"torch": "2.99"}, "machine": {"driver": "555.1", "max_sm_mhz": 1980}}
    old, new = pair(tmp_path, **changes)
    retell(old, versions={"torch": "2.11"}, machine={"driver": "550.0", "max_sm_mhz": 1755})
    said = compare(old, new).stderr
    for word in ("torch: 2.11 then, 2.99 now", "driver: 550.0 then, 555.1 now", "max_sm_mhz: 1755 then, 1980 now"):
        assert word in said


@pytest.mark.parametrize("name", ["timer", "cache", "threads", "modes"])
def test_what_was_measured_in_another_way_has_no_verdict(tmp_path: Path, name: str) -> None:
    values = {"timer": ("cuda_graph", "cuda_events"), "cache": ("cold", "hot"), "threads": (1, 2), "modes": ("a", "b")}
    old, new = pair(tmp_path, 0.5)
    for run, value in zip((old, new), values[name], strict=True):
        rewrite(run, lambda record, value=value: record.model_copy(update={name: value}))
    done = compare(old, new, "--json")
    assert done.exit_code == 0
    found = [row for row in rows_of(done) if row["metric"] == "latency"]
    assert {row["verdict"] for row in found} == {"UNSURE"}
    assert all(name in row["reason"] for row in found)


# Spoiled runs


def truncated(record: Record) -> Record:
    return record.model_copy(update={"sample_round": (record.sample_round or [])[:-1]})


def without_rounds(record: Record) -> Record:
    return record.model_copy(update={"sample_round": None})


def other_rounds(record: Record) -> Record:
    if record.role == "arm":
        return record
    return record.model_copy(update={"sample_round": [n + 1000 for n in record.sample_round or []]})


@pytest.mark.parametrize("spoil", [truncated, without_rounds, other_rounds])
def test_samples_that_cannot_be_paired_are_no_verdict(tmp_path: Path, spoil: Any) -> None:
    old, new = pair(tmp_path, 0.5)
    rewrite(new, spoil)
    done = compare(old, new, "--json")
    assert done.exit_code == 0, done.output
    assert {row["verdict"] for row in rows_of(done) if row["metric"] == "latency"} <= {"UNSURE"}


def test_a_run_with_nothing_measured(tmp_path: Path) -> None:
    old, new = pair(tmp_path)
    identity = {name for name, field in Record.model_fields.items() if field.is_required()}

    def skipped(record: Record) -> Record:
        kept = record.model_dump(include=identity | {"replicate", "role"})
        return Record(**{**kept, "status": "skipped", "reason": "no time"})

    rewrite(new, skipped)
    done = compare(old, new, "--json")
    assert done.exit_code == 0, done.output
    assert {row["metric"] for row in rows_of(done)} == {"status"}
    assert {row["verdict"] for row in rows_of(done)} == {"CHANGED"}


def test_folders_that_are_no_runs_are_one_line(tmp_path: Path) -> None:
    old, new = pair(tmp_path)
    (tmp_path / "empty").mkdir()
    for words in ((old, tmp_path / "nothing"), (tmp_path / "empty", new), (old, old)):
        done = compare(*words)
        assert done.exit_code == 2
        assert len(done.stderr.splitlines()) == 1
    (new / "results.parquet").write_bytes(b"PAR1 and then nothing")
    done = compare(old, new)
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1


def test_a_run_of_a_journal_only_is_compared(tmp_path: Path) -> None:
    from moebench.journal import Journal

    old, new = pair(tmp_path, 0.08)
    (new / "results.parquet").unlink()
    samples = two_runs(QUIET_GPU, PLAN, np.random.default_rng(1), np.log1p(np.eye(1, PLAN.points)[0] * 0.08))[1]
    Journal(new / "journal.jsonl").append(records_of(samples, "new"))
    retell(new, finished=None)
    done = compare(old, new, "--json")
    assert done.exit_code == 3
    assert "not complete" in done.stderr


def test_every_verdict_is_known() -> None:
    assert set(VERDICTS) >= {"SAME", "FASTER", "SLOWER", "UNSURE", "HIGHER", "LOWER", "BROKEN"}
