"""What makes a row unstable is said, and on samples of one law it is not said by chance."""

import subprocess
import sys

import numpy as np
import pytest

from moebench.measure.steadiness import outliers, unsteady

LAWS = {
    "normal": lambda random, n: random.normal(100.0, 20.0, n),
    "exponential": lambda random, n: 50.0 + random.exponential(50.0, n),
    "log-normal": lambda random, n: random.lognormal(4.0, 0.5, n),
    "uniform": lambda random, n: random.uniform(50.0, 150.0, n),
}


def flags(samples, per_round=5, rotation=4, kind="cpu"):
    rounds = [k // per_round for k in range(len(samples))]
    return unsteady(list(map(float, samples)), rounds, rotation, device_kind=kind)


def share(law, n, flag, runs=1500):
    random = np.random.default_rng(n)
    return sum(flag in flags(LAWS[law](random, n), kind="cuda") for _ in range(runs)) / runs


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("n", [10, 20, 40, 60])
@pytest.mark.parametrize("flag", ["outliers", "drifting", "two_levels"])
def test_independent_samples_of_one_law_are_steady(law, n, flag):
    assert share(law, n, flag) < 0.01


# Tukey's fences


def test_fences_by_hand():
    # Quartiles 2.75 and 6.25 of 1..8 with inclusive ranks: fences at -2.5 and 11.5.
    assert outliers([1, 2, 3, 4, 5, 6, 7, 8]) == []
    assert outliers([1, 2, 11.4, 3, 4, 5, 6, 7]) == []
    assert outliers([1, 2, 20, 3, 4, 5, 6, 7]) == [2]
    assert outliers([-20, 2, 3, 4, 5, 6, 7, 20]) == [0, 7]


@pytest.mark.parametrize("n", range(4))
def test_three_samples_have_no_outliers(n):
    assert outliers([1.0, 1.0, 100.0][:n]) == []


def test_samples_that_are_all_equal_have_none_and_one_that_differs_is_one():
    assert outliers([2.0] * 10) == []
    assert outliers([2.0] * 9 + [2.1]) == [9]


def test_a_tenth_of_outliers_is_bearable_and_more_is_not():
    samples = np.random.default_rng(0).permutation(np.linspace(10.0, 11.0, 40))
    samples[[3, 11, 22, 35]] = 30.0
    assert "outliers" not in flags(samples)
    samples[7] = 30.0
    assert "outliers" in flags(samples)
    assert "outliers" not in flags(np.where(samples > 20, 12.0, samples)), "beyond the inner fences only"
    assert len(outliers(list(np.where(samples > 20, 12.0, samples)))) == 5


# Drift


def drifting(total, n=60, noise=0.01, seed=0):
    random = np.random.default_rng(seed)
    return 10.0 * (1 + total * np.arange(n) / n) * random.normal(1.0, noise, n)


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize(("kind", "total"), [("cpu", 0.2), ("cuda", 0.03)])
def test_a_drift_is_seen_in_both_directions(direction, kind, total):
    noise = total / 20
    seen = ["drifting" in flags(drifting(direction * total, noise=noise, seed=k), kind=kind) for k in range(50)]
    assert np.mean(seen) > 0.95


def test_a_drift_that_is_smaller_than_what_counts_as_known_is_not_worth_a_flag():
    assert flags(drifting(0.04, noise=0.001), kind="cpu") == []
    assert flags(drifting(0.04, noise=0.001), kind="cuda") == ["drifting"]


def test_rounds_and_not_samples_are_compared():
    """Bursts that hang together are a few numbers, not many: 4 rounds say nothing, however many samples they hold."""
    assert flags(drifting(0.5, n=40), per_round=10) == []
    assert flags(drifting(0.5, n=40), per_round=5) == ["drifting"]


def test_draws_of_unequal_cost_do_not_drift():
    costs = [10.0, 11.0, 13.0, 12.0]
    for per_round in (1, 2, 5, 10):
        samples = [costs[k % 4] for k in range(60)]
        assert "drifting" not in flags(samples, per_round=per_round)


# Two levels


def jumping(shares, n=60, seed=0):
    random = np.random.default_rng(seed)
    return random.choice([1.0, 8.0, 16.0], p=shares, size=n) * random.normal(1.0, 0.03, n)


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.0), (0.65, 0.35, 0.0), (0.5, 0.3, 0.2)])
def test_times_that_jump_between_multiples_of_a_time_slice_have_levels(shares):
    assert np.mean(["two_levels" in flags(jumping(shares, seed=k)) for k in range(50)]) > 0.9


def test_a_rare_jump_is_an_outlier_and_no_level():
    assert "two_levels" not in flags(jumping((0.95, 0.05, 0.0)))


def test_levels_closer_than_what_counts_as_known_are_none():
    samples = [10.0, 10.0, 10.2] * 20
    assert "two_levels" not in flags(samples, kind="cpu")
    assert "two_levels" in flags(samples, kind="cuda")


def test_levels_that_are_the_draws_own_are_none():
    samples = [(1.0, 1.0, 8.0, 8.0)[k % 4] for k in range(60)]
    assert flags(samples, rotation=4) == []
    assert "two_levels" in flags(samples, rotation=1)
    assert "two_levels" in flags(sorted(samples), rotation=4)


def test_nothing_here_needs_torch():
    check = "import sys, moebench.measure.steadiness as s; s.outliers([1.0] * 5); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
