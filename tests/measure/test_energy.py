"""Energy windows on replayed counters with a clock of their own."""

import sys
from types import SimpleNamespace

import pytest

from moebench.measure.energy import NvmlMeter, RaplMeter, find_meter, measure_energy


class ReplayMeter:
    """A counter that integrates power over a fake clock and shows its last tick only."""

    name = "replay"

    def __init__(self, period_s=0.1, offset_s=0.03):
        self.update_period_s, self.offset_s = period_s, offset_s
        self.now = self.joules = self.shown = 0.0
        self.next_tick = offset_s

    def pass_s(self, seconds, watts):
        end = self.now + seconds
        while self.next_tick <= end:
            self.joules += watts * (self.next_tick - self.now)
            self.now, self.shown = self.next_tick, self.joules
            self.next_tick += self.update_period_s
        self.joules += watts * (end - self.now)
        self.now = end

    def read_j(self):
        return self.shown


class Bench:
    """A call of `call_s` seconds at `busy_w`, on a machine that idles at `idle_w`."""

    def __init__(self, meter, call_s=0.002, busy_w=300.0, idle_w=60.0):
        self.meter, self.call_s, self.busy_w, self.idle_w = meter, call_s, busy_w, idle_w
        self.slept, self.runs, self.calls = [], [], 0

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.meter.pass_s(seconds, self.idle_w)

    def run_for(self, seconds):
        self.runs.append(seconds)
        begin, done = self.meter.now, 0
        while not done or self.meter.now - begin < seconds:
            watts = self.busy_w(self.meter.now) if callable(self.busy_w) else self.busy_w
            self.meter.pass_s(self.call_s, watts)
            done += 1
        self.calls += done
        return done

    def measure(self, **options):
        return measure_energy(self.meter, self.run_for, sleep=self.sleep, clock=lambda: self.meter.now, **options)


def test_constant_power_gives_power_times_time_gross_and_net_apart():
    found = Bench(ReplayMeter()).measure()
    assert found.gross_j_per_call == pytest.approx(300 * 0.002, rel=0.01)
    assert found.net_j_per_call == pytest.approx(240 * 0.002, rel=0.01)
    assert found.idle_w == pytest.approx(60, rel=0.001)
    assert found.spread < 0.01
    assert (found.source, found.flags) == ("replay", ())


@pytest.mark.parametrize("offset_s", [0.001, 0.05, 0.099])
def test_the_counters_lag_costs_nothing_wherever_the_tick_falls(offset_s):
    # Without opening and closing on a tick, a window of 1 s would be off by up to a tick's 8 %.
    bench = Bench(ReplayMeter(offset_s=offset_s), call_s=0.0005)
    found = bench.measure(window_s=1.0, trials=2, cool_down_s=0.25)
    assert found.gross_j_per_call == pytest.approx(0.15, rel=0.01)
    assert found.net_j_per_call == pytest.approx(0.12, rel=0.01)


def test_a_call_longer_than_the_window_is_measured_whole():
    found = Bench(ReplayMeter(), call_s=7.0).measure()
    assert found.gross_j_per_call == pytest.approx(2100, rel=0.01)


def test_the_default_is_three_windows_of_5_s_each_after_5_s_of_rest():
    bench = Bench(ReplayMeter())
    bench.measure()
    assert bench.runs.count(5.0) == 3
    assert bench.slept.count(5.0) == 5, "rest, the idle window, and a rest before each trial"
    assert bench.slept[0] == 5.0
    assert bench.calls * bench.call_s < 3 * (5.0 + 3 * 0.1), "aligning costs a few ticks a trial at most"


def test_the_median_trial_counts_and_trials_that_disagree_are_flagged():
    # The second trial runs hot: power doubles between 22 and 32 s.
    bench = Bench(ReplayMeter(), busy_w=lambda now: 600.0 if 22 < now < 32 else 300.0)
    found = bench.measure()
    assert found.gross_j_per_call == pytest.approx(0.6, rel=0.01)
    assert found.spread > 0.5
    assert found.flags == ("energy_noisy",)


