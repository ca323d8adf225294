"""Derived numbers: S-MBU and S-MFU against the figures known for Mixtral on an H200; nothing unknown becomes a zero."""

from __future__ import annotations

from dataclasses import replace

import pytest
from core_arms import layer_of

from moebench.catalogue.hardware import Hardware, hardware_table
from moebench.catalogue.models import resolve_layer
from moebench.derive import cost, limit_ms, performance, s_mbu, s_mfu
from moebench.point import STAGES, Problem, Variant
from moebench.work import Work, point_work

# The figures were made with 989.5 TFLOP/s, where the table rounds to 989; its data sheet has no fp32 peak.
H200 = replace(hardware_table()["H200-SXM-141GB"], bf16_dense_tflops=989.5, fp32_dense_tflops=66.9)
MIXTRAL = resolve_layer("mixtral-8x7b")[1].layer


@pytest.mark.parametrize(
    ("tokens", "active", "latency_ms", "mbu", "mfu"),
    [(1, 2, 0.1889, 77.7, 0.38), (16, 8, 0.6619, 88.7, 1.72), (16384, 8, 19.735, 3.0, 59.1)],
)
def test_mixtral_on_an_h200(tokens: int, active: int, latency_ms: float, mbu: float, mfu: float) -> None:
    """One layer, balanced, expert weights only, router GEMM excluded; vLLM 0.14 latencies of AIConfigurator's table."""
    problem, variant = Problem("mixtral-8x7b", MIXTRAL, tokens), Variant("any", "bf16", scope="experts")
    work = point_work(problem, variant, active_experts=active, kept=2 * tokens)
    found = performance(latency_ms, work, problem, variant, H200)
    assert round(100 * found["s_mbu"], 1) == mbu
    assert round(100 * found["s_mfu"], 2 if mfu < 10 else 1) == mfu
    assert found["tokens_per_s"] == pytest.approx(tokens / latency_ms * 1e3)
    assert found["tflops"] == pytest.approx(work.flops / latency_ms / 1e9)
    assert found["gbytes_per_s"] == pytest.approx(work.compulsory_bytes / latency_ms / 1e6)


def test_peaks_are_dense_and_by_precision() -> None:
    problem = Problem("m", MIXTRAL, 16)
    work = point_work(problem, Variant("p"))
    rate = {p: performance(1.0, work, problem, Variant("p", p), H200)["s_mfu"] for p in ("fp32", "bf16", "fp16")}
    assert rate["bf16"] == rate["fp16"] == pytest.approx(work.flops / 1e-3 / 989.5e12, rel=1e-9)
    assert rate["fp32"] == pytest.approx(work.flops / 1e-3 / 66.9e12)


def test_more_devices_have_more_peak() -> None:
    assert s_mfu(1e12, 1.0, 2.0, n_devices=4) == pytest.approx(s_mfu(1e12, 1.0, 2.0) / 4) == pytest.approx(0.125)
    assert s_mbu(1e9, 1.0, 2.0, n_devices=4) == pytest.approx(s_mbu(1e9, 1.0, 2.0) / 4) == pytest.approx(0.125)


def numbers(scope: str = "layer", direction: str = "forward", hardware: Hardware | None = H200, **routed):
    problem, variant = Problem("m", layer_of(), 4, direction=direction), Variant("p", scope=scope)
    return performance(1.0, point_work(problem, variant, **routed), problem, variant, hardware)


def test_s_mbu_is_of_forward_passes_that_stream_weights() -> None:
    assert numbers()["s_mbu"] > 0
    assert numbers("experts")["s_mbu"] > 0
    assert numbers(direction="forward_backward")["s_mbu"] is None
    for stage in STAGES:
        assert numbers(stage)["s_mbu"] is None


def test_forward_backward_is_three_w() -> None:
    assert numbers(direction="forward_backward")["s_mfu"] == pytest.approx(3 * numbers()["s_mfu"])


def test_a_stage_without_flops_has_no_rate() -> None:
    for stage in ("plan", "permute", "combine"):
        found = numbers(stage)
        assert (found["tflops"], found["s_mfu"]) == (None, None)
        assert found["gbytes_per_s"] > 0
    assert numbers("up_projection")["s_mfu"] > 0


@pytest.mark.parametrize("hardware", [None, Hardware("unknown")])
def test_unknown_hardware_gives_null_and_never_zero(hardware: Hardware | None) -> None:
    found = numbers(hardware=hardware)
    assert (found["s_mfu"], found["s_mbu"]) == (None, None)
    assert found["tokens_per_s"] == 4000
    assert cost(1e3, hardware, 0.5) == {"usd_per_mtok": None, "gco2_per_mtok": None}


def test_half_known_hardware_gives_the_known_half() -> None:
    assert numbers(hardware=replace(H200, fp32_dense_tflops=None))["s_mfu"] is None
    assert numbers(hardware=replace(H200, fp32_dense_tflops=None))["s_mbu"] is not None
    assert numbers(hardware=replace(H200, mem_bw_gbs=None))["s_mbu"] is None


def test_limit_is_the_slower_of_compute_and_memory() -> None:
    ceilings = {"gemm_tflops": {"fp32": 2.0}, "copy_gbs": 10.0, "read_gbs": 20.0}
    assert limit_ms(Work(4e12, 0, 0, 0), "fp32", ceilings) == pytest.approx(2000)
    assert limit_ms(Work(0, 20e9, 30e9, 50e9), "fp32", ceilings) == pytest.approx(5000)  # the better of copy and read
    assert limit_ms(Work(4e12, 20e9, 30e9, 50e9), "fp32", ceilings) == pytest.approx(5000)
    assert limit_ms(Work(20e12, 20e9, 30e9, 50e9), "fp32", ceilings) == pytest.approx(10000)


@pytest.mark.parametrize(
    "ceilings",
    [None, {}, {"gemm_tflops": {"bf16": 2.0}, "copy_gbs": 1.0}, {"gemm_tflops": {"fp32": 2.0}},
     {"gemm_tflops": {"fp32": 2.0}, "copy_gbs": None, "read_gbs": None}, {"gemm_tflops": None, "copy_gbs": 1.0},
     {"gemm_tflops": {"fp32": None}, "copy_gbs": 1.0}],
)  # fmt: skip
def test_no_limit_without_both_ceilings(ceilings: dict | None) -> None:
    assert limit_ms(Work(1e12, 1e9, 0, 0), "fp32", ceilings) is None


def test_cost_of_rent_needs_no_power() -> None:
    rented = Hardware("r", usd_per_gpu_hour=3.6)
    assert cost(1000.0, rented, None)["usd_per_mtok"] == pytest.approx(1.0)  # 0.001 $/s over 1,000 tokens/s
    assert cost(1000.0, replace(rented, usd_per_gpu_hour=None), 5.0)["usd_per_mtok"] is None


def test_carbon_needs_measured_power() -> None:
    green = Hardware("g", gco2_per_kwh=360.0)
    assert cost(1000.0, green, None)["gco2_per_mtok"] is None
    # 0.5 J a token is 0.5 MJ a million tokens, 0.1389 kWh.
    assert cost(1000.0, green, 0.5)["gco2_per_mtok"] == pytest.approx(360 * 0.5e6 / 3.6e6)
