"""results.parquet and run directories: whole or not at all, and clear errors."""

import pandas as pd
import pyarrow.parquet as pq
import pytest
from analyse.tables import record
from report.synthetic import make_manifest, make_run

from moebench.analyse import load_run, load_runs, write_results
from moebench.record import COLUMNS


def test_every_column_comes_back_as_it_was_written(tmp_path):
    rows = [record("a", [1.0, 2.0, 4.0], flags=["few_samples"]), record("b", status="failed", reason="no such kernel")]
    write_results(rows, tmp_path / "results.parquet")
    read = pq.read_table(tmp_path / "results.parquet")
    assert tuple(read.column_names) == COLUMNS
    assert read.to_pylist() == [row.model_dump() for row in rows]


def test_columns_keep_their_types_when_everything_is_null(tmp_path):
    for name, rows in (("none", []), ("failed", [record("b", status="failed", reason="x")])):
        write_results(rows, tmp_path / name)
    empty, failed = pq.read_schema(tmp_path / "none"), pq.read_schema(tmp_path / "failed")
    assert empty.equals(failed)
    assert str(empty.field("samples_ms").type) == "list<element: double>"
    assert str(empty.field("peak_memory_bytes").type) == "int64"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "results.parquet"
    write_results([record("a", [1.0])], path)
    before = path.read_bytes()

    def stream():
        yield record("b", [1.0])
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_results(stream(), path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["results.parquet"]


def test_journal_is_read_where_the_run_was_cut_short(tmp_path):
    whole = load_run(make_run(tmp_path / "whole"))
    cut = load_run(make_run(tmp_path / "cut", journal=True))
    pd.testing.assert_frame_equal(whole.table, cut.table)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: (run / "manifest.json").unlink(), "not a run directory"),
        (lambda run: (run / "manifest.json").write_text("{"), "manifest.json: whole file"),
        (lambda run: (run / "manifest.json").write_text('{"run_id": 3}'), r"manifest.json: run_id"),
        (lambda run: (run / "results.parquet").write_bytes(b"PAR1 cut"), "not a readable Parquet"),
        (lambda run: pd.DataFrame({"run_id": ["x"]}).to_parquet(run / "results.parquet"), "lacks the column block_id"),
        (lambda run: (run / "results.parquet").unlink(), "holds neither"),
        (
            lambda run: (run / "manifest.json").write_text(
                make_manifest().model_copy(update={"schema_version": 99}).model_dump_json()
            ),
            "schema_version is 99",
        ),
    ],
)
def test_damage_is_named_in_one_line(tmp_path, break_it, message):
    run = make_run(tmp_path / "run")
    break_it(run)
    with pytest.raises(ValueError, match=message) as caught:
        load_run(run)
    assert "\n" not in str(caught.value)


def test_no_directory_and_the_same_run_twice_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such run directory"):
        load_run(tmp_path / "nowhere")
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="the same run as"):
        load_runs([run, run])
