"""Facts about the machine and its state, from made-up /proc and /sys trees and a fake NVML."""

import json
import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from moebench.measure import device
from moebench.measure.device import StateProbe, contended, device_name, llc_bytes, machine_facts, throttled, versions

HZ = os.sysconf("SC_CLK_TCK")


def test_facts_of_this_machine_are_plain_data_and_plausible():
    facts = machine_facts("cpu")
    assert json.loads(json.dumps(facts)) == facts
    assert facts["logical_cores"] >= facts["usable_cores"] >= 1
    assert facts["torch_threads"] == torch.get_num_threads()
    assert facts["memory_bytes"] > 1 << 28
    assert facts["cpu"] == device_name("cpu") != ""


def test_versions_name_what_numbers_depend_on_and_leave_out_what_is_absent(monkeypatch):
    monkeypatch.setattr(device, "PACKAGES", ("torch", "no-such-package-anywhere"))
    assert set(versions()) == {"python", "torch"}
    assert versions()["torch"] == torch.__version__ or versions()["torch"] == torch.__version__.partition("+")[0]


def cache(cpus, core, index, level, size, shared):
    folder = cpus / f"cpu{core}" / "cache" / f"index{index}"
    folder.mkdir(parents=True)
    for name, text in {"level": level, "size": size, "shared_cpu_list": shared}.items():
        (folder / name).write_text(f"{text}\n")


def test_the_last_level_is_summed_over_its_instances_within_reach(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "_usable_core_ids", lambda: [0, 1, 2])
    for core, shared in [(0, "0-1"), (1, "0-1"), (2, "2-3"), (4, "4-5")]:
        cache(tmp_path, core, 2, 2, "1024K", core)
        cache(tmp_path, core, 3, 3, "32768K", shared)
    assert llc_bytes("cpu", cpus=tmp_path) == 64 << 20


def test_without_an_l3_the_l2_is_last_and_without_any_it_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "_usable_core_ids", lambda: [0])
    assert llc_bytes("cpu", cpus=tmp_path) is None
    cache(tmp_path, 0, 0, 1, "32K", "0")
    cache(tmp_path, 0, 2, 2, "512K", "0")
    assert llc_bytes("cpu", cpus=tmp_path) == 512 << 10


class Proc:
    """A /proc whose cores have spent so many seconds on each kind of time."""

    def __init__(self, folder, monkeypatch, cores=4):
        self.folder, self.own = folder, 0.0
        self.spent = dict.fromkeys(("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal"), 100.0)
        monkeypatch.setattr(device.os, "cpu_count", lambda: cores)
        monkeypatch.setattr(device.time, "process_time", lambda: self.own)
        (folder / "cpuinfo").write_text("model name\t: A  CPU\ncpu MHz\t\t: 2000.0\ncpu MHz\t\t: 3000.0\n")
        self.write()

    def add(self, own=0.0, **seconds):
        self.own += own
        for kind, value in seconds.items():
            self.spent[kind] += value
        self.write()

    def write(self):
        ticks = " ".join(str(round(value * HZ)) for value in self.spent.values())
        (self.folder / "stat").write_text(f"cpu  {ticks} 0 0\ncpu0 {ticks} 0 0\n")


@pytest.fixture
def proc(tmp_path, monkeypatch):
    return Proc(tmp_path, monkeypatch)


def probe(proc, threads=4):
    made = StateProbe("cpu", threads=threads, proc=proc.folder, cpus=proc.folder / "cpus")
    made.begin()
    return made


def test_our_own_work_is_no_contention(proc):
    watch = probe(proc)
    proc.add(own=38.0, user=38.0, idle=2.0)
    state = watch.end()
    assert state["other_cores"] == pytest.approx(0.0, abs=0.01)
    assert state["steal_share"] == 0.0
    assert contended(state) == []


def test_others_on_idle_cores_do_not_contend_and_on_ours_they_do(proc):
    work = {"own": 20.0, "user": 30.0, "idle": 10.0}  # 10 s of 10 are others': one core of four
    beside = probe(proc, threads=2)
    proc.add(**work)
    state = beside.end()
    assert state["other_cores"] == pytest.approx(1.0)
    assert contended(state) == []
    against = probe(proc, threads=4)
    proc.add(**work)
    assert contended(against.end()) == ["contended"]


@pytest.mark.parametrize(("steal", "flags"), [(0.4, []), (1.2, ["contended"])])
def test_more_than_2_percent_stolen_is_contended(proc, steal, flags):
    watch = probe(proc)
    proc.add(own=39.0, user=39.0, steal=steal, idle=1.0 - steal / 2)
    state = watch.end()
    assert state["steal_share"] == pytest.approx(steal / 40, rel=0.05)
    assert contended(state) == flags


def test_the_frequency_is_the_lowest_seen(proc):
    watch = probe(proc)
    (proc.folder / "cpuinfo").write_text("cpu MHz : 1000.0\n")
    watch.sample()
    (proc.folder / "cpuinfo").write_text("cpu MHz : 3000.0\n")
    assert watch.end()["cpu_mhz"] == 1000.0


def test_cpufreq_is_preferred_over_cpuinfo(proc):
    folder = proc.folder / "cpus" / "cpu0" / "cpufreq"
    folder.mkdir(parents=True)
    (folder / "scaling_cur_freq").write_text("1500000\n")
    assert probe(proc).end()["cpu_mhz"] == 1500.0


