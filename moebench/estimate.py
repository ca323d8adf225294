"""How long a suite will take: a model simple enough to be read here. No torch.

    call    = max(W * extra / GEMM rate, bytes * extra / bandwidth) + overhead
    arm     = check + warm-up (calls) + sampling (a budget's seconds, or its fewest samples where they take longer)
    block   = oracle (float64, at most 256 tokens) + its arms + start-up
    layer   = making its weights, once for the blocks that follow each other on it

A run with ceilings (measured by an earlier run on this machine) is `calibrated`;
without, NOMINAL stands in and the answer says `uncalibrated`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moebench.point import Block, Point, Variant
from moebench.suite import DeviceKind, Suite
from moebench.suite_file import Budget
from moebench.work import BYTES_PER_WEIGHT, point_work

# Modest machines of their kind: two desktop cores; one data-centre GPU.
NOMINAL: dict[str, dict[str, float]] = {
    "cpu": {"gflops": 80.0, "gbs": 15.0},
    "cuda": {"gflops": 200_000.0, "gbs": 1500.0},
}
WEIGHTS_PER_SECOND = {"cpu": 100e6, "cuda": 10e9}  # random numbers
CALL_OVERHEAD = {"cpu": 2e-4, "cuda": 5e-5}
START_SECONDS = {"cpu": 4.0, "cuda": 15.0}  # the worker's imports, the context and the probes of the ceilings
BLOCK_SECONDS = 0.5  # routing, yardsticks, the journal
COMPILE_SECONDS = {"torch-compile": 15.0}
INTERPRETER_SECONDS = 5.0  # Triton's interpreter on the reduced twin, in place of timing
ORACLE_TOKENS = 256
CHECK_CALLS = 2
WARM_CALLS = 3
SLOW_CALL = 0.5  # above it five samples are enough
ENERGY_SECONDS = 25.0  # three windows of five seconds and their cool-down
MAX_ARMS = 40  # evaluated of one block; more are sampled evenly


@dataclass(frozen=True)
class Estimate:
    """How long it will take.

    Attributes:
        seconds: of the whole suite on such a device.
        basis: "calibrated" (ceilings of this machine) or "uncalibrated" (nominal figures).
        blocks: how many there are.
        sampled: on how many of them the estimate rests.
    """

    seconds: float
    basis: str
    blocks: int
    sampled: int


@dataclass(frozen=True)
class Rates:
    """What the machine does: FLOP/s by precision, bytes/s, and the kind it is."""

    kind: DeviceKind
    flops: Mapping[str, float]
    bandwidth: float


def estimate_seconds(suite: Suite, device_kind: DeviceKind, ceilings: Mapping[str, Any] | None = None) -> Estimate:
    """Estimate a suite, from all its blocks or an even sample of them.

    Args:
        ceilings: {"gemm_tflops": {precision: x}, "copy_gbs": x, "read_gbs": x} as a manifest carries them.
    """
    rates, basis = _rates(device_kind, ceilings)
    sample, blocks = suite.sample(device_kind), suite.count(device_kind).blocks
    if not blocks:
        return Estimate(0.0, basis, 0, 0)
    each = sum(_block_seconds(block, suite, rates) for block in sample) / len(sample)
    # A sample of 1 in n sees neighbours of a layer rarely: where it skips, layers are counted as often as blocks.
    weights = sum(_weights_seconds(block, rates) for block in _first_of_layers(sample)) / len(sample)
    replicates = suite.replicates
    seconds = replicates * (START_SECONDS[device_kind] + blocks * (each + weights))
    total = suite.budget.seconds_total
    return Estimate(seconds if total is None else min(seconds, total), basis, blocks, len(sample))


def call_seconds(point: Point, rates: Rates) -> float:
    """One call of one arm."""
    work = point_work(point.problem, point.variant)
    layer, provider = point.problem.layer, point.variant.provider
    # All experts on all tokens: E/K times the FLOPs of the chosen ones.
    extra = layer.routed_experts / layer.top_k if provider == "torch-dense" else 1.0
    compute = work.flops * extra / rates.flops[point.variant.precision]
    memory = work.compulsory_bytes * (1.0 if provider != "torch-dense" else max(1.0, _idle(point))) / rates.bandwidth
    per_expert = layer.routed_experts if provider == "torch-loop" else 1
    return max(compute, memory) + CALL_OVERHEAD[rates.kind] * per_expert


def _idle(point: Point) -> float:
    """All weights over the active ones."""
    work, layer = point_work(point.problem, point.variant), point.problem.layer
    every = layer.total_params() * BYTES_PER_WEIGHT[point.variant.precision]
    return every / work.weight_bytes if work.weight_bytes else 1.0


def _rates(kind: DeviceKind, ceilings: Mapping[str, Any] | None) -> tuple[Rates, str]:
    measured = (ceilings or {}).get("gemm_tflops") or {}
    bandwidth = max((ceilings or {}).get(name) or 0.0 for name in ("copy_gbs", "read_gbs"))
    nominal = NOMINAL[kind]
    # A precision that was not probed takes the slowest rate that was.
    default = min((rate for rate in measured.values() if rate), default=nominal["gflops"] / 1e3)
    flops = {name: (measured.get(name) or default) * 1e12 for name in BYTES_PER_WEIGHT}
    known = bool(measured) and bandwidth > 0
    return Rates(kind, flops, (bandwidth or nominal["gbs"]) * 1e9), "calibrated" if known else "uncalibrated"


def _block_seconds(block: Block, suite: Suite, rates: Rates) -> float:
    step = -(-len(block.variants) // MAX_ARMS)
    arms = block.variants[::step]
    each = sum(_arm_seconds(Point(block.problem, arm), suite, rates) for arm in arms) / len(arms)
    return BLOCK_SECONDS + _oracle_seconds(block, rates) + each * len(block.variants)


def _arm_seconds(point: Point, suite: Suite, rates: Rates) -> float:
    if rates.kind == "cpu" and point.variant.provider == "triton":
        return INTERPRETER_SECONDS
    call = call_seconds(point, rates)
    fixed = COMPILE_SECONDS.get(point.variant.provider, 0.0) + (ENERGY_SECONDS if suite.energy else 0.0)
    return fixed + call * (CHECK_CALLS + WARM_CALLS) + _sampling_seconds(call, suite.budget)


def _sampling_seconds(call: float, budget: Budget) -> float:
    """Evidence may be enough sooner: this is the budget, or the fewest samples where they take longer."""
    fewest = min(budget.min_samples, 5) if call > SLOW_CALL else budget.min_samples
    return max(budget.seconds_per_point, fewest * call)


def _oracle_seconds(block: Block, rates: Rates) -> float:
    """Float64 at half the rate of fp32, on the sampled tokens, forward twice: as asked, and for fidelity."""
    share = min(1.0, ORACLE_TOKENS / block.problem.tokens)
    work = point_work(block.problem, Variant(provider="", precision="fp32"))
    return 2 * 2 * share * work.flops / rates.flops["fp32"]


def _weights_seconds(block: Block, rates: Rates) -> float:
    return block.problem.layer.total_params() / WEIGHTS_PER_SECOND[rates.kind]


def _first_of_layers(blocks: list[Block]) -> Iterator[Block]:
    before = None
    for block in blocks:
        if block.problem.layer != before:
            yield block
        before = block.problem.layer
