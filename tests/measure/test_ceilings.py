"""Measured ceilings: how a probe picks its size and keeps to its time, and a tiny real run."""

import pytest
import torch

from moebench.measure import ceilings
from moebench.measure.ceilings import Probe, best_rate, measure_ceilings


class Machine:
    """Calls take work / rate(work) seconds on a clock of their own."""

    def __init__(self, rate):
        self.now, self.rate, self.calls = 0.0, rate, []

    def probes(self, works):
        return [Probe(work, lambda work=work: lambda: self.run(work)) for work in works]

    def run(self, work):
        self.calls.append(work)
        self.now += work / self.rate(work)

    def timed(self, call):
        begin = self.now
        call()
        return self.now - begin

    def best(self, works, seconds=2.0):
        return best_rate(self.probes(works), seconds, self.timed, lambda: self.now)


CUBES = [2.0 * n**3 for n in (128, 256, 512, 1024, 2048, 4096)]


def test_the_best_size_wins_and_is_not_always_the_largest():
    rates = dict(zip(CUBES, [1e12, 2e12, 5e12, 4e12, 3e12, 3e12], strict=True))
    assert Machine(rates.get).best(CUBES).value == pytest.approx(5e12)


@pytest.mark.parametrize("rate", [1e9, 3e9, 2e11, 5e13])
def test_a_probe_keeps_to_its_time_but_for_one_call(rate):
    machine = Machine(lambda work: rate)
    assert machine.best(CUBES).value == pytest.approx(rate)
    assert machine.now <= 2.0 + machine.calls[-1] / rate + 1e-9


def test_a_hundred_times_slower_precision_is_measured_at_a_small_size():
    machine = Machine(lambda work: 3e9)  # fp16 GEMM on a CPU without it: 1024 square would take 0.7 s a call
    machine.best(CUBES)
    assert max(machine.calls) == CUBES[2]


def test_the_first_size_is_measured_even_when_it_does_not_fit():
    machine = Machine(lambda work: work / 10)
    assert machine.best(CUBES).value == pytest.approx(CUBES[0] / 10)
    assert len(machine.calls) == 1


def scripted(times):
    times = iter(times)
    return best_rate([Probe(1.0, lambda: lambda: None)], 1e9, lambda call: next(times), lambda: 0.0)


def test_one_lucky_time_makes_no_ceiling_and_a_neighbours_burst_lowers_none():
    lucky = scripted([9, *[2.0] * 10, 0.1, *[2.0] * 9])
    assert lucky.value == pytest.approx(0.5)
    assert lucky.spread == pytest.approx(0.95)
    disturbed = scripted([9, *[8.0] * 12, *[2.0] * 8])
    assert disturbed.value == pytest.approx(0.5)


def test_a_warm_up_call_does_not_count():
    assert scripted([1e-9, *[2.0] * 20]) == (0.5, 0.0)


def test_a_real_run_is_whole_and_short():
    found = measure_ceilings("cpu", ["fp32", "bf16"], seconds_per_probe=0.05)
    assert set(found) == {"gemm_tflops", "copy_gbs", "read_gbs", "spread", "seconds", "bytes", "reasons"}
    assert 0 < found["gemm_tflops"]["fp32"] < 100
    assert 0 < found["gemm_tflops"]["bf16"] < 100
    assert 0 < found["copy_gbs"] < 5000
    assert 0 < found["read_gbs"] < 5000
    assert set(found["spread"]) == {"gemm_fp32", "gemm_bf16", "copy", "read"}
    assert found["reasons"] == {}
    assert found["seconds"] < 10


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    ceilings._gemm("cpu", 8, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_buffers_are_four_caches_but_an_eighth_of_the_memory_at_most(monkeypatch):
    monkeypatch.setattr(ceilings, "llc_bytes", lambda kind: 100 << 20)
    monkeypatch.setattr(ceilings, "available_bytes", lambda kind: 64 << 30)
    assert ceilings._buffer_bytes("cpu") == 400 << 20
    monkeypatch.setattr(ceilings, "available_bytes", lambda kind: 80 << 20)
    assert ceilings._buffer_bytes("cpu") == 10 << 20
    monkeypatch.setattr(ceilings, "llc_bytes", lambda kind: None)
    monkeypatch.setattr(ceilings, "available_bytes", lambda kind: 64 << 30)
    assert ceilings._buffer_bytes("cpu") == 64 << 20


def test_gemm_sizes_fit_the_memory(monkeypatch):
    monkeypatch.setattr(ceilings, "available_bytes", lambda kind: 4 * 3 * 4 * 512**2)
    assert [probe.work for probe in ceilings._gemms("cpu", torch.float32)] == CUBES[:3]


def test_copied_bytes_count_twice_and_read_bytes_once():
    assert ceilings._copy("cpu", 4096).work == 8192
    assert ceilings._read("cpu", 4096, torch.sum).work == 4096
    assert ceilings._copy("cpu", 4096).build()().tolist() == [1.0] * 1024
    assert ceilings._read("cpu", 4096, torch.sum).build()().item() == 1024.0


def test_a_precision_without_a_kernel_is_null_with_its_reason(monkeypatch):
    def no_kernel(kind, n, dtype):
        raise RuntimeError('"addmm" not implemented for Half\nmore')

    monkeypatch.setattr(ceilings, "_gemm", no_kernel)
    found = measure_ceilings("cpu", ["fp16"], seconds_per_probe=0.01)
    assert found["gemm_tflops"] == {"fp16": None}
    assert found["reasons"] == {"gemm_fp16": '"addmm" not implemented for Half'}
    assert found["copy_gbs"] > 0


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"'fp7'.*allowed: fp32, bf16, fp16"):
        measure_ceilings("cpu", ["fp7"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_real_gpu_run():
    found = measure_ceilings("cuda", ["fp32", "bf16"], seconds_per_probe=0.5)
    assert found["gemm_tflops"]["bf16"] > found["gemm_tflops"]["fp32"] > 1
    assert 50 < found["copy_gbs"] < 20000
