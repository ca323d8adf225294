"""Pareto fronts and the rows that tell a large run's story."""

import pandas as pd
from analyse.tables import record, table
from hypothesis import given, settings
from hypothesis import strategies as st
from report.synthetic import make_run

from moebench.analyse import fronts, load_run, name_rows, pareto, telling_rows

GRID = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.sampled_from("ab")), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(GRID)
def test_front_is_what_nothing_dominates(points):
    rows = pd.DataFrame(points, columns=["x", "y", "problem"]).astype({"x": float, "y": float})
    rows = rows.assign(scope="layer", role="arm")
    found = pareto(rows, "x", "y")

    def dominated(row):
        rivals = rows[rows["problem"] == row.problem]
        return ((rivals["x"] <= row.x) & (rivals["y"] <= row.y) & ((rivals["x"] < row.x) | (rivals["y"] < row.y))).any()

    assert found.tolist() == [not dominated(row) for row in rows.itertuples()]


def test_what_is_unknown_or_a_yardstick_is_on_no_front():
    rows = table(record("a", [1.0]), record("b", [2.0], peak_memory_bytes=5),
                 record("copy", [0.1], role="yardstick", peak_memory_bytes=1))  # fmt: skip
    assert fronts(rows)["peak_memory_bytes"].tolist() == [False, True, False]


def test_noise_buys_no_place_on_the_fidelity_front():
    rows = table(record("a", [1.0], fidelity_error=4e-7), record("b", [2.0], fidelity_error=1e-8))
    assert fronts(rows)["fidelity_error"].tolist() == [True, False]


def test_telling_rows_keep_faults_winners_and_losers(tmp_path):
    rows = name_rows(load_run(make_run(tmp_path / "run", records=3000, rounds=3)).table)
    fault = rows.index[7]
    rows.loc[fault, "status"] = "crashed"
    kept = telling_rows(rows, limit=1000)
    assert len(kept) == 1000
    assert fault in kept.index
    assert kept.index.is_monotonic_increasing
    arms = rows[(rows["status"] == "measured") & (rows["role"] == "arm")].groupby("block")["latency_ms"]
    assert set(arms.idxmin()) <= set(kept.index)
    assert set(arms.idxmax()) <= set(kept.index)


def test_a_small_table_is_kept_whole_and_a_flood_of_faults_is_thinned_evenly(tmp_path):
    rows = name_rows(load_run(make_run(tmp_path / "run", records=600, rounds=3)).table)
    assert len(telling_rows(rows, limit=600)) == 600
    rows["status"] = "crashed"
    kept = telling_rows(rows, limit=60).index
    assert len(kept) == 60
    assert kept[0] < 10
    assert kept[-1] > 590
