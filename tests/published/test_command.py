"""`python -m moebench_suites.published` on a checkout of straw, and on this one."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner
from moebench_suites.published.__main__ import NOTES, README, REPORTS, main
from pipeline.tiny import CHECKOUT, environment
from published.straw_runs import publish, timed


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    for page in (README, REPORTS, NOTES):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(CHECKOUT / page, tmp_path / page)
    monkeypatch.chdir(tmp_path)
    assert run()[0] == 0  # whatever is published here is not published there
    return tmp_path


def run(*words):
    done = CliRunner().invoke(main, words)
    return done.exit_code, done.output


def test_the_tables_of_this_checkout_are_fresh():
    program = "import sys\nfrom moebench_suites.published.__main__ import main\ntry: main(['--check'])\n" + (
        "except SystemExit as end: print(end.code, sorted({'torch', 'triton', 'plotly'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=CHECKOUT, env=environment(), capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("0 []\n", "")


def test_a_new_run_makes_tables_stale_until_they_are_written(checkout):
    publish(checkout / "reports", "h200-decode", [timed("triton", 1.0), timed("liger", 2.0)])
    code, said = run("--check")
    stale = [f"{README}: headline", f"{REPORTS}: index", f"{REPORTS}: layer", f"{NOTES}: targets"]
    assert code == 1
    assert said.splitlines() == [f"{block} is stale; `make published` writes it anew" for block in stale]
    assert run() == (0, "".join(f"{block}\n" for block in stale))
    assert "2.00× (2.00–2.00)" in (checkout / README).read_text()
    before = [(checkout / page).read_text() for page in (README, REPORTS, NOTES)]
    assert run("--check") == run() == (0, "")
    assert [(checkout / page).read_text() for page in (README, REPORTS, NOTES)] == before


def test_runs_elsewhere(checkout, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    publish(elsewhere, "h200-decode", [timed("triton", 1.0)])
    assert run("--reports", str(elsewhere))[0] == 0
    assert run("--check", "--reports", str(elsewhere)) == (0, "")
    assert f"{elsewhere.name}/2026-11-27-h200-h200-decode-0/)" in (checkout / REPORTS).read_text()
    assert run("--check")[0] == 1


def test_a_broken_folder_or_page_is_one_line_and_nothing_is_written(checkout):
    before = (checkout / README).read_text()
    publish(checkout / "reports", "h200-decode", [timed("triton", 1.0)])
    notes = (checkout / NOTES).read_text()
    (checkout / NOTES).write_text(notes.replace("<!-- published: targets -->", ""))
    assert run()[0] == 2
    assert f"Error: {NOTES}: line" in run()[1]
    assert (checkout / README).read_text() == before
    (checkout / NOTES).write_text(notes)
    (checkout / "reports" / "draft").mkdir()
    assert run() == (2, "Error: reports/draft: not a run directory (it has no manifest.json)\n")
    assert (checkout / README).read_text() == before


def test_somewhere_else_than_at_the_top_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run() == (2, "Error: reports: no such folder\n")
    (tmp_path / "reports").mkdir()
    assert run() == (2, "Error: README.md: no such file; run this at the top of a checkout of moebench\n")