@pytest.mark.parametrize(("window_s", "flags"), [(1.0, ("energy_window_short",)), (5.0, ())])
def test_a_window_of_few_ticks_is_flagged(window_s, flags):
    assert Bench(ReplayMeter()).measure(window_s=window_s).flags == flags


def test_a_counter_that_stands_still_gives_null_and_not_zero():
    meter = ReplayMeter(offset_s=1e9)
    found = Bench(meter).measure()
    assert found.gross_j_per_call is found.net_j_per_call is found.idle_w is found.spread is None
    assert found.flags == ("energy_counter_stuck",)
    assert meter.now < 60


def test_net_energy_below_idle_is_kept_and_flagged():
    found = Bench(ReplayMeter(), busy_w=50.0).measure()
    assert found.net_j_per_call == pytest.approx(-10 * 0.002, rel=0.02)
    assert found.flags == ("energy_below_idle",)


def package(folder, name="package-0", energy=0, span=1_000_000):
    folder.mkdir(parents=True)
    (folder / "name").write_text(name + "\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text(f"{span}\n")
    return folder


def test_rapl_sums_packages_and_nothing_else_and_undoes_the_wrap(tmp_path):
    first = package(tmp_path / "intel-rapl:0", "package-0", energy=900_000)
    second = package(tmp_path / "intel-rapl:1", "package-1", energy=100_000)
    package(tmp_path / "intel-rapl:0:0", "core", energy=5)
    package(tmp_path / "intel-rapl:2", "psys", energy=5)
    meter, reason = find_meter("cpu", powercap=tmp_path)
    assert reason is None
    assert (meter.name, len(meter.packages)) == ("rapl", 2)
    assert meter.read_j() == 0.0
    (first / "energy_uj").write_text("200000")  # wrapped: 0.3 J on
    (second / "energy_uj").write_text("150000")
    assert meter.read_j() == pytest.approx(0.35)
    (first / "energy_uj").write_text("100000")  # and again: 0.9 J on
    assert meter.read_j() == pytest.approx(1.25)


def test_no_rapl_is_a_reason(tmp_path):
    meter, reason = find_meter("cpu", powercap=tmp_path / "absent")
    assert meter is None
    assert "no RAPL package counter" in reason


def test_rapl_for_root_only_is_a_reason(tmp_path, monkeypatch):
    package(tmp_path / "intel-rapl:0")
    monkeypatch.setattr("moebench.measure.energy._number", lambda path: (_ for _ in ()).throw(PermissionError(path)))
    assert RaplMeter.find(tmp_path) == (None, "RAPL counters are readable by root only here (CVE-2020-8694)")


class FakeNvmlError(Exception):
    pass


def fake_nvml(monkeypatch, **functions):
    names = {"NVMLError": FakeNvmlError, "nvmlInit": lambda: None, "nvmlDeviceGetHandleByUUID": lambda uuid: uuid}
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**(names | functions)))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: SimpleNamespace(uuid=f"abc-{index}"))


def refuse(*_):
    raise FakeNvmlError("Not Supported")


def test_nvml_reads_the_total_energy_of_the_device_found_by_uuid(monkeypatch):
    asked = []
    fake_nvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=lambda handle: asked.append(handle) or 1500)
    meter, reason = NvmlMeter.find(1)
    assert reason is None
    assert meter.read_j() == 1.5
    assert set(asked) == {"GPU-abc-1"}
    assert (meter.name, meter.update_period_s) == ("nvml", 0.1)


def test_a_gpu_without_the_counter_is_a_reason(monkeypatch):
    fake_nvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=refuse)
    meter, reason = find_meter("cuda")
    assert meter is None
    assert "no total-energy counter" in reason


def test_no_driver_is_a_reason(monkeypatch):
    fake_nvml(monkeypatch, nvmlInit=refuse)
    assert find_meter("cuda") == (None, "NVML: Not Supported")


def test_no_library_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter, reason = find_meter("cuda")
    assert meter is None
    assert "nvidia-ml-py is not installed" in reason
