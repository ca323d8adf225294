"""Counters and what is read beside them: RAPL in a folder of straw, NVML and Zeus as modules of straw."""

import math
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from moebench.measure import energy_beside, energy_meters
from moebench.measure.energy import LEAD_SHARE, READS_PER_WRAP, MeterError
from moebench.measure.energy_beside import FEWEST_READINGS, LONGEST_GAP_S, GpuWatch, ZeusWindow, mean_watts
from moebench.measure.energy_meters import Meters, NvmlMeter, RaplMeter, find_meter, open_meters
from moebench.measure.energy_summary import summarise
from tests.measure.energy_sensors import Bench, Sensor

# RAPL


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
    assert (meter.name, len(meter.packages), meter.max_watts) == ("rapl", 2, 4000.0)
    assert meter.wrap_s == pytest.approx(1.0 / 2000.0)
    assert meter.read_j() == 0.0
    (first / "energy_uj").write_text("200000")  # wrapped: 0.3 J on
    (second / "energy_uj").write_text("150000")
    assert meter.read_j() == pytest.approx(0.35)
    (first / "energy_uj").write_text("100000")  # and again: 0.9 J on
    assert meter.read_j() == pytest.approx(1.25)


def rapl_bench(tmp_path, monkeypatch, span_j, **options):
    """A bench on one package whose counter turns over after `span_j`."""
    sensor = Sensor(update_period_s=0.001, offset_s=0.0)
    folder = package(tmp_path / "intel-rapl:0")

    def number(path):
        return round(span_j * 1e6) if path.name.startswith("max") else round(sensor.read_j() % span_j * 1e6)

    monkeypatch.setattr(energy_meters, "_number", number)
    return Bench(RaplMeter([folder]), sensor, **options)


def test_a_window_of_many_turns_of_the_counter_is_read_often_enough(tmp_path, monkeypatch):
    """300 W turn 100 J over in a third of a second: some fifteen times in a window."""
    bench = rapl_bench(tmp_path, monkeypatch, 100.0, call_s=0.001)
    trials = [asdict(bench.window()) for _ in range(3)]
    found = summarise(asdict(bench.window(busy=False)), trials)
    assert found["gross_j_per_call"] == pytest.approx(0.3, rel=0.005)
    assert found["idle_w"] == pytest.approx(60.0, rel=0.005)
    assert found["flags"] == []
    led_in = LEAD_SHARE * 5.0
    assert max(each for each in bench.runs if each != led_in) <= 100.0 / 2000 / READS_PER_WRAP


def test_a_call_that_outlasts_a_turn_of_the_counter_has_no_number(tmp_path, monkeypatch):
    bench = rapl_bench(tmp_path, monkeypatch, 100.0, call_s=0.5)
    window = asdict(bench.window())
    assert window["joules"] / window["calls"] != pytest.approx(150.0, rel=0.1), "turns were lost"
    assert summarise(window, [window])["flags"] == ["energy_wrap_missed"]


def test_a_counter_that_starts_anew_is_no_turn(tmp_path, monkeypatch):
    """From 1.8 kJ of 10 kJ to zero, as after a suspended machine; the counter would say 1.9 kW over the window."""
    bench = rapl_bench(tmp_path, monkeypatch, 10_000.0)
    bench.clock_of.resets_at = 9.0
    window = asdict(bench.window())
    assert 0 < window["joules"] / window["seconds"] < 2000
    assert summarise(window, [window])["flags"] == ["energy_counter_reset"]


def test_no_rapl_is_a_reason(tmp_path):
    meter, reason = find_meter("cpu", powercap=tmp_path / "absent")
    assert meter is None
    assert "no RAPL package counter" in reason


def test_rapl_for_root_only_is_a_reason(tmp_path, monkeypatch):
    package(tmp_path / "intel-rapl:0")
    monkeypatch.setattr(energy_meters, "_number", lambda path: (_ for _ in ()).throw(PermissionError(path)))
    assert RaplMeter.find(tmp_path) == (None, "RAPL counters are readable by root only here (CVE-2020-8694)")


def test_rapl_that_goes_away_costs_the_window_alone(tmp_path):
    folder = package(tmp_path / "intel-rapl:0")
    meter, _ = RaplMeter.find(tmp_path)
    (folder / "energy_uj").unlink()
    with pytest.raises(MeterError, match="RAPL counters cannot be read"):
        meter.read_j()
    found = Meters(meter, None).window(None, 0.1, 0.0)
    assert found.keys() == {"source", "reason"}
    assert found["source"] == "rapl"


