"""The parent's end of a worker, against small scripts in its place."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from moebench import remote
from moebench.remote import Remote, WorkerLost

ECHO = "while read line; do echo '{\"ok\": true}'; done"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A Remote whose process is a shell script."""
    remotes = []

    def started(script):
        path = tmp_path / f"python{len(remotes)}"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))
        remotes.append(Remote(tmp_path / "worker.log", {"STRAW": "hay"}))
        return remotes[-1]

    yield started
    for each in remotes:
        each.kill()


def lost(worker, do="burst", deadline_s=20.0):
    with pytest.raises(WorkerLost) as error:
        worker.ask(do, deadline_s=deadline_s)
    assert "\n" not in error.value.reason
    return error.value.status, error.value.reason


def gone(pid, seconds=10.0):
    """Whether a process ends soon (a zombie nobody waits for counts)."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_messages_and_replies(start):
    worker = start('read line; echo "{\\"asked\\": $line, \\"env\\": \\"$STRAW\\"}"; ' + ECHO)
    assert worker.ask("burst", deadline_s=20, count=3) == {"asked": {"do": "burst", "count": 3}, "env": "hay"}
    assert worker.ask("close", deadline_s=20) == {"ok": True}


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("read line; exit 3", "burst: the worker ended with exit code 3"),
        ("exit 0", "burst: the worker ended with exit code 0"),
        ("read line; kill -9 $$", "burst: the worker ended with signal SIGKILL"),
        ("read line; kill -SEGV $$", "burst: the worker ended with signal SIGSEGV"),
        ("read line; printf '{\"device_ms\": [1.0, '; exit 1", "burst: the worker ended with exit code 1"),
        ("read line; echo 'Fatal Python error: Aborted' >&2; echo 'more' >&2; kill -ABRT $$",
         "burst: the worker ended with signal SIGABRT (Fatal Python error: Aborted)"),
    ],
)  # fmt: skip
def test_a_death_is_told_with_the_message_in_flight(start, script, reason):
    assert lost(start(script)) == ("crashed", reason)


def test_a_death_between_messages_is_told_with_the_next_one(start):
    worker = start("read line; echo '{}'; exit 5")
    worker.ask("open", deadline_s=20)
    time.sleep(0.2)
    assert lost(worker, "arm") == ("crashed", "arm: the worker ended with exit code 5")


def test_last_words_are_the_workers_own(start, tmp_path):
    (tmp_path / "worker.log").write_text("Fatal Python error: of the worker before\n")
    assert lost(start("read line; exit 3")) == ("crashed", "burst: the worker ended with exit code 3")


def test_what_misses_its_deadline_is_killed(start):
    worker = start("read line; exec sleep 1000")
    assert lost(worker, deadline_s=0.3) == ("timeout", "burst: no answer within 0 s")
    assert gone(worker._process.pid)


def test_killing_reaches_what_the_worker_started(start, tmp_path):
    worker = start(f"sleep 1000 & echo $! > {tmp_path}/child; echo '{{}}'; read line; wait")
    worker.ask("open", deadline_s=20)
    child = int((tmp_path / "child").read_text())
    os.kill(child, 0)
    worker.kill()
    assert gone(child)
    worker.kill()  # twice does no harm


def test_what_the_worker_started_dies_with_it(start, tmp_path):
    worker = start(f"sleep 1000 & echo $! > {tmp_path}/child; read line; exit 3")
    assert lost(worker) == ("crashed", "burst: the worker ended with exit code 3"), "the pipe the child holds hides it"
    assert gone(int((tmp_path / "child").read_text()))


def test_who_closes_the_pipe_and_lives_on_is_ended(start, monkeypatch):
    monkeypatch.setattr(remote, "CLOSED_PIPE_S", 0.1)
    worker = start("read line; exec sleep 1000 >&-")
    assert lost(worker) == ("crashed", "burst: the worker ended with signal SIGKILL")


def test_a_kill_by_the_kernel_for_memory_is_no_crash(start, monkeypatch):
    kills = iter([0, 1])
    monkeypatch.setattr(remote, "_oom_kills", lambda: next(kills))
    status, reason = lost(start("read line; kill -9 $$"))
    assert (status, reason) == ("out_of_memory", "burst: the kernel killed the worker for memory")


def test_a_kill_while_others_were_killed_for_memory_needs_the_right_signal(start, monkeypatch):
    kills = iter([0, 1])
    monkeypatch.setattr(remote, "_oom_kills", lambda: next(kills))
    assert lost(start("read line; kill -SEGV $$"))[0] == "crashed"


def test_ctrl_c_in_the_terminal_does_not_reach_the_worker(start):
    worker = start(ECHO)
    assert os.getsid(worker._process.pid) == worker._process.pid != os.getsid(0)
    assert os.getpgid(worker._process.pid) != os.getpgid(0)
    signal.raise_signal(signal.SIGCONT)
    assert worker.ask("open", deadline_s=20) == {"ok": True}
