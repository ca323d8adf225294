"""A worker that is killed, a file that comes back twice, and modules that are imported only while compiling."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from watching import gone, stat, within

from moebench.audit.run import Request, audit

HANGING = str(Path(__file__).parent / "hanging_kernels.py")
KERNEL = """
import os, threading, time
import triton, triton.language as tl
from moebench_kernels.build import Build

@triton.constexpr_function
def late():
    import late_of_audited
    return late_of_audited.W

@triton.jit
def fill(x_ptr):
    tl.store(x_ptr + tl.arange(0, {width}), 0.0)

def builds():
    return [Build("fill", fill, {{"x_ptr": "*fp32"}}, {{}}, ("sm_90",), num_warps=1)]
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path / "cache"))


def test_the_workers_death_ends_the_compile_and_the_audit(tmp_path):
    pids = tmp_path / "pids"
    process = subprocess.Popen(
        [sys.executable, "-m", "moebench", "audit", HANGING], env={**os.environ, "AUDIT_TEST_PIDS": str(pids)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert within(60, pids.exists)
        compiler, child = pids.read_text().split()
        os.kill(stat(compiler)[1], signal.SIGKILL)
        _, said = process.communicate(timeout=10)
    finally:
        process.kill()
    assert within(5, lambda: gone(compiler) and gone(child))
    assert process.returncode == 1
    assert said.strip() == "moebench: the audit's worker ended with signal SIGKILL"


def test_a_second_worker_and_a_thread_of_a_file_are_not_waited_for(tmp_path):
    """One that comes back from a fork, one that sleeps, and a thread that does."""
    more = (
        "os.fork()\nif not (pid := os.fork()):\n    time.sleep(60)\n    os._exit(0)\n"
        "open(__file__ + '.pids', 'a').write(f'{pid} ')\nthreading.Thread(target=time.sleep, args=(60,)).start()\n"
    )
    (tmp_path / "forks.py").write_text(KERNEL.format(width=128) + more)
    begin = time.monotonic()
    (row,) = audit(Request((str(tmp_path / "forks.py"),))).rows
    assert row["verdict"] == "ok"
    assert time.monotonic() - begin < 30
    assert within(5, lambda: all(map(gone, (tmp_path / "forks.py.pids").read_text().split())))


def test_what_is_imported_while_compiling_is_the_files_own(tmp_path):
    for name, width in (("a", 128), ("b", 4096)):
        (tmp_path / name / "lib").mkdir(parents=True)
        (tmp_path / name / "lib" / "late_of_audited.py").write_text(f"W = {width}")
        path = "import sys; sys.path.append(__file__.rpartition('/')[0] + '/lib')\n"
        (tmp_path / name / "kk.py").write_text(path + KERNEL.format(width="late()"))
    files = [str(tmp_path / name / "kk.py") for name in "ab"]
    rows = audit(Request(tuple(files), jobs=2)).rows
    assert [(row["file"], row["faults"]) for row in rows] == [(file, []) for file in files]
    assert rows[0]["registers"] < rows[1]["registers"]