# NVML


class FakeNvmlError(Exception):
    pass


def fake_nvml(monkeypatch, **functions):
    """A pynvml of straw that knows one GPU, and only what is given."""
    names = {
        "NVMLError": FakeNvmlError, "nvmlInit": lambda: None, "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "NVML_SUCCESS": 0, "NVML_TEMPERATURE_GPU": 0, "nvmlDeviceGetFieldValues": refuse,
        "nvmlDeviceGetCurrentClocksThrottleReasons": refuse, "nvmlDeviceGetTemperature": refuse,
        "nvmlDeviceGetComputeRunningProcesses": refuse, "nvmlDeviceGetTotalEnergyConsumption": refuse,
    }  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**(names | functions)))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: SimpleNamespace(uuid=f"abc-{index}"))


def refuse(*_):
    raise FakeNvmlError("Not Supported")


def instant_power(milliwatts, status=0):
    def values(handle, fields):
        assert fields == [186], "instant power, and not the mean of a second"
        return [SimpleNamespace(nvmlReturn=status, value=SimpleNamespace(uiVal=milliwatts))]

    return values


def test_nvml_reads_the_total_energy_of_the_device_found_by_uuid(monkeypatch):
    asked = []
    fake_nvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=lambda handle: asked.append(handle) or 1500)
    meter, reason = NvmlMeter.find(1)
    assert reason is None
    assert meter.read_j() == 1.5
    assert set(asked) == {"GPU-abc-1"}
    assert (meter.name, meter.update_period_s, meter.wrap_s) == ("nvml", 0.1, math.inf)


def test_a_gpu_without_the_counter_is_a_reason(monkeypatch):
    fake_nvml(monkeypatch)
    meter, reason = find_meter("cuda")
    assert meter is None
    assert "no total-energy counter" in reason


def test_a_counter_that_is_lost_raises(monkeypatch):
    fake_nvml(monkeypatch)
    with pytest.raises(MeterError, match="cannot be read"):
        NvmlMeter("handle").read_j()


def test_no_driver_is_a_reason(monkeypatch):
    fake_nvml(monkeypatch, nvmlInit=refuse)
    assert find_meter("cuda") == (None, "NVML: Not Supported")


def test_no_library_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter, reason = find_meter("cuda")
    assert meter is None
    assert "nvidia-ml-py is not installed" in reason


def test_beside_a_counter_stands_what_is_there_and_without_one_nothing(monkeypatch):
    fake_nvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=lambda handle: 1500)
    monkeypatch.setitem(sys.modules, "zeus.monitor", SimpleNamespace(ZeusMonitor=FakeZeus))
    meters = open_meters("cuda")
    assert [type(each) for each in meters.beside] == [GpuWatch, ZeusWindow], "the first one's number is the column"
    fake_nvml(monkeypatch)
    assert open_meters("cuda").beside == ()
    assert "no total-energy counter" in open_meters("cuda").window(None, 0.1, 0.0)["reason"]


# Instant power


def test_mean_power_is_weighted_by_time():
    readings = [(0.0, 100.0), (0.3, 100.0), (0.31, 300.0), *((0.31 + 0.1 * n, 300.0) for n in range(1, 11))]
    assert mean_watts(readings) == pytest.approx((0.3 * 100 + 0.01 * 200 + 1.0 * 300) / 1.31)


def test_mean_power_needs_readings_without_a_long_gap():
    steady = [(0.05 * n, 300.0) for n in range(FEWEST_READINGS)]
    assert mean_watts(steady) == pytest.approx(300.0)
    assert mean_watts(steady[:-1]) is None
    assert mean_watts([]) is None
    late = [(at + LONGEST_GAP_S * (at > 0.2), watts) for at, watts in steady]
    assert mean_watts(late) is None


def watch(monkeypatch, times=None, **functions):
    fake_nvml(monkeypatch, **functions)
    ticking = iter(times or [0.05 * n for n in range(10_000)])
    return GpuWatch("GPU", clock=lambda: next(ticking), every_s=0.0)


def watched(guard, readings):
    """What it saw after at least so many readings."""
    enough, read = energy_beside.threading.Event(), guard.read
    count = iter(range(readings))

    def counted():
        read()
        if next(count, None) is None:
            enough.set()

    guard.read = counted
    guard.begin()
    assert enough.wait(30)
    return guard.end()


