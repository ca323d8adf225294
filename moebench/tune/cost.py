"""A cost model of a tile, to rank candidates before any is compiled. Its milliseconds are worth their order only.

work       tiles of all experts, dealt to SMs * ctas_per_sm programs: the last wave runs as long as a full one
multiply   2 * block_m * block_n * K at the SM's share of the peak, times how well the tile fills the tensor core
feed       (block_m + block_n) * K bytes out of L2, at the SM's share, and no faster than the bytes that the
           pipeline keeps in flight arrive (Little's law with a latency of about a microsecond)
memory     weights once a band of group_m row tiles, rows and outputs once, at the device's bandwidth
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from moebench.tune.case import Case


class Machine(NamedTuple):
    """Of one device: multiprocessors, dense 16-bit TFLOP/s, memory and L2 bandwidth in TB/s. Data-sheet orders."""

    processors: int
    tflops: float
    memory_tb_s: float
    l2_tb_s: float
    core_rows: int  # rows that the tensor core's instruction fills; fewer are paid in full


MACHINES = {
    "sm_80": Machine(108, 312, 2.0, 5.0, 16),
    "sm_90": Machine(132, 989, 4.8, 7.0, 64),
    "sm_100": Machine(148, 2250, 8.0, 10.0, 128),
    "gfx942": Machine(304, 1307, 5.3, 10.0, 16),
    "gfx950": Machine(256, 2300, 8.0, 12.0, 16),
    "interpreter": Machine(4, 1, 1.0, 1.0, 16),
}
LATENCY_US = 1.0
ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
FP32_SLOWDOWN = 15  # IEEE float32 runs on FMA units


def estimated_ms(case: Case, config: Any, family: str) -> float:
    """Milliseconds of the case in this tile, by the model above."""
    return (_weight_gradient_ms if case.weight_gradient else _grouped_ms)(case, config, MACHINES[family])


def _weight_gradient_ms(case: Case, config: Any, machine: Machine) -> float:
    """The same model of a dW: tiles of block_m by block_n, each a sum over an expert's rows; the sums are written."""
    item, rows = ITEM_BYTES[case.dtype], math.ceil(case.rows / case.experts)
    block_m: int = config.block_m
    block_n: int = config.block_n
    units: int = config.per_unit
    stages: int = config.num_stages
    block_r: int = config.block_r
    tiles = case.experts * math.ceil(case.k / block_m) * math.ceil(case.n / block_n)
    steps = math.ceil(rows / block_r) * block_r  # the last step is paid in full
    peak = machine.tflops * 1e12 / machine.processors / (FP32_SLOWDOWN if case.dtype == "fp32" else 1)
    multiply = 2 * max(block_m, machine.core_rows) * block_n * steps / peak * units
    in_flight = max(1, stages - 1) * (block_m + block_n) * block_r * item * units
    feed = (block_m + block_n) * steps * item * units / _feed_rate(machine, in_flight)
    moved = (case.rows * (case.k + case.n) + case.experts * case.k * case.n) * item
    waves = math.ceil(tiles / (machine.processors * units))
    return max(waves * max(multiply, feed), moved / (machine.memory_tb_s * 1e12)) * 1e3


def _feed_rate(machine: Machine, in_flight: int) -> float:
    """Bytes a second out of L2 into one multiprocessor that keeps so many on their way."""
    return min(machine.l2_tb_s * 1e12 / machine.processors, in_flight / (LATENCY_US * 1e-6))


def _grouped_ms(case: Case, config: Any, machine: Machine) -> float:
    item = ITEM_BYTES[case.dtype]
    block_n: int = config.block_n
    block_k: int = config.block_k
    ctas: int = config.ctas_per_sm
    stages: int = config.num_stages
    programs = machine.processors * ctas
    row_tiles = min(case.experts, case.rows) * math.ceil(case.rows / case.experts / case.block_m)
    tiles = row_tiles * math.ceil(case.n * case.maps / block_n)
    multiply = _multiply_s(case, block_n, machine, swap=config.swap) * ctas
    in_flight = max(1, stages - 1) * (case.block_m + block_n) * block_k * item * ctas
    feed = (case.block_m + block_n) * case.k * item * ctas / _feed_rate(machine, in_flight)
    waves = math.ceil(tiles / programs)
    return max(waves * max(multiply, feed), _memory_s(case, config, machine, item)) * 1e3


def _multiply_s(case: Case, block_n: int, machine: Machine, *, swap: bool) -> float:
    filled = block_n if swap else case.block_m  # what lies on the instruction's long side
    rows = max(filled, machine.core_rows)
    flops = 2 * rows * (case.block_m if swap else block_n) * case.k
    peak = machine.tflops * 1e12 / machine.processors / (FP32_SLOWDOWN if case.dtype == "fp32" else 1)
    return flops / peak


def _memory_s(case: Case, config: Any, machine: Machine, item: int) -> float:
    rows_an_expert = case.rows / case.experts
    group_m: int = config.group_m
    bands = max(1, math.ceil(rows_an_expert / (case.block_m * group_m)))
    active = min(case.experts, case.rows)
    weights = active * case.n * case.maps * case.k * bands
    return (weights + case.rows * (case.k + case.n)) * item / (machine.memory_tb_s * 1e12)
