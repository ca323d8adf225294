"""`moebench publish`: the right folder, whole or not at all, the same bytes twice; what is unfit is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from analyse.tables import record
from click.testing import CliRunner
from pipeline.tiny import environment, write_suite
from report.synthetic import HOSTILE, grow, make_manifest, make_run
from report.test_page import run_of

from moebench.analyse import load_run
from moebench.cli import main
from moebench.options import Options
from moebench.report import publish as publishing
from moebench.report.publish import folder_name, publish
from moebench.run import run_suite
from moebench.run_directory import RunDirectoryError
from moebench.suite import load_suite

H200 = {
    "device": "NVIDIA H200", "device_kind": "cuda", "started_at": "2026-12-01T23:30:00-02:00",
    "hardware": {"name": "H200-SXM-141GB", "bf16_dense_tflops": 989.0, "mem_bw_gbs": 4800.0, "source": "data sheet"},
    "machine": {"gpu": "NVIDIA H200", "driver": "570.86", "power_limit_w": 700.0},
    "ceilings": {"gemm_tflops": {"bf16": 700.0}, "copy_gbs": 4000.0, "read_gbs": None},
}  # fmt: skip


def cli(*words):
    result = CliRunner().invoke(main, ["publish", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*words):
    """The one line that a refusal says."""
    result = cli(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    return line.removeprefix("moebench: ")


def changed(run, **manifest):
    facts = json.loads((run / "manifest.json").read_text()) | manifest
    (run / "manifest.json").write_text(json.dumps(facts))
    return run


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def small(tmp_path):
    """A run with one problem and next to nothing to draw."""
    lost = record("copy", status="failed", reason="x", role="yardstick")
    return run_of(tmp_path / "small", record("triton", [1.0, 1.1] * 4), record("torch-loop", [2.0, 2.1] * 4), lost)


@pytest.fixture
def undrawn(monkeypatch):
    """Without figures, which take most of the time."""
    monkeypatch.setattr(publishing, "figures", lambda *_: iter(()))


# What is published


def test_a_folder_holds_manifest_results_page_and_figures_and_is_the_same_twice(tmp_path):
    run = make_run(tmp_path / "run", tokens=(1, 16))
    done = cli(run, "--into", tmp_path / "reports")
    folder = tmp_path / "reports" / "2026-10-01-synthetic-cpu-2-cores-quick"
    assert (done.exit_code, done.stdout.split()) == (0, [str(folder)])
    figures = {f"figures/{kind}.png" for kind in ("radar", "latency", "pareto", "roofline")}
    once = contents(folder)
    assert once.keys() == {"manifest.json", "results.parquet", "report.md", *figures}
    assert sum(map(len, once.values())) < 500_000
    assert os.listdir(tmp_path / "reports") == [folder.name]
    (again,) = publish([run], tmp_path / "again")
    assert contents(again.path) == once
    page = once["report.md"].decode()
    assert all(f"]({name})" in page for name in figures)


def test_a_copy_is_read_reported_and_published_as_the_run_itself_but_not_resumed(tmp_path, undrawn):
    suite = load_suite([str(write_suite(tmp_path))])
    (done,) = publish([make_run(tmp_path / "run", tokens=(1, 16))], tmp_path / "reports")
    before = contents(done.path)
    run = load_run(done.path)
    assert run.table.equals(load_run(tmp_path / "run").table)
    page = CliRunner().invoke(main, ["report", str(done.path), "--out", str(tmp_path / "page.html")])
    assert page.exit_code == 0
    with pytest.raises(RunDirectoryError, match="is a published copy, which has no journal; resume the run itself"):
        run_suite(suite, Options(done.path, resume=True))
    assert contents(done.path) == before, "not even a lock is left"
    publish([done.path], tmp_path / "reports", replace=True)
    assert contents(done.path) == before


def test_copies_are_compared_as_their_runs_are(tmp_path, undrawn):
    runs = [make_run(tmp_path / name, run_id=name, seed=n) for n, name in enumerate(("old", "new"))]
    copies = [done.path for done in publish(runs, tmp_path / "reports")]
    copies.sort(key=lambda path: load_run(path).manifest.run_id != "old")
    said = [CliRunner().invoke(main, ["compare", "--json", *map(str, pair)]) for pair in (runs, copies)]
    assert said[0].exit_code == said[1].exit_code
    assert said[0].stdout == said[1].stdout


def test_numbers_are_as_measured_and_private_text_is_not_there(tmp_path, undrawn):
    own = "/home/alice/k.py:f"
    rows = [
        record(own, [1.1, 1.2] * 4, flags=["throttled"]),
        record("torch-bmm", status="crashed", reason="in /home/alice/x.py"),
    ]
    run = run_of(tmp_path / "run", *rows, command=f"moebench run suite --provider {own}", joined=[own])
    result = cli(run, "--into", tmp_path / "reports")
    (folder,) = (tmp_path / "reports").iterdir()
    assert f"cleaned of private text in {folder}: joined, command, column provider, column reason" in result.stderr
    table = pq.read_table(folder / "results.parquet")
    assert table["samples_ms"].to_pylist() == [[1.1, 1.2] * 4, None]
    assert table["flags"].to_pylist() == [["throttled"], []]
    assert table["status"].to_pylist() == ["measured", "crashed"]
    assert all(b"alice" not in text for text in contents(folder).values())


def test_the_page_says_what_where_how_and_what_is_missing(tmp_path, undrawn):
    energy = {"energy_source": "nvml", "energy_j_per_token": 0.0123456, "energy_j_per_token_low": 0.012}
    energy |= {"energy_j_per_token_high": 0.013, "energy_net_j_per_token": 0.01, "energy_idle_w": 70.0}
    rows = [
        record("triton", [1.0, 1.01] * 4, precision="bf16", s_mbu=0.7, flags=["throttled"], **energy),
        record("torch-grouped", [2.0, 2.01] * 4, precision="bf16"),
        record("deepgemm", status="unavailable", reason="not | installed", precision="bf16"),
    ]
    facts = H200 | {"suite": "h200-decode", "git_dirty": True, "git_commit": "abc123"}
    run = run_of(tmp_path / "run", *rows, command="moebench run suite h200-decode", **facts)
    (done,) = publish([run], tmp_path / "reports")
    assert done.path.name == "2026-12-02-h200-decode"
    page = (done.path / "report.md").read_text(encoding="utf-8")
    for line in (
        "# h200-decode on NVIDIA H200",
        "> **Measured from a checkout with uncommitted changes:** its commit alone does not reproduce it.",
        "| device | NVIDIA H200 · driver 570.86 · limit 700 W |",
        "To measure it again, on commit `abc123`:",
        "moebench run suite h200-decode",
        "| tokens | triton | torch-grouped | deepgemm | S-MBU % | triton against best other |",
        "| 16 | **1.00** ᵃ | 2.00 | unavailable | 70.0 | 2.00× (1.99–2.00) |",
        "|  | measured | data sheet (H200-SXM-141GB) | share |",
        "| bf16 GEMM, TFLOP/s | 700 | 989 | 70.8 % |",
        "| copy, GB/s | 4,000 | 4,800 | 83.3 % |",
        "| read, GB/s | — | 4,800 | — |",
        "| olmoe-1b-7b · 16 tokens · triton | 12.3 | 12.0–13.0 | 10.0 | 70.0 | — |",
        r"| unavailable | not \| installed | 1 | deepgemm |",
        "| ᵃ | throttled | 1 | the GPU lowered its clock |",
    ):
        assert line in page.splitlines(), page
    assert "triton wins, 2.00× (1.99–2.00) faster than torch-grouped" in page


def test_a_run_without_one_measured_row_is_published_as_it_is(tmp_path):
    run = run_of(tmp_path / "run", record("triton", status="failed", reason="no kernel image"))
    (done,) = publish([run], tmp_path / "reports")
    assert contents(done.path).keys() == {"manifest.json", "results.parquet", "report.md"}
    page = (done.path / "report.md").read_text(encoding="utf-8")
    assert "Nothing was timed." in page
    assert "| failed | no kernel image | 1 | triton |" in page


def test_a_large_run_still_has_a_short_page(tmp_path, undrawn):
    run = grow(make_run(tmp_path / "run", rounds=3), 5001)
    (done,) = publish([run], tmp_path / "reports")
    assert pq.read_metadata(done.path / "results.parquet").num_rows == 5001
    page = (done.path / "report.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) < 250
    assert "more verdicts not shown; `results.parquet` has all." in page
    assert "more tables not shown; `results.parquet` has all." in page


def test_hostile_text_is_no_markup_and_leaves_every_table_its_columns(tmp_path, undrawn):
    name = "a|b\n# c\n| d | `e` ![f](g) :smile: www.evil.example $x$ \u202e\u0000"
    run = make_run(tmp_path / "run", hostile=True, tokens=(1,))
    changed(run, suite=name, device=f"{HOSTILE}|\n\n# x", question=name)
    (done,) = publish([run], tmp_path / "reports")
    page = (done.path / "report.md").read_text(encoding="utf-8")
    assert "\u202e" not in page
    assert "\0" not in page
    assert not [line for line in page.splitlines() if line.startswith("# ")][1:]
    assert re.search(r"(?<!\\)<", page) is None
    tables = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    assert len(tables) >= 4
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


# Names


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({}, "2026-10-01-synthetic-cpu-2-cores-quick"),
        ({**H200, "suite": "h200-gemm"}, "2026-12-02-h200-gemm"),
        ({**H200, "suite": "quick"}, "2026-12-02-h200-quick"),
        ({**H200, "suite": "h200"}, "2026-12-02-h200"),
        ({"hardware": {"name": "RTX-4090"}}, "2026-10-01-rtx-4090-quick"),
        ({"suite": "../../etc/passwd"}, "2026-10-01-synthetic-cpu-2-cores-etc-passwd"),
        ({"suite": "..", "device": "/"}, "2026-10-01-device-suite"),
        ({"suite": "Größe+數"}, "2026-10-01-synthetic-cpu-2-cores-groe"),
        ({"suite": "x" * 300}, f"2026-10-01-synthetic-cpu-2-cores-{'x' * 60}"),
        ({"started_at": "0001-01-01"}, "0001-01-01-synthetic-cpu-2-cores-quick"),
        ({"started_at": "2026-10-01T09:00:00"}, "2026-10-01-synthetic-cpu-2-cores-quick"),
    ],
)
def test_names(facts, name):
    assert folder_name(make_manifest().model_copy(update=facts)) == name


def test_a_second_run_of_a_day_gets_a_number_and_keeps_it(tmp_path, undrawn, small):
    into = tmp_path / "reports"
    later = changed(shutil.copytree(small, tmp_path / "later"), started_at="2026-10-01T10:00:00+00:00", run_id="r9")
    table = pq.read_table(small / "results.parquet")
    place = table.column_names.index("run_id")
    pq.write_table(table.set_column(place, table.schema.field(place), [["r9"] * len(table)]), later / "results.parquet")
    names = [done.path.name for done in publish([later, small], into)]
    assert names == ["2026-10-01-synthetic-cpu-2-cores-quick", "2026-10-01-synthetic-cpu-2-cores-quick-2"]
    before = contents(into)
    assert [done.path.name for done in publish([later], into, replace=True)] == names[1:]
    assert contents(into) == before


# What is refused


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"finished": None}, "{run}: is not finished; go on with:  moebench run suite quick --out {run} --resume"),
        ({"finished": "interrupted"}, "is not finished; go on with:  moebench run suite quick --out"),
        ({"finished": None, "command": "from Python"}, 'go on with:  moebench.api.run(..., out="{run}", resume=True)'),
        ({"check_only": True}, "was run with --check-only, so nothing in it is measured"),
        ({"started_at": "yesterday\n"}, r"started_at: 'yesterday\n' is no time"),
        ({"run_id": "other"}, "results.parquet holds rows of another run ('r')"),
        ({"hardware": {"nme": 1}}, "manifest.json: hardware: unknown column 'nme'"),
        ({"schema_version": 2}, "schema_version is 2"),
    ],
)
def test_a_run_that_is_not_fit_is_refused_in_one_line(tmp_path, undrawn, small, facts, said):
    assert said.format(run=small) in refused(changed(small, **facts), "--into", tmp_path / "reports")
    assert not list((tmp_path / "reports").glob("*")), "nothing is written"


def test_damaged_and_missing_results_are_refused(tmp_path, undrawn, small):
    into = ("--into", tmp_path / "reports")
    path = small / "results.parquet"
    whole = pq.read_table(path)
    pq.write_table(whole.drop_columns(["flags"]), path)
    assert refused(small, *into) == f"{path}: lacks the column flags"
    place = whole.column_names.index("latency_ms")
    pq.write_table(whole.set_column(place, whole.schema.field(place), [[None, 2.0, None]]), path)
    assert refused(small, *into) == f"{path}: row 1: Value error, a measured record needs latency_ms"
    pq.write_table(whole.slice(0, 0), path)
    assert refused(small, *into) == f"{small}: results.parquet has no rows"
    path.write_bytes(b"PAR1 no more")
    assert "not a readable Parquet file of results" in refused(small, *into)
    path.unlink()
    (small / "journal.jsonl").touch()
    assert f"{small}: has no results.parquet; go on with:  moebench" in refused(small, *into)


def test_what_is_no_run_or_given_twice_is_refused(tmp_path, undrawn, small):
    (tmp_path / "link").symlink_to(small)
    assert "no such run directory" in refused(tmp_path / "none")
    assert "not a run directory (it has no manifest.json)" in refused(tmp_path)
    assert "the same run as" in refused(small, tmp_path / "link", "--into", tmp_path / "reports")
    assert f"{small} is a file" not in refused(small, "--into", small / "manifest.json")
    assert "is a file; --into names a folder" in refused(small, "--into", small / "manifest.json")
    assert cli(tmp_path / "link", "--into", tmp_path / "reports").exit_code == 0


def test_what_stands_there_is_not_lost(tmp_path, undrawn, small):
    into = tmp_path / "reports"
    (done,) = publish([small], into)
    line = refused(small, "--into", into)
    assert line == f"{small}: is published already as {done.path}; --replace writes it again"
    (done.path / "notes.md").write_text("mine")
    assert "also holds 'notes.md', which --replace would lose" in refused(small, "--into", into, "--replace")
    (done.path / "notes.md").unlink()
    (done.path / "report.md").write_text("old")
    assert cli(small, "--into", into, "--replace").exit_code == 0
    assert (done.path / "report.md").read_text() != "old"
    shutil.rmtree(done.path)
    done.path.mkdir()
    assert "is in the way, and it is no published run" in refused(small, "--into", into, "--replace")


def test_of_several_runs_none_is_written_where_one_is_not_fit(tmp_path, undrawn, small):
    other = changed(shutil.copytree(small, tmp_path / "other"), finished=None, run_id="r2")
    refused(small, other, "--into", tmp_path / "reports")
    assert not (tmp_path / "reports").exists()


# Whole or not at all


def test_a_write_that_fails_leaves_what_was_there(tmp_path, undrawn, small, monkeypatch):
    into = tmp_path / "reports"
    (done,) = publish([small], into)
    before = contents(into)

    def full(*_args, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publishing, "page", full)
    result = cli(small, "--into", into, "--replace")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert contents(into) == before
    assert os.listdir(into) == [done.path.name]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_publish_leaves_nothing_half_written(tmp_path, small, number):
    """It is stopped while it draws."""
    program = """
import sys, time
from pathlib import Path
from moebench.report import publish as publishing
def slow(*_):
    print("drawing", flush=True)
    time.sleep(60)
publishing.figures = slow
publishing.publish([Path(sys.argv[1])], Path(sys.argv[2]))
"""
    into = tmp_path / "reports"
    words = [sys.executable, "-c", program, str(small), str(into)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment()) as process:
        assert process.stdout.readline() == b"drawing\n"
        process.send_signal(number)
    left = os.listdir(into)
    assert all(name.startswith(".") for name in left), left
    assert (number == signal.SIGKILL) == bool(left)
    (done,) = publish([small], into)
    assert os.listdir(into) == [done.path.name], "the next one sweeps up"


def test_a_folder_that_cannot_be_put_in_its_place_leaves_the_old_one_there(tmp_path, undrawn, small, monkeypatch):
    (done,) = publish([small], tmp_path / "reports")
    before = contents(tmp_path)
    rename = Path.rename

    def fails(self, target):
        if self.suffix == ".partial" and not Path(target).suffix:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Input/output error"):
        publish([small], tmp_path / "reports", replace=True)
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path / "reports") == [done.path.name]