def test_the_gpu_is_watched_while_the_window_is_open(monkeypatch):
    temperatures = iter([41, 63])
    seen = watched(
        watch(
            monkeypatch,
            nvmlDeviceGetFieldValues=instant_power(312_500),
            nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x4 | 0x1,
            nvmlDeviceGetTemperature=lambda handle, sensor: next(temperatures),
            nvmlDeviceGetComputeRunningProcesses=lambda handle: ["we", "another"],
        ),
        20,
    )
    assert seen == {
        "watts": {"nvml_power": pytest.approx(312.5)}, "temperature_c": [41, 63],
        "throttle_reasons": ["sw_power_cap"], "other_processes": 1,
    }  # fmt: skip
    assert energy_beside.threading.active_count() == 1 or all(
        "_watch" not in thread.name for thread in energy_beside.threading.enumerate()
    )


@pytest.mark.parametrize("power", [refuse, instant_power(0, status=3)])
def test_what_the_gpu_does_not_tell_is_not_made_up(monkeypatch, power):
    seen = watched(watch(monkeypatch, nvmlDeviceGetFieldValues=power), 20)
    assert seen == {"watts": {}, "temperature_c": [None, None], "throttle_reasons": [], "other_processes": None}


def test_a_watch_begins_anew_with_each_window(monkeypatch):
    guard = watch(monkeypatch, nvmlDeviceGetFieldValues=instant_power(100_000))
    assert watched(guard, 20)["watts"] == {"nvml_power": pytest.approx(100.0)}
    sys.modules["pynvml"].nvmlDeviceGetFieldValues = instant_power(200_000)
    del guard.read
    assert watched(guard, 20)["watts"] == {"nvml_power": pytest.approx(200.0)}


# Zeus


class FakeZeus:
    """A ZeusMonitor of straw: 250 W on whatever it watches, unless told otherwise."""

    packages, joules, fails = (), 500.0, False

    def __init__(self, gpu_indices, cpu_indices, approx_instant_energy):
        assert approx_instant_energy is False
        self.gpu_indices = gpu_indices
        self.cpu_indices = list(self.packages) if cpu_indices is None else cpu_indices
        self.windows = set()

    def begin_window(self, key, sync_execution, restart):
        assert not sync_execution
        assert restart
        self.windows.add(key)

    def end_window(self, key, sync_execution):
        self.windows.remove(key)
        if self.fails:
            raise RuntimeError("no")
        gpus = dict.fromkeys(self.gpu_indices, self.joules)
        return SimpleNamespace(time=2.0, gpu_energy=gpus, cpu_energy=dict.fromkeys(self.cpu_indices, 100.0) or None)


@pytest.fixture
def zeus(monkeypatch):
    monkeypatch.setitem(sys.modules, "zeus.monitor", SimpleNamespace(ZeusMonitor=FakeZeus))
    return monkeypatch


def test_zeus_gives_mean_power_over_its_own_window(zeus):
    found = ZeusWindow.find("cuda", 1)
    assert (found.monitor.gpu_indices, found.monitor.cpu_indices) == ([1], [])
    found.begin()
    assert found.end() == {"watts": {"zeus": 250.0}}
    zeus.setattr(FakeZeus, "packages", (0, 1))
    found = ZeusWindow.find("cpu")
    found.begin()
    assert found.end() == {"watts": {"zeus": 100.0}}


def test_zeus_that_sees_nothing_is_not_there(zeus):
    assert ZeusWindow.find("cpu") is None


def test_a_window_of_zero_joules_or_none_says_nothing(zeus):
    found = ZeusWindow.find("cuda")
    assert found.end() == {}, "no window is open"
    for name, value in (("joules", 0.0), ("fails", True)):
        zeus.setattr(FakeZeus, name, value)
        found.begin()
        assert found.end() == {}


def test_zeus_that_is_absent_or_broken_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "zeus.monitor", None)
    assert ZeusWindow.find("cpu") is None

    def broken(**_):
        raise RuntimeError("no")

    monkeypatch.setitem(sys.modules, "zeus.monitor", SimpleNamespace(ZeusMonitor=broken))
    assert ZeusWindow.find("cuda") is None


def test_the_real_zeus_is_taken_at_its_word():
    """Where it is installed; without a GPU and RAPL it returns empty maps."""
    pytest.importorskip("zeus.monitor", reason="the extra zeus is not installed")
    found = ZeusWindow.find("cpu")
    if RaplMeter.find()[0] is None:
        assert found is None
    assert torch.cuda.is_available() or ZeusWindow.find("cuda") is None
