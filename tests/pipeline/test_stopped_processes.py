"""Real processes stopped by Ctrl-C, SIGTERM, kill -9 or a full disk; then the same command with --resume."""

import json
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from pipeline.stand_in import Crew
from pipeline.test_remote import gone
from pipeline.tiny import environment, records, write_suite, written_points

from moebench.options import Options
from moebench.run import run_suite
from moebench.suite import load_suite

STAND_IN = Path(__file__).with_name("stand_in.py")
TOKENS = [4, 8, 16]
PER_BLOCK = 5


@pytest.fixture
def straw(tmp_path):
    """Starts `moebench ...` with a worker of straw, in a process group of its own."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(STAND_IN))} serve\n")
    python.chmod(0o755)
    write_suite(tmp_path, tokens=TOKENS)

    def start(*words, pause="", **options):
        more = {"STAND_IN_PYTHON": str(python), "STAND_IN_PAUSE": pause, "STAND_IN_MARK": str(tmp_path / "mark")}
        return started([str(STAND_IN), "run", *words], tmp_path, environment(**more), **options)

    return start


def started(words, folder, env, limit=lambda: None):
    def prepare():
        # A test run started in the background by a shell ignores SIGINT, and children would inherit that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        limit()

    return subprocess.Popen(
        [sys.executable, *words], cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, preexec_fn=prepare,
    )  # fmt: skip


def ended(process):
    """(exit code, stdout, stderr); never with a traceback."""
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def until(happened, process, seconds=120.0):
    """Wait for something to happen while the process runs."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers_of(run):
    """Processes whose stderr is the run's worker.log."""
    log = str(run / "worker.log")
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "fd" / "2") == log:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def no_worker_left(run):
    return all(gone(pid) for pid in workers_of(run))


def every_point_once(run):
    rows = records(run)
    keys = sorted((row.point_id, row.replicate) for row in rows)
    table = pd.read_parquet(run / "results.parquet")
    assert sorted(zip(table["point_id"], table["replicate"], strict=True)) == keys
    assert len(keys) == len(set(keys)) == len(TOKENS) * PER_BLOCK
    return rows


# Ctrl-C and SIGTERM


@pytest.mark.parametrize(
    ("number", "where", "written"),
    [
        (signal.SIGINT, "burst", 0),
        (signal.SIGINT, "fsync", PER_BLOCK),
        (signal.SIGTERM, "results", len(TOKENS) * PER_BLOCK),
    ],
)
def test_a_signal_at_any_moment_then_the_printed_command(tmp_path, straw, number, where, written):
    run = tmp_path / "run"
    process = straw("run", "suite", "tiny.toml", "--out", "run", "--no-report", pause=where)
    until((tmp_path / "mark").exists, process)
    os.killpg(process.pid, number)  # the terminal sends it to the whole group
    code, _, err = ended(process)
    assert code == 130
    assert len(records(run)) == written
    assert no_worker_left(run)
    command = re.search(r"go on with:  moebench (.*)", err).group(1)
    assert command == "run suite tiny.toml --out run --no-report --resume"
    assert ended(straw(*shlex.split(command)))[0] == 0
    assert {row.status for row in every_point_once(run)} == {"measured"}
    assert len(written_points(run)) == len(TOKENS) * PER_BLOCK


# kill -9


def test_a_worker_killed_from_outside_costs_the_point_in_flight(tmp_path, straw):
    run = tmp_path / "run"
    process = straw("run", "suite", "tiny.toml", "--out", "run", "--no-report", pause="burst")
    until((tmp_path / "mark").exists, process)
    (worker,) = workers_of(run)
    os.kill(worker, signal.SIGKILL)
    code, _, _ = ended(process)
    crashed = [row for row in every_point_once(run) if row.status != "measured"]
    assert [(row.status, row.reason) for row in crashed] == [("crashed", "burst: the worker ended with signal SIGKILL")]
    assert code == (0 if crashed[0].role == "yardstick" else 1)
    assert no_worker_left(run)


@pytest.mark.parametrize("where", ["burst", "fsync"])
def test_a_killed_run_leaves_no_worker_and_resumes(tmp_path, straw, where):
    run = tmp_path / "run"
    words = ["run", "suite", "tiny.toml", "--out", "run", "--no-report"]
    process = straw(*words, pause=where)
    until((tmp_path / "mark").exists, process)
    process.kill()
    process.communicate()
    assert no_worker_left(run)
    kept = records(run)
    assert ended(straw(*words, "--resume"))[0] == 0
    rows = every_point_once(run)
    assert all(row in rows for row in kept)


