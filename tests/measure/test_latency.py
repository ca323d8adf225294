"""Timers, warm-up, the interval of a median and the stop rule."""

import gc
import random
import subprocess
import sys
import time
from statistics import median

import pytest

from moebench.measure import latency
from moebench.measure.latency import CpuTimer, enough, make_timer, median_interval, run_for, shortfall, warm


class FakeClock:
    """perf_counter that moves only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ns = 0
        monkeypatch.setattr(latency.time, "perf_counter_ns", lambda: self.ns)
        monkeypatch.setattr(latency.time, "perf_counter", lambda: self.ns / 1e9)

    def pass_ms(self, ms: float) -> None:
        self.ns += round(ms * 1e6)


@pytest.fixture
def clock(monkeypatch):
    return FakeClock(monkeypatch)


def test_a_burst_times_each_call_and_rotates_the_draws(clock):
    ran = []

    def call(index):
        ran.append(index)
        clock.pass_ms(1 + index)

    samples = CpuTimer(draws=4).burst(call, count=6, start=3)
    assert ran == [3, 0, 1, 2, 3, 0]
    assert samples.device_ms == [4, 1, 2, 3, 4, 1]
    assert samples.wall_ms == samples.device_ms


def test_a_short_call_is_the_mean_of_several_that_go_on_rotating(clock):
    ran = []

    def call(index):
        ran.append(index)
        clock.pass_ms(0.01 * (1 + index))

    samples = CpuTimer(draws=2, number=4).burst(call, count=2, start=0)
    assert ran == [0, 1, 0, 1, 1, 0, 1, 0]
    assert samples.device_ms == pytest.approx([0.015, 0.015])


@pytest.mark.parametrize(("call_ms", "number"), [(0.002, 50), (0.03, 4), (0.05, 1), (3.0, 1)])
def test_only_calls_under_50_us_are_timed_in_groups(clock, call_ms, number):
    timer = make_timer("cpu", lambda index: clock.pass_ms(call_ms), draws=4)
    assert (timer.name, timer.why, timer.number) == ("cpu_wall", "", number)


def test_a_first_slow_call_does_not_hide_that_the_call_is_short(clock):
    costs = iter([0.04, *[0.01] * 10])
    assert make_timer("cpu", lambda index: clock.pass_ms(next(costs)), draws=1).number == 10


def test_the_collector_rests_during_a_burst_and_is_put_back():
    seen = []
    CpuTimer(draws=1).burst(lambda index: seen.append(gc.isenabled()), 3, 0)
    assert seen == [False] * 3
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        CpuTimer(draws=1).burst(lambda index: 1 / 0, 1, 0)
    assert gc.isenabled()


def test_a_real_call_takes_about_the_time_it_takes():
    samples = make_timer("cpu", lambda index: time.sleep(0.002), 2).burst(lambda index: time.sleep(0.002), 5, 0)
    assert 2.0 <= median(samples.device_ms) < 20.0


def test_warm_stops_once_the_median_settles(clock):
    costs = iter([500, 90, 60, 30, 20] + [10] * 100)
    ran = []

    def call(index):
        ran.append(index)
        clock.pass_ms(next(costs))

    warmth = warm(call, 4, max_seconds=60)
    assert (warmth.first_call_ms, warmth.estimate_ms, warmth.settled) == (500, 10, True)
    assert 9 <= len(ran) == warmth.calls < 20, "settling takes two windows of four calls, and no hundred"
    assert ran[:5] == [0, 1, 2, 3, 0]


def test_warm_does_not_take_unequal_draws_for_a_drift(clock):
    ran = []

    def call(index):
        ran.append(index)
        clock.pass_ms(10 + 5 * index)

    assert warm(call, 4, max_seconds=60).estimate_ms == 17.5
    assert len(ran) == 9


def test_warm_runs_at_least_min_calls(clock):
    ran = []

    def call(index):
        ran.append(index)
        clock.pass_ms(10)

    warm(call, 2, min_calls=30, max_seconds=60)
    assert len(ran) == 30


@pytest.mark.parametrize(("growth", "calls"), [(1.5, 8), (1000.0, 2)])
def test_a_warm_up_that_never_settles_ends_at_its_time_limit(clock, growth, calls):
    costs = [100 * growth**n for n in range(50)]
    ran = []

    def call(index):
        ran.append(index)
        clock.pass_ms(costs[len(ran) - 1])

    warmth = warm(call, 4, min_calls=20, max_seconds=4)
    assert len(ran) == warmth.calls == calls
    assert warmth.first_call_ms == 100
    assert warmth.estimate_ms > 100
    assert not warmth.settled


def test_warm_sees_a_drift_that_a_few_calls_do_not_show(clock):
    """0.3 % of the first call each: 1.2 % from one window of four to the next, and yet it ends at half."""
    ran = []

    def call(index):
        ran.append(index)
        clock.pass_ms(max(0.5, 1 - 0.003 * len(ran)))

    warmth = warm(call, 4, max_seconds=60)
    assert warmth.settled
    assert warmth.estimate_ms == pytest.approx(0.5)
    assert len(ran) > 166, "it falls until call 166"


def test_calls_of_microseconds_are_warmed_for_a_while(clock):
    ran = []

    def call(index):
        ran.append(index)
        clock.pass_ms(0.1)

    warm(call, 4, max_seconds=60)
    assert 50 <= 0.1 * len(ran) < 60


def test_two_draws_of_unequal_cost_settle_too(clock):
    assert warm(lambda index: clock.pass_ms(10 + 10 * index), 2, max_seconds=60).calls < 20


def test_one_call_beyond_the_limit_is_its_own_estimate(clock):
    assert warm(lambda index: clock.pass_ms(9000), 4, max_seconds=5) == (9000, 9000, False, 1)


def test_run_for_fills_the_time_and_counts_every_call(clock):
    ran = []

    def call(index):
        ran.append(index)
        clock.pass_ms(3)

    done = run_for(CpuTimer(draws=3), call, 0.5, device_kind="cpu")
    assert done == len(ran)
    assert 500 <= 3 * done < 600
    assert ran[:4] == [0, 1, 2, 0]
    assert run_for(CpuTimer(draws=3), call, 0.0, device_kind="cpu") == 1


# Ranks (low, high), 1-based, of the 95 % interval of a median, as tables of the sign test give them.
TABLE = {
    6: (1, 6),
    8: (1, 8),
    9: (2, 8),
    10: (2, 9),
    12: (3, 10),
    20: (6, 15),
    30: (10, 21),
    50: (18, 33),
    100: (40, 61),
}


@pytest.mark.parametrize(("n", "ranks"), TABLE.items())
def test_the_interval_agrees_with_the_known_table(n, ranks):
    samples = random.Random(n).sample(range(1, n + 1), n)
    assert median_interval(samples) == ranks


def test_99_percent_is_wider():
    assert median_interval(range(1, 21), confidence=0.99) == (4, 17)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_below_six_samples_the_interval_is_the_range(n):
    assert median_interval(range(n)) == (0, n - 1)


def test_no_samples_have_no_interval():
    with pytest.raises(ValueError, match="at least one sample"):
        median_interval([])


@pytest.mark.parametrize("n", [6, 10, 25])
def test_the_interval_covers_the_true_median_of_a_skewed_law_often_enough(n):
    # Exponential times: the median is ln 2, far from the mean. Exact coverages are 0.969, 0.979, 0.957.
    draw = random.Random(1)
    runs = 4000
    hits = 0
    for _ in range(runs):
        low, high = median_interval([draw.expovariate(1.0) for _ in range(n)])
        hits += low <= 0.693147 <= high
    assert 0.945 < hits / runs < 0.99


def tight(n, middle=10.0, width=0.002):
    return [middle * (1 + width * (k - (n - 1) / 2) / n) for k in range(n)]


def test_ten_close_samples_are_enough_and_nine_are_not():
    for kind in ("cpu", "cuda"):
        assert enough(tight(10), device_kind=kind)
        assert shortfall(tight(10), device_kind=kind) == []
        assert not enough(tight(9), device_kind=kind)
        assert shortfall(tight(9), device_kind=kind) == ["few_samples"]


def test_a_slow_call_may_stop_at_five_and_says_so():
    assert enough(tight(5, middle=600.0), device_kind="cpu")
    assert not enough(tight(4, middle=600.0), device_kind="cpu")
    assert not enough(tight(5, middle=400.0), device_kind="cpu")
    assert shortfall(tight(5, middle=600.0), device_kind="cpu") == ["few_samples"]


@pytest.mark.parametrize(("kind", "inside", "outside"), [("cuda", 0.018, 0.03), ("cpu", 0.09, 0.15)])
def test_the_interval_must_be_within_1_percent_on_a_gpu_and_5_on_a_cpu(kind, inside, outside):
    # Of 12 samples the interval spans ranks 3 to 10: +-3.5/12 of the whole width.
    scale = 12 / 3.5 / 2
    assert enough(tight(12, width=inside * scale), device_kind=kind)
    assert not enough(tight(12, width=outside * scale), device_kind=kind)
    assert shortfall(tight(12, width=outside * scale), device_kind=kind) == ["wide_interval"]


def test_an_interval_wide_on_one_side_only_is_wide():
    assert shortfall([10.0] * 7 + [14.0] * 5, device_kind="cpu") == ["wide_interval"]


def test_one_outlier_does_not_make_it_wide():
    assert enough([*tight(11), 100.0], device_kind="cuda")


@pytest.mark.parametrize("n", [0, 1, 4])
def test_a_handful_of_samples_is_never_called_narrow(n):
    assert shortfall([700.0] * n, device_kind="cpu") == ["few_samples", "wide_interval"]
    assert not enough([700.0] * n, device_kind="cpu", min_samples=1)


def test_the_stop_rule_and_the_cpu_timer_need_no_torch():
    check = (
        "import sys, moebench.measure.latency as l; l.CpuTimer(1).burst(abs, 2, 0); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
