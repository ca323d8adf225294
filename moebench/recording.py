"""From what became of an entry to its Record. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from moebench.catalogue.hardware import Hardware
from moebench.catalogue.routers import is_causal
from moebench.derive import cost, limit_ms, performance
from moebench.entry import Entry, work_of
from moebench.measure.latency import median_interval
from moebench.measure.steadiness import outliers
from moebench.point import DROPLESS, YARDSTICKS, Block
from moebench.record import ROUTING_COLUMNS, STATE_COLUMNS, Record

# Measured ceilings are lower bounds: a good kernel may pass them by some percent, and noise may have lowered them. What
# is beyond this is no longer explained so, and the row is flagged: work may have been left out, or run elsewhere.
CEILING_MARGIN = 1.25


@dataclass(frozen=True)
class Context:
    """What every record of a run shares.

    Attributes:
        reached: the ceilings, raised to what the yardsticks of the row's own block have reached (`reached`).
    """

    run_id: str
    suite: str
    device: str
    hardware: Hardware | None
    ceilings: dict[str, Any] | None
    providers: dict[str, dict[str, Any]]
    threads: int | None = None
    modes: str | None = None
    replicate: int = 0
    reached: dict[str, Any] | None = None


def reached(ceilings: dict[str, Any] | None, entries: Iterable[Entry]) -> dict[str, Any] | None:
    """The ceilings, raised where a block's own yardsticks were faster at their best."""
    if not ceilings:
        return None
    speeds = dict(ceilings) | {"gemm_tflops": dict(ceilings.get("gemm_tflops") or {})}
    for entry in entries:
        name, best_ms = entry.variant.provider, min(entry.samples_ms, default=0.0)
        if name not in YARDSTICKS or not entry.live or not best_ms:
            continue
        if name == "gemm":
            speeds["gemm_tflops"] |= _higher(
                speeds["gemm_tflops"], entry.variant.precision, entry.facts["flops"] / best_ms / 1e9
            )
        else:
            speeds |= _higher(speeds, f"{name}_gbs", entry.facts["moved_bytes"] / best_ms / 1e6)
    return speeds


def _higher(speeds: dict[str, Any], name: str, speed: float) -> dict[str, float]:
    return {name: max(speed, speeds[name])} if speeds.get(name) else {}


def record_of(entry: Entry, block: Block, context: Context, state_flags: list[str]) -> Record:
    """The Record of one entry, whatever its outcome."""
    outcome: dict[str, Any]
    if not entry.live:
        outcome = {"status": entry.status, "reason": entry.reason}
    elif entry.samples_ms and not median(entry.samples_ms):
        outcome = {"status": "failed", "reason": f"its timer, {entry.warmth.get('timer')}, reads 0 ms"}
    elif entry.samples_ms:
        outcome = {"status": "measured", **_measured(entry, context)}
        outcome["flags"] = entry.flags + state_flags + _memory_flags(entry) + outcome["flags"]
    else:
        outcome = {"status": "verified"}
    known = _identity(entry, block, context) | _modes(entry, context) | _routing(entry) | _errors(entry)
    return Record(**(known | outcome))


def skipped(entry: Entry, block: Block, context: Context, reason: str) -> Record:
    """The Record of an entry that was not reached."""
    entry.fail("skipped", reason)
    return record_of(entry, block, context, [])


def _identity(entry: Entry, block: Block, context: Context) -> dict[str, Any]:
    problem, variant, layer = block.problem, entry.variant, block.problem.layer
    provider = context.providers.get(variant.provider, {})
    return {
        "run_id": context.run_id,
        "block_id": block.block_id,
        "point_id": entry.point_id,
        "suite": context.suite,
        "model": problem.model,
        "provider": variant.provider,
        "provider_version": provider.get("version"),
        "provider_hash": provider.get("hash"),
        "role": entry.role,
        "scope": variant.scope,
        "direction": problem.direction,
        "layout": variant.layout,
        "device": context.device,
        "precision": variant.precision,
        "tokens": problem.tokens,
        "hidden_size": layer.hidden_size,
        "expert_ffn_size": layer.expert_ffn_size,
        "routed_experts": layer.routed_experts,
        "top_k": layer.top_k,
        "shared_experts": layer.shared_experts,
        "capacity_factor": None if variant.capacity_factor == DROPLESS else variant.capacity_factor,
        "capacity_rounding": variant.capacity_rounding,
        "drop_order": variant.drop_order,
        "router": layer.router.kind,
        "router_mode": "training" if layer.router.training else "inference",
        "causal": is_causal(layer.router, variant.capacity) if entry.role == "arm" else None,
        "traffic": problem.traffic,
        "phase": problem.phase,
        "seed": problem.seed,
        "replicate": context.replicate,
    }


