"""Two runs into one folder; a clock that is set back; a folder that turns read-only; SIGTERM at any message."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import tempfile
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from faults.fault_checks import PER_BLOCK, complete, contents, second_block
from pipeline.test_run_directory import as_nobody
from pipeline.test_stopped_processes import ended, straw, until  # noqa: F401 - straw is a fixture
from pipeline.tiny import CHECKOUT, records

from moebench.failures import RunError
from moebench.options import Options
from moebench.run import run_suite

MESSAGES = ("open", "arm", "yardstick", "check", "warm", "memory", "state_begin", "burst", "recheck", "state_end")
NOBODY = 65534


# Two runs into one folder


def test_the_second_run_is_refused_and_the_first_does_not_notice(tmp_path, straw):  # noqa: F811
    run = tmp_path / "run"
    words = ["run", "suite", "tiny.toml", "--out", "run", "--no-report"]
    first = straw(*words, pause="fsync")
    until((tmp_path / "mark").exists, first)
    kept, before = records(run), contents(run)
    assert len(kept) == PER_BLOCK
    for more in ([], ["--resume"]):
        code, out, err = ended(straw(*words, *more))
        assert (code, out) == (2, "")
        assert err.splitlines()[-1].startswith("moebench: run ")
        assert ("is being written by another run" in err) or ("exists and is not empty" in err and not more)
    assert contents(run) == before
    (tmp_path / "mark.on").touch()
    assert ended(first)[0] == 0
    complete(run, blocks=3, kept=kept)


def test_a_run_that_was_killed_leaves_no_lock(tmp_path, straw):  # noqa: F811
    words = ["run", "suite", "tiny.toml", "--out", "run", "--no-report"]
    first = straw(*words, pause="fsync")
    until((tmp_path / "mark").exists, first)
    first.kill()
    first.communicate()
    assert ended(straw(*words, "--resume"))[0] == 0
    complete(tmp_path / "run", blocks=3)


# A clock that is set back


class Backwards(datetime):
    """Each look at the clock finds it an hour earlier."""

    looks = 0

    @classmethod
    def now(cls, tz=None):
        cls.looks += 1
        return datetime(2030, 1, 1, tzinfo=tz) - timedelta(hours=cls.looks)


def test_a_clock_that_runs_backwards_changes_the_dates_and_nothing_else(tmp_path, crew, go, monkeypatch):
    Backwards.looks = 0
    monkeypatch.setattr("moebench.manifest.datetime", Backwards)
    monkeypatch.setattr(time, "time", lambda: 1e9 - Backwards.looks)
    crew.cues["torch-bmm", "burst"] = lambda: stopped() if second_block(crew) else {}
    assert go().interrupted
    crew.cues.clear()
    kept = records(tmp_path / "run")
    assert len(kept) == PER_BLOCK
    assert go(resume=True).exit_code == 0
    complete(tmp_path / "run", blocks=3, kept=kept)
    assert Backwards.looks >= 3, "the start and two ends"


def stopped():
    raise KeyboardInterrupt


def test_two_runs_begun_in_the_same_second_are_two(tmp_path, crew, go, suite, monkeypatch):
    """As a machine without a battery begins every day in the same second."""
    monkeypatch.setattr("moebench.manifest.now", lambda: "2030-01-01T00:00:00+00:00")
    names = set()
    for _ in range(2):
        run_suite(suite, Options(tmp_path / "run"))
        names |= {row.run_id for row in records(tmp_path / "run")}
        shutil.rmtree(tmp_path / "run")
    assert len(names) == 2


def test_nothing_but_dates_and_names_of_folders_asks_for_the_time_of_day():
    asked = {
        path.relative_to(CHECKOUT / "moebench").as_posix()
        for path in (CHECKOUT / "moebench").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("time", "time_ns", "now", "utcnow", "today", "localtime")
        and isinstance(node.value, ast.Name) and node.value.id in ("time", "datetime", "date")
    }  # fmt: skip
    assert asked <= {"manifest.py", "cli_run.py", "audit/saved.py"}, asked
    assert "manifest.py" in asked, "the walk finds what is there"


# Read-only in the middle


@pytest.fixture
def nobodys():
    """A folder that someone without privileges may write."""
    folder = Path(tempfile.mkdtemp(prefix="moebench-test-"))
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("what", ["the journal", "the folder"])
def test_a_folder_that_becomes_read_only_in_the_middle(nobodys, crew, suite, what):
    run = nobodys / "run"
    closed = {"the journal": run / "journal.jsonl", "the folder": run}[what]

    def close():
        if second_block(crew):
            closed.chmod(0o500 if closed.is_dir() else 0o400)
        return {}

    crew.cues["torch-bmm", "burst"] = close
    with as_nobody():
        with pytest.raises(RunError, match=r"run cannot be written any more: Permission denied; what .* is kept$"):
            run_suite(suite, Options(run))
        kept = records(run)
        assert len(kept) == {"the journal": PER_BLOCK, "the folder": 3 * PER_BLOCK}[what]
        assert crew.workers[-1].ended
        closed.chmod(0o700 if closed.is_dir() else 0o600)
        crew.cues.clear()
        assert run_suite(suite, Options(run, resume=True)).exit_code == 0
        complete(run, blocks=3, kept=kept)


# SIGTERM


@pytest.mark.parametrize("message", MESSAGES)
def test_sigterm_at_any_message_of_the_second_block(tmp_path, crew, go, message):
    about = {"yardstick": "copy", "open": "", "state_begin": "", "state_end": ""}.get(message, "torch-bmm")
    crew.cues[about, message] = lambda: os.kill(os.getpid(), signal.SIGTERM) or {} if second_block(crew) else {}
    assert go().exit_code == 130
    kept = records(tmp_path / "run")
    assert len(kept) == PER_BLOCK
    crew.cues.clear()
    assert go(resume=True).exit_code == 0
    assert {row.status for row in complete(tmp_path / "run", blocks=3, kept=kept)} == {"measured"}
