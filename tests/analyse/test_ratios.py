"""Ratios: paired, inside a block only, with an interval that keeps its word."""

import numpy as np
import pytest
from analyse.tables import record, table
from scipy.stats import quantile_test

from moebench.analyse import ratios

RNG = np.random.default_rng(7)


def only(found, rows, provider):
    return found[rows["provider"].to_numpy() == provider].iloc[0]


def test_drift_shared_by_a_round_cancels():
    drift = np.exp(RNG.normal(0, 0.5, 12))
    rows = table(record("base", list(6 * drift)), record("fast", list(2 * drift)))
    found = only(ratios(rows, "base"), rows, "fast")
    assert found["speedup"] == pytest.approx(3)
    assert found["speedup_low"] == pytest.approx(3)
    assert found["speedup_high"] == pytest.approx(3)


@pytest.mark.parametrize("count", [6, 7, 10, 15, 24, 101])
def test_interval_is_the_exact_one_of_the_median(count):
    logs = RNG.normal(0.3, 0.1, count)
    rows = table(record("base", list(np.exp(logs))), record("one", [1.0] * count))
    found = only(ratios(rows, "base"), rows, "one")
    exact = quantile_test(logs, q=0, p=0.5).confidence_interval(0.95)
    assert np.log([found["speedup_low"], found["speedup_high"]]) == pytest.approx([exact.low, exact.high])
    assert np.log(found["speedup"]) == pytest.approx(np.median(logs))


def test_interval_covers_the_truth_at_least_95_times_in_a_hundred():
    many = 2000
    rows = []
    for block in range(many):
        base, other = np.exp(RNG.standard_t(3, (2, 10)) / 20)
        rows += [record("base", list(2 * base), block_id=f"b{block}"), record("x", list(other), block_id=f"b{block}")]
    rows = table(*rows)
    found = ratios(rows, "base")[(rows["provider"] == "x").to_numpy()]
    covered = ((found["speedup_low"] <= 2) & (found["speedup_high"] >= 2)).mean()
    assert 0.95 <= covered <= 0.995


def test_few_rounds_give_their_range_and_fewer_nothing():
    for count, bounded in ((5, True), (3, True), (2, False), (1, False)):
        rows = table(record("base", [2.0, 4.0, 3.0, 5.0, 6.0][:count]), record("x", [1.0] * count))
        found = only(ratios(rows, "base"), rows, "x")
        assert found["rounds"] == count
        assert np.isfinite(found["speedup"])
        assert np.isfinite(found["speedup_low"]) == bounded
        if bounded:
            assert (found["speedup_low"], found["speedup_high"]) == pytest.approx(
                (2.0, [4.0, 4.0, 4.0, 5.0, 6.0][count - 1])
            )


def test_only_rounds_that_both_were_in_count():
    slow = record("base", [10.0, 20.0, 30.0, 40.0])
    fast = record("x", [2.0, 3.0, 99.0], sample_round=[1, 2, 7])
    rows = table(slow, fast)
    found = only(ratios(rows, "base"), rows, "x")
    assert found["rounds"] == 2
    assert found["speedup"] == pytest.approx(10)


def test_a_burst_counts_once():
    base = record("base", [1.0, 1.0, 100.0, 4.0, 4.0, 4.0], sample_round=[0, 0, 0, 1, 1, 1])
    rows = table(base, record("x", [1.0, 2.0]))
    found = only(ratios(rows, "base"), rows, "x")
    assert found["rounds"] == 2
    assert found["speedup"] == pytest.approx(np.sqrt(1 * 2))


def test_no_ratio_across_blocks_replicates_scopes_or_to_what_was_not_timed():
    for other in ({"block_id": "c"}, {"replicate": 1}, {"scope": "experts"}, {"run_id": "q"}):
        rows = table(record("base", [1.0] * 8), record("x", [1.0] * 8, **other))
        assert np.isnan(only(ratios(rows, "base"), rows, "x")["speedup"])
    rows = table(record("base", status="failed", reason="x"), record("x", [1.0] * 8))
    assert ratios(rows, "base")["speedup"].isna().all()
    assert ratios(rows, "nobody")["speedup"].isna().all()
