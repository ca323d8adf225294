"""Derive: the numbers that follow from a latency, given the work and the ceilings. No torch.

S-MBU and S-MFU are MoE-CAP's (arXiv 2412.07067, section 4) in layer form.
Unknown inputs give None, never zero.
"""

from __future__ import annotations

from typing import Any

from moebench.catalogue.cost import gco2_per_mtok, usd_per_mtok
from moebench.catalogue.hardware import Hardware
from moebench.point import STAGES, Problem, Variant
from moebench.work import Work


def performance(
    latency_ms: float, work: Work, problem: Problem, variant: Variant, hardware: Hardware | None, n_devices: int = 1
) -> dict[str, float | None]:
    """Throughput and its shares of the data-sheet peaks.

    Args:
        latency_ms: median of one call.
        work: of one call, routing as it was.
        hardware: the device's data sheet, or None.
    """
    seconds = latency_ms / 1e3
    peak = hardware.peak_tflops(variant.precision) if hardware else None
    bandwidth = hardware.mem_bw_gbs if hardware else None
    streams_weights = variant.scope not in STAGES and problem.direction == "forward"
    return {
        "tokens_per_s": problem.tokens / seconds,
        "tflops": work.flops / seconds / 1e12 if work.flops else None,
        "gbytes_per_s": work.compulsory_bytes / seconds / 1e9,
        "s_mfu": s_mfu(work.flops, seconds, peak, n_devices) if work.flops else None,
        "s_mbu": s_mbu(work.weight_bytes, seconds, bandwidth, n_devices) if streams_weights else None,
    }


def s_mfu(flops: float, seconds: float, peak_tflops: float | None, n_devices: int = 1) -> float | None:
    """W / latency / (n_devices * dense peak), 0..1."""
    return None if peak_tflops is None else flops / seconds / (n_devices * peak_tflops * 1e12)


def s_mbu(weight_bytes: float, seconds: float, peak_gbs: float | None, n_devices: int = 1) -> float | None:
    """S / latency / (n_devices * peak bandwidth), 0..1; S = bytes of the activated weights."""
    return None if peak_gbs is None else weight_bytes / seconds / (n_devices * peak_gbs * 1e9)


def limit_ms(work: Work, precision: str, ceilings: dict[str, Any] | None) -> float | None:
    """max(W / measured GEMM peak, compulsory bytes / measured bandwidth) in ms."""
    if not ceilings:
        return None
    tflops = (ceilings.get("gemm_tflops") or {}).get(precision)
    speeds = [speed for speed in (ceilings.get("copy_gbs"), ceilings.get("read_gbs")) if speed]
    if not tflops or not speeds:
        return None
    return 1e3 * max(work.flops / (float(tflops) * 1e12), work.compulsory_bytes / (float(max(speeds)) * 1e9))


def cost(tokens_per_s: float, hardware: Hardware | None, joules_per_token: float | None) -> dict[str, float | None]:
    """usd_per_mtok and gco2_per_mtok; power is what was measured, or unknown."""
    watts = None if joules_per_token is None else joules_per_token * tokens_per_s
    return {
        "usd_per_mtok": usd_per_mtok(tokens_per_s, hardware, watts=watts),
        "gco2_per_mtok": gco2_per_mtok(tokens_per_s, hardware, watts=watts),
    }
