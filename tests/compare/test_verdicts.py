"""Verdicts on runs with known truth: false alarms, detection, and what may not be called the same."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from compare.simulated_runs import (
    LEVELS,
    QUIET_GPU,
    SHARED_CPU,
    Plan,
    judged,
    rates,
    replicate_values,
    run_of,
    two_runs,
)
from scipy import stats

from moebench.analyse.compare import compare
from moebench.analyse.controls import controlled
from moebench.analyse.matched import Matched
from moebench.analyse.verdicts import judge, prior_of, scatter

PAIRS = 300
LEVEL = 0.05


def at_most(share: float, allowed: float, pairs: int = PAIRS) -> bool:
    """Whether a share of pairs is compatible with the allowed probability (one test in a thousand would err)."""
    return bool(round(share * pairs) <= stats.binom.ppf(0.999, pairs, allowed))


@pytest.mark.parametrize("level", list(LEVELS))
def test_a_run_against_itself_raises_no_alarm(level: str) -> None:
    """Any SLOWER among 200 points in at most 5 % of pairs."""
    assert at_most(rates(LEVELS[level], Plan(), 0, 0.0, PAIRS, seed=1).alarms, LEVEL)


@pytest.mark.parametrize("slowed", [1, 10, 100, 200])
def test_five_per_cent_are_found_where_the_machine_can_show_them(slowed: int) -> None:
    found = rates(QUIET_GPU, Plan(), slowed, 0.05, PAIRS // 3, seed=2)
    assert found.found >= 0.95
    assert found.same == 0
    assert at_most(found.alarms, LEVEL, PAIRS // 3)


@pytest.mark.parametrize("slowed", [1, 10, 200])
def test_where_it_cannot_they_are_not_called_the_same(slowed: int) -> None:
    found = rates(SHARED_CPU, Plan(), slowed, 0.05, PAIRS // 3, seed=3)
    assert found.same <= 0.05
    assert at_most(found.alarms, LEVEL, PAIRS // 3)


def test_a_large_slowdown_is_found_on_a_shared_machine_too() -> None:
    assert rates(SHARED_CPU, Plan(), 1, 0.4, 100, seed=4).found >= 0.9


def test_what_is_equal_is_called_so_where_the_machine_can_show_it() -> None:
    assert rates(QUIET_GPU, Plan(), 0, 0.0, 50, seed=5).still >= 0.95


def test_a_change_below_the_minimum_effect_is_no_regression() -> None:
    assert rates(QUIET_GPU, Plan(), 10, 0.01, 100, seed=6).found == 0


@pytest.mark.parametrize(
    ("level", "points"), [("quiet GPU", 1), ("quiet GPU", 4), ("shared CPU", 1), ("shared CPU", 4)]
)
def test_few_points_raise_no_more_alarms(level: str, points: int) -> None:
    plan = Plan(blocks=1, arms=points)
    assert at_most(rates(LEVELS[level], plan, 0, 0.0, PAIRS, seed=7).alarms, LEVEL)


def test_one_odd_worker_makes_no_verdict() -> None:
    """One of three new workers is 40 % slower at one point: the mean is, the ranks are not."""
    rng = np.random.default_rng(8)
    old, new = rng.normal(0, 0.004, (2, 50, 3))
    new[0, 1] += 0.4
    assert judge(old, new).rows["verdict"][0] == "UNSURE"


def test_days_that_differ_widen_the_intervals() -> None:
    rng = np.random.default_rng(9)
    old, new = rng.normal(0, 0.002, (2, 200, 3))
    new += rng.normal(0, 0.05, (200, 1))  # the same for all replicates of a day: their own spread does not show it
    found = judge(old, new)
    assert found.inflation > 10
    assert not (found.rows["verdict"] == "SLOWER").any()
    assert judge(old, new - new.mean(axis=1, keepdims=True)).inflation < 1.5


def test_a_whole_run_that_is_slower_is_slower() -> None:
    """The centre of the scatter is not taken away."""
    rng = np.random.default_rng(10)
    old, new = rng.normal(0, 0.004, (2, 200, 3))
    assert (judge(old, new + 0.1).rows["verdict"] == "SLOWER").all()
    assert (judge(old, new - 0.1).rows["verdict"] == "FASTER").all()


@pytest.mark.parametrize("replicates", [0, 1, 2])
def test_too_few_replicates_are_no_verdict(replicates: int) -> None:
    old, new = np.zeros((2, 3)), np.full((2, 3), 0.5)
    new[1, replicates:] = np.nan
    rows = judge(old, new).rows
    assert rows["verdict"].tolist() == ["SLOWER", "UNSURE"]
    assert rows["why"][1] == f"{replicates} replicates on one side; 3 are needed"
    assert np.isnan(rows["shift"][1])


def test_different_numbers_of_replicates_are_judged_together() -> None:
    rng = np.random.default_rng(11)
    old, new = rng.normal(0, 0.004, (2, 30, 6))
    old[::2, 3:] = np.nan
    new[::3, 4:] = np.nan
    new[:5] += 0.1
    assert judge(old, new).rows["verdict"].tolist() == ["SLOWER"] * 5 + ["SAME"] * 25


@pytest.mark.parametrize("points", [0, 1])
def test_next_to_nothing_can_be_judged(points: int) -> None:
    found = judge(np.zeros((points, 3)), np.zeros((points, 3)))
    assert len(found.rows) == points
    assert (found.rows["verdict"] == "SAME").all()


def test_the_false_discovery_rate_is_kept_over_all_points() -> None:
    """Half of 200 points slowed by 8 % at 1 % noise: of those called SLOWER at most 5 % are not."""
    rng = np.random.default_rng(12)
    wrong = called = 0
    for _ in range(100):
        old, new = rng.normal(0, 0.01, (2, 200, 3))
        new[:100] += 0.08
        slower = (judge(old, new).rows["verdict"] == "SLOWER").to_numpy()
        wrong, called = wrong + slower[100:].sum(), called + slower.sum()
    assert called > 2000
    assert wrong <= 0.05 * called


def test_the_prior_is_recovered() -> None:
    """Variances drawn from a scaled inverse chi-squared of 8 degrees of freedom about 0.01."""
    rng = np.random.default_rng(13)
    true = 0.01 * 8 / rng.chisquare(8, 20_000)
    prior = prior_of(true * rng.chisquare(4, 20_000) / 4, np.full(20_000, 4.0))
    assert prior.df == pytest.approx(8, rel=0.15)
    assert prior.variance == pytest.approx(0.01, rel=0.05)
    equal = prior_of(0.01 * rng.chisquare(4, 200) / 4, np.full(200, 4.0))
    assert equal.df > 20


def test_scatter_is_one_at_least_and_minds_not_what_has_changed() -> None:
    rng = np.random.default_rng(14)
    z = rng.standard_normal(1000)
    assert scatter(z) == pytest.approx(1.0, abs=0.1)
    assert scatter(3 * z) == pytest.approx(3.0, rel=0.1)
    z[:500] += 40
    assert scatter(z) < 2.5, "half of all may have changed"
    assert scatter(z[:19] * 100) == 1.0, "too few points to tell"
    few = [scatter(rng.standard_normal(20)) for _ in range(500)]
    assert np.mean(few) < 1.25


def test_the_simulation_takes_ratios_as_the_product_does() -> None:
    plan = Plan(blocks=2, arms=3)
    old, new = two_runs(SHARED_CPU, plan, np.random.default_rng(15), np.zeros(plan.points))
    points = Matched(run_of(old, "old"), run_of(new, "new"))
    found = controlled(points, None)
    assert list(points.ids) == [f"b{b}a{a}" for b in range(2) for a in range(3)]
    np.testing.assert_allclose(found.old, replicate_values(old), rtol=1e-9)
    np.testing.assert_allclose(found.new, replicate_values(new), rtol=1e-9)
    assert set(found.names) == {"gemm"}


def test_compare_gives_the_verdicts_that_the_simulation_counts() -> None:
    plan = Plan(blocks=3, arms=8)
    change = np.where(np.arange(plan.points) % 5 == 0, 0.08, 0.0)
    old, new = two_runs(QUIET_GPU, plan, np.random.default_rng(17), change)
    found = compare(run_of(old, "old"), run_of(new, "new")).table
    latency = found[found["metric"] == "latency"].set_index("point_id")["verdict"]
    expected = judge(replicate_values(old), replicate_values(new)).rows["verdict"]
    ids = [f"b{b}a{a}" for b in range(3) for a in range(8)]
    assert latency[ids].tolist() == expected.tolist()
    assert (latency[ids].to_numpy() == np.where(change > 0, "SLOWER", "SAME")).all()


def test_verdicts_are_the_same_again() -> None:
    one, other = (judged(SHARED_CPU, Plan(), np.random.default_rng(16), np.zeros(200)).rows for _ in range(2))
    pd.testing.assert_frame_equal(one, other)
