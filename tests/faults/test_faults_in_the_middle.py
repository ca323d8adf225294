"""A fault in the second of three blocks costs its own point and nothing else, whatever it is and wherever it comes."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.fault_checks import complete, second_block
from pipeline.test_stopped_processes import no_worker_left
from pipeline.tiny import write_suite

from moebench.options import Options
from moebench.record import PERFORMANCE
from moebench.remote import WorkerLost
from moebench.run import run_suite
from moebench.suite import load_suite

MESSAGES = ("arm", "check", "warm", "memory", "burst", "recheck", "energy")
FAULTS = {
    "raises": ({"status": "failed", "reason": "ValueError: no"}, "failed"),
    "device memory": ({"status": "out_of_memory", "reason": "OutOfMemoryError: CUDA out of memory"}, "out_of_memory"),
    "device broken": ({"status": "failed", "reason": "CUDA error: illegal", "fatal": True}, "crashed"),
    "host memory": (WorkerLost("out_of_memory", "the kernel killed the worker for memory"), "out_of_memory"),
    "hang": (WorkerLost("timeout", "no answer within 8 s"), "timeout"),
    "death": (WorkerLost("crashed", "the worker ended with signal SIGSEGV"), "crashed"),
}
KERNELS = Path(__file__).with_name("kernels_at_eight.py")
DEADLINE_S = 8.0
REAL = {
    "raises": ("failed", "ValueError: on purpose"),
    "raises_late": ("failed", "ValueError: late"),
    "device_memory": ("out_of_memory", "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
    "device_memory_by_name": ("out_of_memory", "RuntimeError: CUDA error: out of memory"),
    "host_memory": ("out_of_memory", "MemoryError: "),
    "host_memory_for_real": ("out_of_memory", "RuntimeError: "),
    "hangs": ("timeout", f"check: no answer within {DEADLINE_S:.0f} s"),
    "segfaults": ("crashed", "check: the worker ended with signal SIGSEGV"),
    "segfaults_late": ("crashed", ""),
    "is_killed_for_memory": ("out_of_memory", "check: the kernel killed the worker for memory"),
    "not_a_number": ("inaccurate", ""),
    "one_not_a_number": ("inaccurate", ""),
    "wrong_shape": ("inaccurate", "returned shape [1, 16], not [8, 16]"),
    "wrong_width": ("inaccurate", "returned shape [8, 1], not [8, 16]"),
}


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("fault", FAULTS)
def test_one_point_is_lost_and_says_why(tmp_path, crew, go, message, fault):
    cue, status = FAULTS[fault]
    crew.cues["torch-bmm", message] = lambda: cue if second_block(crew) else {}
    path = tmp_path / "tiny.toml"
    path.write_text("energy = true\n" + path.read_text())
    outcome = go(load_suite([str(path)]))
    assert outcome.exit_code == 1
    rows = complete(tmp_path / "run", blocks=3)
    (lost,) = [row for row in rows if row.status != "measured"]
    assert (lost.provider, lost.tokens, lost.status) == ("torch-bmm", 8, status)
    assert (cue.reason if isinstance(cue, WorkerLost) else cue["reason"]) in lost.reason
    assert [name for name in PERFORMANCE if getattr(lost, name) is not None] == []
    assert crew.workers[-1].ended


@pytest.mark.parametrize("wrong", ["the output has 8 NaN", "the output has shape (1, 16), not (8, 16)"])
def test_a_wrong_answer_in_the_middle_is_never_timed(tmp_path, crew, go, wrong):
    crew.cues["torch-bmm", "check"] = lambda: {"wrong": wrong} if second_block(crew) else {}
    assert go().exit_code == 1
    (lost,) = [row for row in complete(tmp_path / "run", blocks=3) if row.status != "measured"]
    assert (lost.tokens, lost.status, lost.reason) == (8, "inaccurate", wrong)


@pytest.mark.slow
def test_real_kernels_that_fail_on_the_second_problem_only(tmp_path, monkeypatch):
    count = tmp_path / "oom_kills"
    count.write_text("0")
    monkeypatch.setenv("FAULTS_OOM_KILLS", str(count))
    monkeypatch.setattr("moebench.remote._oom_kills", lambda: int(count.read_text()))
    write_suite(tmp_path, ["torch-loop"], tokens=[4, 8, 16], deadline=DEADLINE_S)
    kernels = [f"{KERNELS}:{name}" for name in REAL]
    suite = load_suite([str(tmp_path / "tiny.toml")], add_providers=kernels)
    outcome = run_suite(suite, Options(tmp_path / "run", device="cpu"))
    assert outcome.exit_code == 1
    rows = complete(tmp_path / "run", blocks=3, per_block=4 + len(REAL))
    lost = {row.provider.rpartition(":")[2]: row for row in rows if row.status != "measured"}
    assert {row.tokens for row in lost.values()} == {8}
    for name, (status, reason) in REAL.items():
        assert lost[name].status == status, (name, lost[name].status, lost[name].reason)
        assert lost[name].reason.startswith(reason), (name, lost[name].reason)
    assert lost.keys() == REAL.keys()
    assert no_worker_left(tmp_path / "run")


def test_a_timer_that_reads_nothing_is_no_number(tmp_path, crew, go):
    crew.cues["torch-bmm", "burst"] = lambda: {"device_ms": [0.0], "wall_ms": [0.0]} if second_block(crew) else {}
    assert go().exit_code == 1
    (lost,) = [row for row in complete(tmp_path / "run", blocks=3) if row.status != "measured"]
    assert (lost.tokens, lost.status, lost.reason) == (8, "failed", "its timer, straw, reads 0 ms")
