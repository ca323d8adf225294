"""Energy windows on sensors of straw with a clock of their own: ticks, lag, part-time looks, resets, wraps."""

from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.measure.energy import LEAD_PERIODS, LEAD_SHARE, MeterError
from moebench.measure.energy_summary import summarise
from tests.measure.energy_sensors import Sensor, bench_of


def measure(bench, trials=3, **options):
    """An idle window and some busy ones, as the parent sums them up."""
    idle = asdict(bench.window(busy=False, **options))
    return summarise(idle, [asdict(bench.window(**options)) for _ in range(trials)])


def test_constant_power_gives_power_times_time_gross_and_net_apart():
    found = measure(bench_of())
    assert found["gross_j_per_call"] == pytest.approx(300 * 0.002, rel=0.005)
    assert found["net_j_per_call"] == pytest.approx(240 * 0.002, rel=0.005)
    assert found["idle_w"] == pytest.approx(60, rel=0.005)
    assert found["gross_j_per_call_low"] <= found["gross_j_per_call"] <= found["gross_j_per_call_high"]
    assert (found["source"], found["reason"], found["flags"]) == ("sensor", None, [])


@settings(max_examples=60, deadline=None)
@given(
    watts=st.floats(5, 1000),
    period=st.floats(0.01, 0.2),
    offset=st.floats(0, 1),
    lag=st.floats(0, 2),
    duty=st.sampled_from([1.0, 0.5, 0.25]),
    call_s=st.floats(0.001, 0.05),
)
def test_steady_power_is_known_to_a_tenth_of_a_tick_and_a_call(watts, period, offset, lag, duty, call_s):
    """Wherever the tick falls, however far the sensor lags (up to two ticks) and however seldom it looks."""
    sensor = Sensor(period, offset * period, lag * period, duty)
    window = bench_of(sensor, call_s=call_s, busy_w=watts).window(window_s=60 * period, cool_down_s=3 * period)
    off = (window.joules / window.calls) / (watts * call_s) - 1
    assert abs(off) <= (period / 10 + call_s) / window.seconds + 1e-6
    assert window.ticked
    assert not window.wrap_missed
    assert window.seconds >= 60 * period


@pytest.mark.parametrize("lag_s", [0.0, 0.05, 0.15])
def test_a_sensor_that_lags_does_not_count_the_rest_before(lag_s):
    """A call of 300 W after a rest at 60 W; without a lead-in 150 ms of the rest would be in a window of a second."""
    window = bench_of(Sensor(lag_s=lag_s), call_s=0.001).window(window_s=1.0)
    assert window.joules / window.calls == pytest.approx(0.3, rel=0.012)


@pytest.mark.parametrize("call_s", [0.003, 0.0071])
def test_a_sensor_that_looks_a_quarter_of_the_time_sees_short_calls_on_average(call_s):
    def hot_quarter(_now, part):
        return 700.0 if part == 0 else 100.0

    found = measure(bench_of(Sensor(duty=0.25), call_s=call_s, busy_w=hot_quarter))
    assert found["gross_j_per_call"] == pytest.approx(250 * call_s, rel=0.03)
    assert found["flags"] == []


def test_calls_in_step_with_a_part_time_sensor_are_found_out_by_their_trials():
    """It looks at the same quarter of every call; which one differs from window to window by their shift."""
    flagged = []
    for shift_s in (0.1 / 3, 0.0):
        bench = bench_of(Sensor(duty=0.25), call_s=0.1, busy_w=lambda _now, part: 700.0 if part == 0 else 100.0)
        trials = [asdict(bench.window(cool_down_s=5.0 + trial * shift_s)) for trial in range(3)]
        found = summarise(asdict(bench.window(busy=False)), trials)
        assert max(abs(found[f"gross_j_per_call{end}"] / 25 - 1) for end in ("", "_low", "_high")) > 0.1
        flagged.append("energy_noisy" in found["flags"])
    assert flagged == [True, False], "without a shift the trials agree on a wrong number"


def test_a_call_longer_than_the_window_is_measured_whole():
    found = measure(bench_of(call_s=7.0))
    assert found["gross_j_per_call"] == pytest.approx(2100, rel=0.01)


def test_each_window_is_led_in_after_a_rest():
    bench = bench_of()
    bench.window()
    assert bench.slept == [5.0]
    assert bench.runs[0] == max(LEAD_SHARE * 5.0, LEAD_PERIODS * 0.1)
    assert [each for each in bench.runs if each > 1] == [pytest.approx(5.0)]
    assert bench.meter.now < 5.0 + 0.5 + 5.0 + 3 * 0.1, "aligning costs a few ticks at most"


def test_an_idle_window_runs_nothing():
    bench = bench_of()
    window = bench.window(busy=False)
    assert (bench.runs, window.calls, window.beside) == ([], 0, {"watts": {}})
    assert window.joules / window.seconds == pytest.approx(60, rel=0.005)


@pytest.mark.parametrize(("window_s", "short"), [(0.1, True), (1.0, True), (4.5, True), (5.0, False)])
def test_a_window_of_few_ticks_is_flagged(window_s, short):
    assert ("energy_window_short" in measure(bench_of(), window_s=window_s)["flags"]) is short


@pytest.mark.parametrize("sensor", [Sensor(sticks_at=0.0), Sensor(sticks_at=30.0), Sensor(sticks_at=26.0)])
def test_a_counter_that_stands_still_gives_a_reason_and_no_number(sensor):
    """From the beginning, between two windows, and inside one."""
    found = measure(bench_of(sensor))
    assert "gross_j_per_call" not in found
    assert found["flags"] == ["energy_counter_stuck"]
    assert "did not tick" in found["reason"]
    assert sensor.now < 60, "it is not waited for"


def test_a_counter_that_was_reset_gives_a_reason_and_no_number():
    found = measure(bench_of(Sensor(resets_at=29.0)))
    assert "gross_j_per_call" not in found
    assert found["flags"] == ["energy_counter_reset"]
    assert found["source"] == "sensor"


def test_a_counter_that_goes_away_raises_and_stops_what_watches_beside_it():
    class Gone(Sensor):
        def read_j(self):
            if self.now > 7:
                raise MeterError("gone")
            return super().read_j()

    class Watch:
        ended = 0

        def begin(self):
            self.ended = 0

        def end(self):
            self.ended += 1
            return {"watts": {"watch": 1.0}}

    watch = Watch()
    with pytest.raises(MeterError, match="gone"):
        bench_of(Gone()).window(beside=[watch])
    assert watch.ended == 1


def test_what_is_read_beside_the_counter_goes_with_the_window():
    class Watch:
        def __init__(self, **seen):
            self.seen, self.began = seen, False

        def begin(self):
            self.began = True

        def end(self):
            assert self.began
            return dict(self.seen)

    gpu, zeus = Watch(watts={"nvml_power": 290.0}, temperature_c=[40, 60]), Watch(watts={"zeus": 301.0})
    window = bench_of().window(beside=[gpu, zeus])
    assert window.beside == {"watts": {"nvml_power": 290.0, "zeus": 301.0}, "temperature_c": [40, 60]}