def _modes(entry: Entry, context: Context) -> dict[str, Any]:
    """What it ran under; null where it did not run."""
    return {"threads": context.threads, "modes": context.modes} if entry.facts else {}


def _routing(entry: Entry) -> dict[str, Any]:
    facts = entry.facts
    names = ROUTING_COLUMNS if entry.role == "arm" else ()
    backward = 3.0 if entry.point.problem.direction == "forward_backward" else 1.0
    executed = facts.get("executed_flops")
    return {
        **{name: facts.get(name) for name in names},
        "executed_flops": None if executed is None else backward * executed,
        "checked_on": facts.get("checked_on"),
    }


def _errors(entry: Entry) -> dict[str, Any]:
    verdict = entry.verdict or {}
    return {name: verdict.get(name) for name in ("rel_error", "max_error", "fidelity_error")}


def _measured(entry: Entry, context: Context) -> dict[str, Any]:
    samples = entry.samples_ms
    low, high = median_interval(samples)
    latency = median(samples)
    numbers: dict[str, Any] = {
        "timer": entry.warmth["timer"],
        "timer_reason": entry.warmth["why"] or None,
        "cache": entry.warmth["cache"],
        "latency_ms": latency,
        "latency_ms_low": low,
        "latency_ms_high": high,
        "wall_ms": median(entry.wall_ms),
        "first_call_ms": entry.warmth["first_call_ms"],
        "prepare_ms": entry.facts.get("prepare_ms"),
        "samples_ms": samples,
        "wall_samples_ms": None if entry.wall_ms == samples else entry.wall_ms,
        "sample_round": entry.rounds,
        "outlier_samples": outliers(samples),
        **{name: entry.state.get(name) for name in STATE_COLUMNS},
        "peak_memory_bytes": entry.peak.get("peak_memory_bytes"),
        "flags": [],
    }
    if entry.variant.provider in YARDSTICKS:
        return numbers | _yardstick(entry, latency)
    return numbers | _derived(entry, latency, context)


def _yardstick(entry: Entry, latency_ms: float) -> dict[str, Any]:
    flops, moved = entry.facts["flops"], entry.facts["moved_bytes"]
    return {
        "tflops": flops / latency_ms / 1e9 if flops else None,
        "gbytes_per_s": moved / latency_ms / 1e6,
        "executed_flops": flops or None,
    }


def _derived(entry: Entry, latency_ms: float, context: Context) -> dict[str, Any]:
    problem, variant = entry.point.problem, entry.variant
    work = work_of(entry)
    assert work is not None
    numbers: dict[str, Any] = performance(latency_ms, work, problem, variant, context.hardware)
    limit = limit_ms(work, variant.precision, context.ceilings)
    cold = entry.warmth["cache"] == "cold"
    fraction = limit / latency_ms if cold and limit is not None else None
    numbers["limit_ms"], numbers["limit_fraction"] = limit, fraction
    least = limit_ms(work, variant.precision, context.reached or context.ceilings)
    too_fast = cold and least is not None and least / latency_ms > CEILING_MARGIN
    numbers["flags"] = ["faster_than_ceiling"] if too_fast else []
    numbers |= _energy(entry)
    numbers["flags"] += entry.energy.get("flags") or []
    per_token = numbers["energy_j_per_token"]
    return numbers | cost(problem.tokens / latency_ms * 1e3, context.hardware, per_token)


# Column -> what the summary of an arm's windows calls it, in joules of a call.
ENERGY_COLUMNS = {
    "energy_j_per_token": "gross_j_per_call",
    "energy_j_per_token_low": "gross_j_per_call_low",
    "energy_j_per_token_high": "gross_j_per_call_high",
    "energy_net_j_per_token": "net_j_per_call",
    "energy_second_j_per_token": "second_j_per_call",
}


def _energy(entry: Entry) -> dict[str, Any]:
    """The columns of energy; all null where it was not asked for."""
    found, tokens = entry.energy, entry.point.problem.tokens
    joules = {column: found.get(name) for column, name in ENERGY_COLUMNS.items()}
    return {
        "energy_source": found.get("source"),
        "energy_reason": found.get("reason"),
        "energy_idle_w": found.get("idle_w"),
        "energy_second_source": found.get("second_source"),
        **{column: None if each is None else each / tokens for column, each in joules.items()},
    }


def _memory_flags(entry: Entry) -> list[str]:
    peak = entry.peak.get("peak_memory_bytes")
    return ["memory_below_resolution"] if peak is not None and peak < entry.peak["resolution_bytes"] else []
