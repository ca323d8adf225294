"""Logs of counters: written, read, and measured from again, as if the device were there."""

from dataclasses import asdict
from itertools import pairwise

import pytest

from moebench.measure import energy_replay
from moebench.measure.energy_replay import ReplayMeter, read_log, record_log
from moebench.measure.energy_summary import summarise
from tests.measure.energy_sensors import Bench, Sensor


class Passing:
    """Time goes by at a power while one waits."""

    def __init__(self, sensor, watts):
        self.sensor, self.watts = sensor, watts

    def sleep(self, seconds):
        self.sensor.pass_s(seconds, self.watts)


def log_of(path, watts=300.0, seconds=60.0, every_s=0.002, **options):
    """A minute of a sensor at a steady power, recorded as a real one would be."""
    sensor = Sensor(**options)
    passing = Passing(sensor, watts)
    assert record_log(sensor, path, seconds, every_s=every_s, sleep=passing.sleep, clock=lambda: sensor.now) > 1000
    return read_log(path)


def measure(rows, call_s=0.002, trials=3, **options):
    """An idle and some busy windows from a log; the machine idles as it computes, for the log knows no better."""
    time = Sensor()
    meter = ReplayMeter(rows, lambda: time.now, **options)
    bench = Bench(meter, time, call_s=call_s)
    idle = asdict(bench.window(busy=False))
    return summarise(idle, [asdict(bench.window()) for _ in range(trials)])


@pytest.mark.parametrize(
    "sensor", [{}, {"lag_s": 0.05}, {"duty": 0.25}, {"duty": 0.25, "lag_s": 0.05, "offset_s": 0.08}]
)
def test_steady_power_from_a_log(tmp_path, sensor):
    found = measure(log_of(tmp_path / "log.csv", **sensor))
    assert found["gross_j_per_call"] == pytest.approx(300 * 0.002, rel=0.005)
    assert found["net_j_per_call"] == pytest.approx(0.0, abs=0.005)
    assert found["idle_w"] == pytest.approx(300, rel=0.005)
    assert set(found["flags"]) <= {"energy_below_idle"}


def test_a_log_in_which_the_counter_was_reset(tmp_path):
    found = measure(log_of(tmp_path / "log.csv", resets_at=29.0))
    assert found["flags"] == ["energy_counter_reset"]
    assert "gross_j_per_call" not in found
    between = measure(log_of(tmp_path / "log.csv", resets_at=25.0))
    assert between["gross_j_per_call"] == pytest.approx(0.6, rel=0.005), "while it rested: no window holds it"


def test_a_log_that_ends_too_early_is_a_counter_that_is_stuck(tmp_path):
    assert measure(log_of(tmp_path / "log.csv", seconds=25.0))["flags"] == ["energy_counter_stuck"]


def test_a_log_of_slow_ticks_makes_short_windows(tmp_path):
    rows = log_of(tmp_path / "log.csv", update_period_s=0.5, every_s=0.01)
    assert "energy_window_short" in measure(rows, update_period_s=0.5)["flags"]


def test_a_log_holds_every_tick(tmp_path):
    path = tmp_path / "log.csv"
    rows = log_of(path, seconds=5.0)
    assert path.read_text().splitlines()[:2] == ["time_s,joules", "0.000000,0.0"]
    steps = {round(after - before, 6) for (_, before), (_, after) in pairwise(rows)}
    assert steps <= {0.0, 30.0, 9.0}, "100 ms at 300 W, the first tick after 30 ms"
    assert rows[-1][0] == pytest.approx(5.0, abs=0.003)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "line 1: is not time_s,joules"),
        ("a,b\n1,2\n", "line 1: is not"),
        ("time_s,joules\n", "has no readings"),
        ("time_s,joules\n0,1\nx,2\n", "line 3: found 'x,2', not two numbers"),
        ("time_s,joules\n0,1,2\n", "line 2: found '0,1,2'"),
        ("time_s,joules\n0,nan\n", "line 2: found '0,nan', not finite"),
        ("time_s,joules\n1,1\n0.5,2\n", "line 3: found '0.5,2', not finite numbers at a later time"),
    ],
)
def test_what_is_no_log_is_one_line(tmp_path, text, fault):
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"log\.csv: ") as error:
        read_log(path)
    assert fault in str(error.value)
    assert "\n" not in str(error.value)


def test_the_recorder_says_why_it_cannot(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["energy_replay", "gpu"])
    with pytest.raises(SystemExit, match="usage: "):
        energy_replay.main()
    monkeypatch.setattr("moebench.measure.energy_meters.find_meter", lambda kind: (None, "no counter here"))
    monkeypatch.setattr("sys.argv", ["energy_replay", "cuda", str(tmp_path / "log.csv"), "1"])
    with pytest.raises(SystemExit, match="no energy counter: no counter here"):
        energy_replay.main()


def test_the_recorder_writes_what_a_counter_shows(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("moebench.measure.energy_meters.find_meter", lambda kind: (Sensor(), None))
    monkeypatch.setattr("sys.argv", ["energy_replay", "cuda", str(tmp_path / "log.csv"), "0.01"])
    energy_replay.main()
    assert "readings of sensor in" in capsys.readouterr().out
    assert read_log(tmp_path / "log.csv")[0][1] == 0.0