@pytest.mark.slow
def test_kill_9_at_random_moments_with_the_real_worker(tmp_path):
    """Five kills spread over the run, each followed by the same command with --resume; then it ends by itself."""
    run, tokens = tmp_path / "run", [4, 8, 16, 32, 64]
    write_suite(tmp_path, tokens=tokens)
    words = ["-m", "moebench", "run", "suite", "tiny.toml", "--out", "run", "--device", "cpu", "--no-report"]
    moments = random.Random(2)
    kept = {}
    for blocks in range(5):
        resume = ["--resume"] if blocks else []
        process = started([*words, *resume], tmp_path, environment())
        until(lambda blocks=blocks: len(records(run)) >= blocks * PER_BLOCK and (run / "lock").exists(), process)
        time.sleep(moments.uniform(0.0, 0.5 if blocks else 2.0))
        process.kill()
        process.communicate()
        assert no_worker_left(run)
        now = {row.point_id: row for row in records(run)}
        assert all(now[name] == row for name, row in kept.items()), "what was measured is kept as it was"
        kept = now
    assert kept
    code, out, _ = ended(started([*words, "--resume", "--json"], tmp_path, environment()))
    assert code == 0
    (outcome,) = json.loads(out)
    expected = {"path": "run", "report": None, "exit_code": 0, "measured": 2 * len(tokens)}
    assert {name: value for name, value in outcome.items() if not name.endswith("seconds")} == expected
    rows = {(row.point_id, row.replicate): row for row in records(run)}
    assert len(rows) == len(tokens) * PER_BLOCK
    assert {row.tokens for row in rows.values()} == set(tokens)
    assert len(pd.read_parquet(run / "results.parquet")) == len(rows)
    assert {row.status for row in rows.values()} == {"measured"}
    assert all(rows[name, 0] == row for name, row in kept.items())
    assert no_worker_left(run)


# A disk that runs full


PAGE = 4096


def pages(size):
    """Bytes that a file takes in a file system of whole pages."""
    return -(-size // PAGE) * PAGE


@pytest.fixture
def sizes(tmp_path, monkeypatch):
    """Bytes of the manifest, of two blocks' lines and of one block's, as a run that nothing disturbs writes them."""
    with monkeypatch.context() as patch:
        patch.setattr("moebench.run.Remote", Crew().start)
        suite = load_suite([str(write_suite(tmp_path, tokens=TOKENS))])
        run_suite(suite, Options(tmp_path / "clean", command="moebench run suite tiny.toml --out run --no-report"))
    lines = (tmp_path / "clean" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    block = sum(map(len, lines[-PER_BLOCK:]))
    assert block > PAGE, "else a third block would hide in the second's last page"
    return (tmp_path / "clean" / "manifest.json").stat().st_size, sum(map(len, lines[: 2 * PER_BLOCK])), block


@pytest.fixture(params=["file system", "file size"])
def small(request, tmp_path, sizes):
    """(folder, options that make its files end after two blocks of three, a way to end that)."""
    manifest, two_blocks, block = sizes
    if request.param == "file size":
        size = two_blocks + block // 2
        assert size > manifest
        limit = {"limit": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}
        yield tmp_path / "run", limit, lambda: None, "File too large"
        return
    folder = tmp_path / "run"
    folder.mkdir()
    mount = [
        "mount",
        "-t",
        "tmpfs",
        "-o",
        f"size={pages(manifest + 512) + pages(two_blocks + 64)}",
        "moebench-test",
        str(folder),
    ]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small file system")
    grow = ["mount", "-o", "remount,size=1m", str(folder)]
    yield folder, {}, lambda: subprocess.run(grow, check=True), "No space left on device"
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_rest_is_measured_later(tmp_path, straw, small):
    run, limit, grow, why = small
    words = ["run", "suite", "tiny.toml", "--out", "run", "--no-report"]
    code, _, err = ended(straw(*words, **limit))
    said = [line for line in err.splitlines() if line.startswith("moebench: ")]
    assert code == 1, err
    assert said == [f"moebench: run cannot be written any more: {why}; what was measured is kept"]
    kept = records(run)
    assert len(kept) == 2 * PER_BLOCK, "two of three blocks fit"
    assert no_worker_left(run)
    grow()
    assert ended(straw(*words, "--resume"))[0] == 0
    rows = every_point_once(run)
    assert rows[: len(kept)] == kept
    assert len(written_points(run)) == len(rows)
