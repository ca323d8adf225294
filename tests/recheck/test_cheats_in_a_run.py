"""One real run of kernels that cheat beside ones that do not: the row says what was found."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline.tiny import moebench, records, write_suite

CHEATS = Path(__file__).with_name("cheating_kernels.py")
EXPECTED = {
    "right": ("measured", None, set()),
    "one_buffer": ("measured", None, {"reuses_output"}),
    "sets_threads": ("measured", None, {"changed_threads"}),
    "turns_tf32_on": ("measured", None, {"changed_tf32"}),
    "keeps_while_unchanged": ("inaccurate", "its output had been kept", set()),
    "right_at_first": ("inaccurate", "after it was timed: relative error", set()),
    "changes_x_later": ("inaccurate", "changed its input x while it was timed", set()),
    "changes_w_down_later": ("inaccurate", "changed the layer's w_down while it was timed", set()),
    "grows_into_x": ("inaccurate", "returned a view of its input x", set()),
}


@pytest.mark.slow
def test_each_cheat_is_in_its_row(tmp_path: Path) -> None:
    write_suite(tmp_path, ["torch-loop"])
    providers = ",".join(["torch-loop", *(f"{CHEATS}:{name}" for name in EXPECTED)])
    done = moebench(
        "run", "suite", "tiny.toml", "--out", "run", "--device", "cpu", "--no-report", "--provider", providers,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    rows = {row.provider.rpartition(":")[2] or row.provider: row for row in records(tmp_path / "run")}
    for name, (status, reason, flags) in EXPECTED.items():
        row = rows[name]
        assert row.status == status, (name, row.reason)
        assert (reason is None) == (row.reason is None)
        assert reason is None or reason in row.reason
        assert flags <= set(row.flags), (name, row.flags)
        assert (row.latency_ms is None) == (status == "inaccurate")
        assert "changed_threads" not in row.flags or name == "sets_threads"
    assert {row.modes for row in rows.values() if row.status == "measured"} == {
        "tf32=off reduced_precision_reductions=on fp16_accumulation=off deterministic=off"
    }
    assert rows["torch-loop"].threads >= 1
