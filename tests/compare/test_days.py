"""What differs between two days, point by point, and is in no replicate's spread: it may not become a verdict."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from compare.simulated_runs import QUIET_GPU, SHARED_CPU, Noise, Plan, rates
from scipy import stats

from moebench.analyse.verdicts import judge

PAIRS = 200
ONE_BLOCK, TEN_BLOCKS, SMALL_BLOCKS = Plan(blocks=1), Plan(blocks=10), Plan(blocks=40, arms=3)


@pytest.mark.parametrize("noise", [QUIET_GPU, SHARED_CPU], ids=["quiet GPU", "shared CPU"])
@pytest.mark.parametrize("plan", [ONE_BLOCK, TEN_BLOCKS, SMALL_BLOCKS], ids=["1x20", "10x20", "40x3"])
def test_days_raise_no_alarm(noise: Noise, plan: Plan) -> None:
    """Every arm, and every control too, is five times as far from day to day as from worker to worker."""
    found = rates(replace(noise, day=5 * noise.placement), plan, 0, 0.0, PAIRS, seed=21)
    assert round(found.alarms * PAIRS) <= stats.binom.ppf(0.999, PAIRS, 0.05)


def test_the_scatter_of_days_is_told_in_full() -> None:
    """Also where points differ in their own spread, and t has few degrees of freedom."""
    rng = np.random.default_rng(22)
    factors = []
    for _ in range(20):
        spread = 0.004 * np.sqrt(6 / rng.chisquare(6, (400, 1)))
        old, new = spread * rng.standard_normal((2, 400, 3))
        new += 8 * spread * np.sqrt(2 / 3) * rng.standard_normal((400, 1))
        factors.append(judge(old, new).inflation)
    assert np.median(factors) == pytest.approx(8, rel=0.12)


def test_one_control_for_all_points_is_thought_to_have_its_own_day() -> None:
    rng = np.random.default_rng(23)
    old, new = rng.normal(0, 0.002, (2, 100, 3))
    new += rng.normal(0, 0.02, (100, 1))
    alone, shared, of_ten = (
        judge(old, new, groups=groups).inflation for groups in (None, np.zeros(100, int), np.arange(100) // 10)
    )
    assert shared == pytest.approx(np.sqrt(2) * alone)
    assert of_ten == alone


def test_a_scatter_from_few_points_is_itself_uncertain() -> None:
    """The same shifts from the same scatter: 20 points know it less well than 400."""
    widths = []
    for points in (20, 400):
        z = stats.norm.ppf((np.arange(points) + 0.5) / points)[:, None]
        old = np.tile([-0.002, 0.0, 0.002], (points, 1))
        found = judge(old, old + 0.02 * z)
        widths.append(float((found.rows["high"] - found.rows["low"]).iloc[0] / found.inflation))
    assert widths[0] > 1.1 * widths[1]


def test_ranks_have_a_say_where_the_mean_and_its_error_do_not() -> None:
    """An old worker was as slow as a new one; the other points vouch for a small spread, and for many changes."""
    rng = np.random.default_rng(24)
    old, new = rng.normal(0, 0.004, (2, 200, 3))
    new[:80] += 0.1
    old[0], new[0] = (0.0, 0.001, 0.05), (0.049, 0.1, 0.1)
    rows = judge(old, new).rows
    assert rows["p_adjusted"][0] < 0.05
    assert rows["verdict"][0] == "UNSURE"
    assert rows["why"][0] == "the change would be one, but one replicate or more disagrees"
    assert (rows["verdict"][1:80] == "SLOWER").all()
