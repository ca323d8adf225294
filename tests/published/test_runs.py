"""Reading reports/: order, which run counts, and folders that are none."""

from __future__ import annotations

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moebench_suites.published.runs import command, counting, gpus, read_published
from published.straw_runs import CPU, H100, H200, described, publish, timed, untimed

ROWS = [timed("triton", 1.0), untimed("torch-bmm")]


def test_newest_first_and_of_two_runs_of_a_suite_on_a_device_the_newer_counts(tmp_path):
    publish(tmp_path, "h200-gemm", ROWS, started="2026-11-27T12:00:00+00:00")
    publish(tmp_path, "h200-gemm", ROWS, started="2026-11-27T14:00:00+02:30")  # half an hour before
    publish(tmp_path, "h200-gemm", ROWS, H100, started="2026-11-20T00:00:00")
    found = read_published(tmp_path)
    assert [(each.manifest.device, f"{each.when:%d}", each.counts) for each in found] == [
        (H200, "27", True), (H200, "27", False), (H100, "20", True),
    ]  # fmt: skip
    assert found[0].manifest.started_at == "2026-11-27T12:00:00+00:00"
    assert [each.manifest for each in counting(found, H200, ["h200-gemm"])] == [found[0].manifest]
    assert counting(found, H200, ["h200-train"]) == []
    assert gpus(found) == [H100, H200]


def test_shares_of_a_suite_count_side_by_side(tmp_path):
    for started, shard in (("2026-11-27", (1, 2)), ("2026-11-28", (2, 2)), ("2026-11-29", (1, 2))):
        publish(tmp_path, "h200-gemm", ROWS, started=started, shard=shard)
    assert [each.counts for each in read_published(tmp_path)] == [True, True, False]


def test_nothing_and_files_and_hidden_folders(tmp_path):
    (tmp_path / "README.md").write_text("x")
    (tmp_path / ".git").mkdir()
    assert read_published(tmp_path) == []
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        read_published(tmp_path / "nowhere")


def refused(tmp_path):
    with pytest.raises(ValueError, match=r"^\S") as error:
        read_published(tmp_path)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{tmp_path}/")


def test_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "notes").mkdir()
    assert refused(tmp_path) == "notes: not a run directory (it has no manifest.json)"


def test_a_run_without_results(tmp_path):
    folder = publish(tmp_path, "s", ROWS)
    (folder / "results.parquet").unlink()
    assert refused(tmp_path).startswith(f"{folder.name}: holds neither results.parquet nor journal.jsonl")
    (folder / "journal.jsonl").touch()
    assert refused(tmp_path) == f"{folder.name}: has no results.parquet"


def test_a_run_that_was_not_published_may_hold_private_text(tmp_path):
    folder = publish(tmp_path, "s", ROWS, published=None)
    assert refused(tmp_path) == f"{folder.name}: was not written by `moebench publish`"


@pytest.mark.parametrize(
    ("name", "content"), [("manifest.json", b"{}"), ("manifest.json", b"\xff\x00"), ("results.parquet", b"PAR1")]
)
def test_damaged_files(tmp_path, name, content):
    folder = publish(tmp_path, "s", ROWS)
    (folder / name).write_bytes(content)
    assert refused(tmp_path).startswith(f"{folder.name}/{name}: ")


def test_a_date_that_is_none(tmp_path):
    folder = publish(tmp_path, "s", ROWS)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "started_at": "last <b>night</b>"}))
    assert refused(tmp_path).endswith("started_at is 'last <b>night</b>', which is no date")


def test_a_run_that_stands_there_twice(tmp_path):
    shutil.copytree(publish(tmp_path, "s", ROWS), tmp_path / "copy")
    assert "the same run as" in refused(tmp_path)


def test_results_of_another_run(tmp_path):
    one, other = publish(tmp_path, "s", ROWS), publish(tmp_path, "s", ROWS, H100)
    shutil.copy(other / "results.parquet", one)
    assert refused(tmp_path).endswith("results.parquet: row 1 is of another run or device than manifest.json")


def test_a_number_where_nothing_was_measured(tmp_path):
    path = publish(tmp_path, "s", ROWS) / "results.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("status")
    pq.write_table(table.set_column(place, "status", pa.array(["failed", "failed"])), path)
    assert "results.parquet: row 1: Value error, status 'failed' cannot carry timer" in refused(tmp_path)


def test_a_run_is_repeated_by_its_suite_and_options_and_by_no_folder():
    assert command(described("h200-gemm")) == "`moebench run suite h200-gemm`"
    options = {"overrides": {"tokens": [1, 8], "model": ["a|b`<!-- end of published -->\n"]}, "shard": (1, 2)}
    found = command(described("h200-gemm", **options, joined=["torch-loop"], command="moebench run --out /home/me/x"))
    assert found == (
        "`moebench run suite h200-gemm --set tokens=1,8 --set model=a?b??!-- end of published --? "
        "--provider torch-loop --shard 1/2`"
    )


def test_a_cpu_is_no_gpu(tmp_path):
    publish(tmp_path, "quick", ROWS, CPU)
    assert gpus(read_published(tmp_path)) == []
