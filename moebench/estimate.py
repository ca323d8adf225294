"""How long a suite will take, phase by phase: a model simple enough to be read here. No torch.

    call      = max(W * extra / GEMM rate, bytes * extra / bandwidth) + launches, at a SHARE of either ceiling
    checking  = the oracle (float64, at most 256 tokens), CHECK_CALLS and some readings of all weights, for each arm
    warming   = WARM_CALLS, at most half of a point's budget
    sampling  = until evidence is enough: typically SAMPLES, in at least MIN_ROUNDS bursts; at most a point's budget
    building  = weights, once for the blocks that follow each other on a layer; draws of inputs and routing

Yardsticks (copy, read, gemm) are arms of every block. A run with ceilings, measured by an earlier run on this
machine, is `calibrated`; without, NOMINAL stands in and the answer says `uncalibrated`. Where earlier runs also tell
how far this model was off in each phase (`moebench.earlier_runs`), its phases are multiplied by that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moebench.block_run import BURST_S, MAX_BURST, MIN_ROUNDS
from moebench.entry import yardstick_variants
from moebench.measure.energy_meters import find_meter
from moebench.point import YARDSTICKS, Block, Point, Problem, Variant, digest
from moebench.suite import DeviceKind, Suite
from moebench.suite_file import Budget
from moebench.work import BYTES_PER_WEIGHT, expected_active, held_bytes, point_work, variant_work

# Modest machines of their kind: two desktop cores; one data-centre GPU.
NOMINAL: dict[str, dict[str, float]] = {
    "cpu": {"gflops": 150.0, "gbs": 30.0},
    "cuda": {"gflops": 400_000.0, "gbs": 2500.0},
}
COMPUTE_SHARE, MEMORY_SHARE = 0.6, {"cpu": 0.3, "cuda": 0.6}  # of large dense GEMMs and of one long copy
NORMALS_PER_SECOND = {"cpu": 200e6, "cuda": 10e9}  # of weights, on the device
DRAWS_PER_SECOND = {"cpu": 200e6, "cuda": 800e6}  # of hidden states, on all threads of the host: two cores, a GPU's
CALL_OVERHEAD = {"cpu": 2e-4, "cuda": 5e-5}  # of a call, and of each expert in a loop over them
START_SECONDS = {"cpu": 2.5, "cuda": 12.0}  # imports of parent and worker, the context
POINT_SECONDS = {"harness": 1e-3, "journal": 3e-4, "table": 1e-4}
MEMORY_SECONDS = {"cpu": 0.04, "cuda": 0.02}  # collecting garbage and giving back free heap, before a pass is watched
YARDSTICK_BYTES = {"cpu": 96e6, "cuda": 256e6}  # that one pass of copy or read moves
COMPILE_SECONDS = {  # of torch.compile, for each arm: twice that where nothing is cached yet, half where all is
    "cpu": {"torch-compile": 4.0, "torch-compile-max-autotune": 8.0},
    "cuda": {"torch-compile": 8.0, "torch-compile-max-autotune": 40.0},
}
# Of Triton and the like where nothing is cached, once a block and precision (scopes share their kernels, and tiles
# follow the tokens) or once a layer. Compiled without a GPU (triton 3.6, two busy cores): ours 40 s for 60 blocks,
# moe-ops 10 to 20 s a model, fbgemm 20 s a block, liger, which tries over a hundred tiles, 256 s. The others: guesses.
JIT_SECONDS = {"triton": 1.5, "fbgemm": 20.0}
LAYER_JIT_SECONDS = {"liger": 200.0, "moe-ops": 15.0, "triton-kernels": 5.0, "sonic-moe": 15.0, "deepgemm": 10.0}
# Triton's interpreter on the reduced twin, in place of timing: for a layer, and for each expert that is active there.
INTERPRETER_SECONDS, INTERPRETER_EXPERT_SECONDS, TWIN_TOKENS = 0.3, 0.06, 16
PROBES = 2  # of the ceilings, beside one for each precision
ORACLE_TOKENS = 256
GRADIENT_PASSES = 3  # over the stack's gradient for each expert: zeros written, then read and added
CHECK_CALLS, CHECK_READINGS = 14, 4  # before the race and after it; readings of all weights for what may have changed
YARDSTICK_CHECK_CALLS = 4
WARM_CALLS, WARM_SECONDS = 10, 0.05  # two windows of the median and the first call; and no shorter than this
SMALL_BYTES, COPIES = 48e6, 8  # weights of which copies rotate, each of them checked; a window then holds all of them
SAMPLES = 24  # that a median on a shared machine takes to be known
SLOW_CALL, SLOW_SAMPLES = 0.5, 6  # a slower call needs fewer
ENERGY_LEAD = 1.1  # of an energy window, whose lead-in comes before it
MAX_ARMS = 40  # evaluated of one block; more are sampled evenly

Phases = dict[str, float]  # phase (`moebench.stopwatch`) -> seconds


@dataclass(frozen=True)
class Estimate:
    """How long it will take.

    Attributes:
        seconds: of the whole suite on such a device.
        basis: "calibrated" (ceilings of this machine) or "uncalibrated" (nominal figures).
        blocks: how many there are.
        sampled: on how many of them the estimate rests.
        phases: phase -> seconds, before a run's limit of seconds cuts them.
    """

    seconds: float
    basis: str
    blocks: int
    sampled: int
    phases: dict[str, float]


@dataclass(frozen=True)
class Rates:
    """What the machine does: FLOP/s by precision, bytes/s, and the kind it is."""

    kind: DeviceKind
    flops: Mapping[str, float]
    bandwidth: float


def estimate_seconds(
    suite: Suite,
    device_kind: DeviceKind,
    ceilings: Mapping[str, Any] | None = None,
    factors: Mapping[str, float] | None = None,
) -> Estimate:
    """Estimate a suite, from all its blocks or an even sample of them.

    Args:
        ceilings: {"gemm_tflops": {precision: x}, "copy_gbs": x, "read_gbs": x} as a manifest carries them.
        factors: phase -> what earlier runs took over what was expected of them.
    """
    rates, basis = _rates(device_kind, ceilings)
    sample, blocks = suite.sample(device_kind), suite.count(device_kind).blocks
    if not blocks:
        return Estimate(0.0, basis, 0, 0, {})
    found = _sum(_block_phases(block, suite, rates) for block in sample)
    # A sample of 1 in n sees neighbours of a layer rarely: where it skips, layers are counted as often as blocks.
    layers = _sum(_layer_phases(block, rates) for block in _first_of_layers(sample))
    each = _times(_sum([found, layers]), suite.replicates * blocks / len(sample))
    phases = _sum([each, _once_phases(suite, sample, device_kind)])
    phases = {name: seconds * (factors or {}).get(name, 1.0) for name, seconds in phases.items()}
    seconds, total = sum(phases.values()), suite.budget.seconds_total
    return Estimate(seconds if total is None else min(seconds, total), basis, blocks, len(sample), phases)


def model_hash() -> str:
    """Changes with this file: what another model expected says nothing about this one."""
    return digest(Path(__file__).read_text())


def call_seconds(point: Point, rates: Rates) -> float:
    """One call of one arm."""
    variant, layer = point.variant, point.problem.layer
    if variant.provider in ("copy", "read"):
        return YARDSTICK_BYTES[rates.kind] / rates.bandwidth
    if variant.provider == "gemm":
        return point_work(point.problem, variant).flops / rates.flops[variant.precision]
    work = variant_work(point.problem, variant)
    dense = variant.provider == "torch-dense"
    # All experts on all tokens: E/K times the FLOPs of the chosen ones, and all weights for the active ones.
    flops = work.flops * (layer.routed_experts / layer.top_k if dense else 1.0)
    moved = work.compulsory_bytes * (max(1.0, _idle(point)) if dense else 1.0)
    moved += _slices_bytes(point)
    compute = flops / rates.flops[variant.precision] / COMPUTE_SHARE
    memory = moved / rates.bandwidth / MEMORY_SHARE[rates.kind]
    launches = expected_active(layer, point.problem.tokens) if variant.provider == "torch-loop" else 1.0
    backward = 3.0 if point.problem.direction == "forward_backward" else 1.0
    return max(compute, memory) + CALL_OVERHEAD[rates.kind] * launches * backward


def _slices_bytes(point: Point) -> float:
    """What autograd moves where a loop takes each expert out of the stack: each time a gradient of all of them."""
    layer, tokens = point.problem.layer, point.problem.tokens
    if point.variant.provider != "torch-loop" or point.problem.direction != "forward_backward":
        return 0.0
    stack = layer.routed_experts * layer.expert_params() * BYTES_PER_WEIGHT[point.variant.precision]
    return GRADIENT_PASSES * expected_active(layer, tokens) * stack


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


def _once_phases(suite: Suite, sample: list[Block], kind: DeviceKind) -> Phases:
    """What comes once a run or once a replicate, whatever the blocks are."""
    precisions = {variant.precision for block in sample for variant in block.variants}
    probe = min(2.0, suite.budget.seconds_per_point)
    starting, ceilings = START_SECONDS[kind] * suite.replicates, probe * (PROBES + len(precisions))
    return {"starting": starting, "ceilings": ceilings, "checking": _layer_jit_seconds(sample, kind)}


def _block_phases(block: Block, suite: Suite, rates: Rates) -> Phases:
    problem, number = block.problem, len(block.variants)
    some = block.variants[:: -(-number // MAX_ARMS)]
    arms = _sum(_arm_phases(Point(problem, variant), suite, rates) for variant in some)
    timed = any(_timed(variant, rates.kind) for variant in some)
    beside = yardstick_variants(block) if timed else []
    yardsticks = _sum(_arm_phases(Point(problem, variant), suite, rates) for variant in beside)
    shared = {
        "building": _draws_seconds(problem, rates),
        "checking": _oracle_seconds(block, rates) + _jit_seconds(block, rates.kind),
    }
    if arms.get("energy"):
        shared["energy"] = _window_seconds(suite.budget)  # idle, once a block
    return _sum([_times(arms, number / len(some)), yardsticks, shared, _times(POINT_SECONDS, number)])


def _sum(parts: Iterable[Phases]) -> Phases:
    found: Phases = {}
    for part in parts:
        for name, seconds in part.items():
            found[name] = found.get(name, 0.0) + seconds
    return found


def _times(phases: Phases, factor: float) -> Phases:
    return {name: seconds * factor for name, seconds in phases.items()}


def _timed(variant: Variant, kind: DeviceKind) -> bool:
    return not (kind == "cpu" and variant.provider == "triton")


def _arm_phases(point: Point, suite: Suite, rates: Rates) -> Phases:
    variant, budget = point.variant, suite.budget
    if not _timed(variant, rates.kind):
        active = expected_active(point.problem.layer, min(point.problem.tokens, TWIN_TOKENS))
        return {"checking": INTERPRETER_SECONDS + INTERPRETER_EXPERT_SECONDS * active}
    call = call_seconds(point, rates)
    weights = held_bytes(point.problem.layer, variant.precision)
    more = COPIES if weights < SMALL_BYTES and variant.provider not in YARDSTICKS else 0
    warming = max(call, min(max(WARM_SECONDS, call * (WARM_CALLS + more)), budget.seconds_per_point / 2))
    found = {"warming": warming, "sampling": _sampling_seconds(call, budget)}
    if variant.provider in YARDSTICKS:
        found["checking"] = YARDSTICK_CHECK_CALLS * call
        return found
    found["checking"] = (CHECK_CALLS + more) * call + CHECK_READINGS * weights / rates.bandwidth
    found["checking"] += COMPILE_SECONDS[rates.kind].get(variant.provider, 0.0)
    found["memory"] = call + MEMORY_SECONDS[rates.kind]
    if suite.energy and _has_meter(rates.kind):
        found["energy"] = budget.energy_trials * _window_seconds(budget)
    return found


def _window_seconds(budget: Budget) -> float:
    return budget.energy_cool_down_seconds + ENERGY_LEAD * budget.energy_window_seconds


@cache
def _has_meter(kind: DeviceKind) -> bool:
    """Whether energy takes time: without a counter it takes none. A GPU, which may not be here, is said to have one."""
    return kind == "cuda" or find_meter("cpu")[0] is not None


def _sampling_seconds(call: float, budget: Budget) -> float:
    """Bursts until the evidence is typically enough: within the budget, but no fewer than the fewest samples."""
    fewest = min(budget.min_samples, SLOW_SAMPLES) if call > SLOW_CALL else budget.min_samples
    burst = max(1, min(MAX_BURST, int(BURST_S / call)))
    rounds = max(MIN_ROUNDS, -(-max(SAMPLES if call <= SLOW_CALL else fewest, fewest) // burst))
    return min(rounds * burst * call, max(budget.seconds_per_point, fewest * call))


def _oracle_seconds(block: Block, rates: Rates) -> float:
    """Float64 at half the rate of fp32, on the sampled tokens, forward twice: as asked, and for fidelity."""
    share = min(1.0, ORACLE_TOKENS / block.problem.tokens)
    work = point_work(block.problem, Variant(provider="", precision="fp32"))
    return 2 * (2 * share * work.flops / rates.flops["fp32"] + 3 * work.weight_bytes / rates.bandwidth)


def _jit_seconds(block: Block, kind: DeviceKind) -> float:
    arms = {(variant.provider, variant.precision) for variant in block.variants}
    return sum(JIT_SECONDS.get(provider, 0.0) for provider, _ in arms) if kind == "cuda" else 0.0


def _layer_jit_seconds(blocks: list[Block], kind: DeviceKind) -> float:
    arms = {(block.problem.layer, variant.provider) for block in blocks for variant in block.variants}
    return sum(LAYER_JIT_SECONDS.get(provider, 0.0) for _, provider in arms) if kind == "cuda" else 0.0


def _draws_seconds(problem: Problem, rates: Rates) -> float:
    """Five draws of hidden states, as long again to make them agree with their routing or for what flows back."""
    return 10 * problem.tokens * problem.layer.hidden_size / DRAWS_PER_SECOND[rates.kind]


def _layer_phases(block: Block, rates: Rates) -> Phases:
    return {"building": block.problem.layer.total_params() / NORMALS_PER_SECOND[rates.kind]}


def _first_of_layers(blocks: list[Block]) -> Iterator[Block]:
    before = None
    for block in blocks:
        if block.problem.layer != before:
            yield block
        before = block.problem.layer
