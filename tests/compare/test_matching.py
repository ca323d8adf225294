"""Which rows of two runs are held against each other: points, controls, replicates, statuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from compare.simulated_runs import QUIET_GPU, Plan, run_of, two_runs

from moebench.analyse import Run
from moebench.analyse.compare import compare, flat_rows
from moebench.analyse.controls import NO_CONTROL, controlled
from moebench.analyse.matched import Matched

PLAN = Plan(blocks=2, arms=4, rounds=8)
SILENT = replace(QUIET_GPU, sample=0.0, outliers=0.0, drift=0.0, worker=0.0, placement=0.0, bursts=0.0)
Change = Callable[[pd.DataFrame], pd.DataFrame]


def pair(changes: dict[str, float] | None = None, noise: Any = QUIET_GPU) -> tuple[Run, Run]:
    """Two runs; points by name (b0a1) take so much longer in the second."""
    factors = np.zeros(PLAN.points)
    for point, change in (changes or {}).items():
        factors[4 * int(point[1]) + int(point[3])] = np.log1p(change)
    old, new = two_runs(noise, PLAN, np.random.default_rng(3), factors)
    return run_of(old, "old"), run_of(new, "new")


def changed(run: Run, change: Change) -> Run:
    return replace(run, table=change(run.table.astype(object)).reset_index(drop=True))


def with_reads(table: pd.DataFrame, factor: float = 1.0) -> pd.DataFrame:
    """A read beside each gemm, that takes `factor` as long."""
    gemms = table[table["provider"] == "gemm"]
    times = gemms["samples_ms"].map(lambda samples: factor * np.asarray(samples))
    reads = gemms.assign(provider="read", samples_ms=times, point_id=gemms["point_id"] + "-read")
    return pd.concat([table, reads])


def without(**where: Any) -> Change:
    """Rows with these values fail."""

    def change(table: pd.DataFrame) -> pd.DataFrame:
        hit = np.logical_and.reduce([table[name] == value for name, value in where.items()])
        table.loc[hit, "status"], table.loc[hit, "reason"] = "crashed", "burst: signal 11"
        return table

    return change


def latencies(old: Run, new: Run, **asked: Any) -> pd.DataFrame:
    found = compare(old, new, **asked).table
    return found[found["metric"] == "latency"].set_index("point_id")


def test_a_point_keeps_to_one_control_where_another_is_gone_in_a_replicate() -> None:
    """The read takes ten times as long as the GEMM: mixing them would be a change of 10."""
    old, new = (changed(run, lambda table: with_reads(table, 10.0)) for run in pair())
    new = changed(new, without(provider="gemm", block_id="b0", replicate=1))
    rows = latencies(old, new)
    assert (rows["verdict"] == "SAME").all()
    assert rows.loc["b0a0", "control"] == "read", "it has all three replicates, the GEMM has two"
    assert rows.loc["b1a0", "control"] == "gemm"


def test_the_gemm_of_the_points_own_precision_is_its_control() -> None:
    def in_two_precisions(table: pd.DataFrame) -> pd.DataFrame:
        bf16 = table.assign(precision="bf16", point_id=table["point_id"] + "-bf16")
        slow = bf16["provider"] == "gemm"
        bf16.loc[slow, "samples_ms"] = bf16.loc[slow, "samples_ms"].map(lambda samples: 4 * np.asarray(samples))
        return pd.concat([bf16, table])

    old, new = (changed(run, in_two_precisions) for run in pair(noise=SILENT))
    found = controlled(Matched(old, new), None)
    assert sorted(np.round(np.exp(found.old).ravel(), 3).tolist()) == [0.25] * 24 + [1.0] * 24
    assert found.groups is not None
    assert len(set(found.groups.tolist())) == 2


def test_a_point_without_any_control_says_so() -> None:
    old, new = pair()
    new = changed(new, without(provider="gemm", block_id="b0"))
    rows = latencies(old, new)
    assert rows.loc["b0a0", ["verdict", "reason"]].tolist() == [
        "UNSURE",
        "no yardstick was timed beside it in both runs",
    ]
    assert rows.loc["b1a0", "verdict"] == "SAME"


def test_a_named_control_is_not_compared_with_itself() -> None:
    rows = latencies(*pair(), control="arm2")
    assert rows.loc["b0a0", ["verdict", "control"]].tolist() == ["SAME", "arm2"]
    assert rows.loc["b0a2", ["verdict", "control"]].tolist() == ["UNSURE", None]
    assert "no arm2 was timed beside it" in rows.loc["b0a2", "reason"]


def test_what_a_day_does_to_all_cancels_only_against_a_control() -> None:
    old, new = pair()

    def slower_day(table: pd.DataFrame) -> pd.DataFrame:
        table["samples_ms"] = table["samples_ms"].map(lambda samples: 1.2 * np.asarray(samples))
        return table.assign(latency_ms=1.2 * table["latency_ms"])

    new = changed(new, slower_day)
    assert (latencies(old, new)["verdict"] == "SAME").all()
    plain = latencies(old, new, control=NO_CONTROL)
    assert (plain["verdict"] == "SLOWER").all()
    assert plain["ratio"].median() == pytest.approx(1.2, rel=0.03)


def test_a_fault_in_a_later_replicate_is_a_regression() -> None:
    old, new = pair()
    new = changed(new, without(point_id="b0a1", replicate=2))
    found = compare(old, new)
    row = found.table[found.table["metric"] == "status"].iloc[0]
    assert (row["point_id"], row["verdict"]) == ("b0a1", "BROKEN")
    assert row["reason"] == "measured, now crashed: burst: signal 11"
    assert found.regressed
    back = compare(new, replace(old, path=old.path)).table
    assert back[back["metric"] == "status"]["verdict"].tolist() == ["MENDED"]


def test_layer_forms_and_the_dense_layer_are_points_too() -> None:
    """They are yardsticks in a report, and code that can become slower."""

    def form(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[table["provider"] == "arm0", ["provider", "role"]] = ["dense-ffn", "yardstick"]
        return table

    old, new = (changed(run, form) for run in pair({"b0a0": 0.2}))
    rows = latencies(old, new)
    assert rows.loc["b0a0", "verdict"] == "SLOWER"
    assert rows["verdict"].value_counts().to_dict() == {"SAME": 7, "SLOWER": 1}


def test_flags_of_both_runs_are_told_apart() -> None:
    old, new = pair()
    old.table["flags"] = [["cache_resident", "drifting"]] * len(old.table)
    new.table["flags"] = [["cache_resident", "contended"]] * len(new.table)
    rows = latencies(old, new)
    assert rows.loc["b0a0", "flags"] == "both: cache_resident; old: drifting; new: contended"


def test_another_source_is_shown_and_judged_all_the_same() -> None:
    old, new = pair({"b1a3": 0.1})
    new = changed(
        new, lambda table: table.assign(provider_hash=table["provider_hash"].where(table["provider"] == "gemm", "1"))
    )
    rows = latencies(old, new)
    assert rows["source_changed"].all()
    assert rows.loc["b1a3", "verdict"] == "SLOWER"


def test_replicates_are_matched_by_point_not_by_number() -> None:
    """A resumed or hand-made table may number them otherwise."""
    old, new = pair()
    new = changed(new, lambda table: table.assign(replicate=table["replicate"] * 10**12))
    assert (latencies(old, new)["verdict"] == "SAME").all()


def test_flat_rows_hold_nothing_that_json_has_no_word_for() -> None:
    rows = flat_rows(compare(*pair()).table)
    assert all(value is None or isinstance(value, (str, bool, int, float)) for row in rows for value in row.values())
    assert not any(isinstance(value, float) and not np.isfinite(value) for row in rows for value in row.values())


@pytest.mark.parametrize(
    ("column", "metric", "then", "now", "verdict"),
    [
        ("peak_memory_bytes", "memory", 100 << 20, 102 << 20, "SAME"),  # 2 %
        ("peak_memory_bytes", "memory", 1 << 20, (2 << 20) - 1, "SAME"),  # under a MiB
        ("peak_memory_bytes", "memory", 100 << 20, 104 << 20, "HIGHER"),
        ("rel_error", "error", 1e-3, 1.4e-3, "SAME"),
        ("rel_error", "error", 1e-3, 1.6e-3, "HIGHER"),
        ("rel_error", "error", 1e-7, 9e-7, "SAME"),  # float32's own
        ("fidelity_error", "fidelity error", 0.0, 0.1, "HIGHER"),
        ("fidelity_error", "fidelity error", 0.1, 0.0, "LOWER"),
    ],
)
def test_what_has_next_to_no_noise_changes_by_a_factor_and_by_an_amount(
    column: str, metric: str, then: float, now: float, verdict: str
) -> None:
    old, new = pair()
    old.table[column], new.table[column] = then, now
    found = compare(old, new).table
    assert set(found[found["metric"] == metric]["verdict"]) == {verdict}


def test_replicates_that_overlap_are_no_verdict_on_memory() -> None:
    old, new = pair()
    old.table["peak_memory_bytes"] = old.table["replicate"].map([100 << 20, 100 << 20, 200 << 20].__getitem__)
    new.table["peak_memory_bytes"] = new.table["replicate"].map([150 << 20, 160 << 20, 170 << 20].__getitem__)
    found = compare(old, new).table
    row = found[found["metric"] == "memory"].iloc[0]
    assert (row["verdict"], row["reason"]) == ("UNSURE", "the replicates of both runs overlap")