def test_a_system_without_proc_gives_nulls_and_no_flags(tmp_path):
    watch = StateProbe("cpu", threads=1, proc=tmp_path / "no", cpus=tmp_path / "no")
    watch.begin()
    state = watch.end()
    assert state["steal_share"] is state["other_cores"] is state["cpu_mhz"] is None
    assert contended(state) == []


def test_a_real_probe_reads_this_machine():
    watch = StateProbe("cpu")
    watch.begin()
    end = time.perf_counter() + 0.1
    while time.perf_counter() < end:
        pass
    state = watch.end()
    assert state["seconds"] >= 0.1
    assert json.loads(json.dumps(state)) == state
    if sys.platform == "linux":
        assert 0.0 <= state["steal_share"] <= 1.0
        assert 0.0 <= state["other_cores"] <= state["cores"]


class FakeNvmlError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """A GPU whose readings a test changes: MHz, degrees, milliwatts, reason bits."""
    now = SimpleNamespace(mhz=1800, degrees=40, milliwatts=90_000, bits=0x1)

    def unsupported(*_):
        raise FakeNvmlError("Not Supported")

    fake = SimpleNamespace(
        NVMLError=FakeNvmlError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetClockInfo=lambda handle, kind: now.mhz,
        nvmlDeviceGetTemperature=lambda handle, kind: now.degrees,
        nvmlDeviceGetPowerUsage=lambda handle: now.milliwatts,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: now.bits,
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetEnforcedPowerLimit=lambda handle: 700_000,
        nvmlDeviceGetMaxClockInfo=unsupported,
    )
    properties = SimpleNamespace(name="GPU X", uuid="1", total_memory=9, L2_cache_size=50, major=9, minor=0)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    return now


def test_a_gpus_worst_readings_and_every_throttle_reason_are_kept(nvml):
    watch = StateProbe("cuda")
    watch.begin()
    nvml.mhz, nvml.degrees, nvml.milliwatts, nvml.bits = 1200, 83, 690_000, 0x4 | 0x20
    watch.sample()
    nvml.mhz, nvml.degrees, nvml.milliwatts, nvml.bits = 1700, 70, 300_000, 0x1
    state = watch.end()
    assert (state["sm_mhz"], state["temperature_c"], state["power_w"]) == (1200, 83, 690.0)
    assert state["throttle_reasons"] == ["sw_power_cap", "sw_thermal"]
    assert throttled(state) == ["throttled:sw_power_cap", "throttled:sw_thermal"]


def test_an_arms_state_is_what_was_read_after_its_own_bursts(nvml):
    watch = StateProbe("cuda")
    nvml.mhz, nvml.bits = 300, 0x8
    watch.begin()  # nobody's
    for arm, mhz, degrees, bits in ((0, 1800, 50, 0x1), (3, 1500, 60, 0x4), (0, 1750, 55, 0x0), (3, 1600, 64, 0x1)):
        nvml.mhz, nvml.degrees, nvml.bits = mhz, degrees, bits
        watch.sample(arm)
    watch.end()
    arms = watch.arm_states()
    assert {arm: (own["sm_mhz"], own["memory_mhz"], own["temperature_c"]) for arm, own in arms.items()} == {
        0: (1750, 1750, 55), 3: (1500, 1500, 64)
    }  # fmt: skip
    assert [throttled(own) for own in arms.values()] == [[], ["throttled:sw_power_cap"]]


def test_without_a_gpu_to_read_no_arm_has_a_state_of_its_own(nvml, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    for kind in ("cpu", "cuda"):
        watch = StateProbe(kind)
        watch.begin()
        watch.sample(0)
        watch.end()
        assert watch.arm_states() == {}


def test_an_idle_gpu_or_one_at_user_set_clocks_is_not_throttled(nvml):
    nvml.bits = 0x1 | 0x2 | 0x100
    watch = StateProbe("cuda")
    watch.begin()
    assert watch.end()["throttle_reasons"] == []


def test_gpu_facts_are_null_where_the_driver_does_not_tell(nvml):
    facts = machine_facts("cuda")
    assert (facts["gpu"], facts["driver"], facts["power_limit_w"]) == ("GPU X", "580.1", 700.0)
    assert facts["max_sm_mhz"] is None
    assert llc_bytes("cuda") == 50


def test_a_gpu_without_nvml_says_so(nvml, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    watch = StateProbe("cuda")
    watch.begin()
    assert "nvidia-ml-py is not installed" in watch.end()["nvml"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_real_gpu_has_a_name_and_a_clock():
    watch = StateProbe("cuda")
    watch.begin()
    assert watch.end()["sm_mhz"] > 0
    assert machine_facts("cuda")["gpu"] == device_name("cuda")


def test_after_a_gpus_burst_only_the_gpu_is_read(monkeypatch, tmp_path):
    """A server's cores are hundreds of files: to read them takes longer than the burst."""
    asked = []
    monkeypatch.setattr(device, "_cpu_mhz", lambda proc, cpus: asked.append("cpu") or 1000.0)
    monkeypatch.setattr(device, "_gpu_reading", lambda handle: asked.append("gpu") or {"throttle_reasons": []})
    monkeypatch.setattr(device, "open_gpu", lambda: ("handle", None))
    watch = StateProbe("cuda", proc=tmp_path, cpus=tmp_path)
    watch.begin()
    asked.clear()
    watch.sample(3)
    assert asked == ["gpu"]
    assert watch.end()["cpu_mhz"] == 1000.0
    assert list(watch.arm_states()) == [3]
