"""Files that hurt each other or their reader: equal names of helpers, other folders, forks, input, endless loading."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from watching import gone, heed_ctrl_c, within

from moebench.audit.rows import are_facts
from moebench.audit.run import Request, audit

KERNEL = """
import common
import triton, triton.language as tl
from moebench_kernels.build import Build
@triton.jit
def fill(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 0.0)
def builds():
    import late
    types = {"x_ptr": "*fp32", "BLOCK": "constexpr"}
    return [Build(f"w{common.W} {late.NAME}", fill, types, {"BLOCK": common.W}, ("sm_90",))]
"""


def two_files(folder, more=""):
    """a/kk.py and b/kk.py, each beside a common.py and a late.py of its own."""
    for name, width in (("a", 128), ("b", 4096)):
        (folder / name).mkdir()
        (folder / name / "common.py").write_text(f"W = {width}")
        (folder / name / "late.py").write_text(f"NAME = {name!r}")
        (folder / name / "kk.py").write_text(more + KERNEL)
    return (str(Path("a") / "kk.py"), str(Path("b") / "kk.py"))


@pytest.mark.parametrize("more", ["", "import os; os.chdir('/')\n"], ids=["", "in another folder"])
def test_each_file_imports_its_own_neighbours(tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path / "cache"))
    rows = audit(Request(two_files(tmp_path, more))).rows
    assert [(row["build"], row["verdict"]) for row in rows] == [("w128 a", "ok"), ("w4096 b", "ok")]
    assert rows[0]["registers"] < rows[1]["registers"]


def test_a_damaged_fact_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path / "cache"))
    files = two_files(tmp_path)[:1]
    (first,) = audit(Request(files)).rows
    (kept,) = (tmp_path / "cache").rglob("*.json")
    facts = json.loads(kept.read_text())
    assert are_facts(facts)
    for damage in ({"registers": "many"}, {"warps": 0}, {"shared_bytes": None}, {"loads": True}, {"mma": -1}):
        assert not are_facts(facts | damage)
    kept.write_text(json.dumps(facts | {"registers": "many"}))
    (again,) = audit(Request(files)).rows
    assert again["registers"] == first["registers"]
    assert not again["cached"]
    assert json.loads(kept.read_text()) == facts


def test_input_finds_nothing_and_a_sleeping_child_is_not_waited_for(tmp_path):
    (tmp_path / "asks.py").write_text("input()")
    with pytest.raises(ValueError, match=r"asks\.py: running it failed: EOFError"):
        audit(Request((str(tmp_path / "asks.py"),)))
    child = "import os, sys, time\nif os.fork() == 0:\n    time.sleep(60)\n    os._exit(0)\nraise KeyError('done')"
    (tmp_path / "forks.py").write_text(child)
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"forks\.py: running it failed: KeyError: 'done'"):
        audit(Request((str(tmp_path / "forks.py"),)))
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_file_that_never_ends_goes_with_the_audit(tmp_path, sign):
    pid = tmp_path / "pid"
    endless = f"import os\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\nwhile True: pass"
    (tmp_path / "endless.py").write_text(endless)
    words = [sys.executable, "-m", "moebench", "audit", str(tmp_path / "endless.py")]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=dict(os.environ), preexec_fn=heed_ctrl_c)
    assert within(60, lambda: pid.exists() and pid.read_text())
    process.send_signal(sign)
    begin = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode == (130 if sign == signal.SIGINT else -sign)
    assert within(8, lambda: gone(pid.read_text()))
    assert time.monotonic() - begin < 8
