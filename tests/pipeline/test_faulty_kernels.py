"""One real run of kernels that go wrong in every way beside ones that are right: each fault costs its own point."""

import json
from pathlib import Path

import pytest
from pipeline.test_stopped_processes import no_worker_left
from pipeline.tiny import moebench, records, write_suite

KERNELS = Path(__file__).with_name("kernels_of_all_kinds.py")
DEADLINE_S = 8.0
EXPECTED = {
    "right": ("measured", None),
    "chatty": ("measured", None),
    "raises": ("failed", "ValueError: on purpose in two lines"),
    "exhausts": ("out_of_memory", "RuntimeError: "),
    "hangs": ("timeout", f"check: no answer within {DEADLINE_S:.0f} s"),
    "segfaults": ("crashed", "check: the worker ended with signal SIGSEGV"),
    "exits": ("crashed", "check: the worker ended with exit code 3"),
    "killed": ("crashed", "check: the worker ended with signal SIGKILL"),
    "not_a_number": ("inaccurate", ""),
}


@pytest.mark.slow
def test_each_fault_costs_its_own_point(tmp_path):
    for name, line in {
        "hangs_at_import": "import time; time.sleep(1e6)",
        "exits_at_import": "import os; os._exit(4)",
    }.items():
        (tmp_path / f"{name}.py").write_text(f"{line}\ndef f(*_): ...\n")
    own = [f"{KERNELS}:{name}" for name in EXPECTED]
    write_suite(tmp_path, ["torch-loop"], deadline=DEADLINE_S)
    providers = ",".join(["torch-loop", *own, "hangs_at_import.py:f", "exits_at_import.py:f"])
    done = moebench(
        "run", "suite", "tiny.toml", "--out", "run", "--device", "cpu", "--no-report", "--json",
        "--provider", providers, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    found = {row.provider.rpartition(":")[2] or row.provider: row for row in records(tmp_path / "run")}
    for name, (status, reason) in EXPECTED.items():
        assert found[name].status == status, (name, found[name].reason)
        assert reason is None or found[name].reason.startswith(reason), (name, found[name].reason)
        assert (found[name].latency_ms is None) == (status != "measured")
    assert found["torch-loop"].status == "measured"
    assert {found[name].status for name in ("copy", "read", "gemm")} == {"measured"}
    (counts,) = json.loads(done.stdout)
    expected = {"measured": 3, "failed": 1, "out_of_memory": 1, "timeout": 1, "crashed": 3, "inaccurate": 1}
    assert {name: counts[name] for name in expected} == expected
    assert counts["unavailable"] == 2
    unavailable = {row.provider: row.reason for row in records(tmp_path / "run") if row.status == "unavailable"}
    assert unavailable["hangs_at_import.py:f"] == f"loading it: provider: no answer within {DEADLINE_S:.0f} s"
    assert unavailable["exits_at_import.py:f"] == "loading it: provider: the worker ended with exit code 4"
    listed = [line for line in done.stderr.splitlines() if line.startswith("  crashed: ")]
    assert len(listed) == 3
    assert no_worker_left(tmp_path / "run")
