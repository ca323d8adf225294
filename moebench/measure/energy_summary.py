"""What the energy windows of one arm say together: medians, ranges, flags, or the reason for no number. No torch.

A window is the data of `moebench.measure.energy.Window`, or {"source", "reason"} where there was none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

MIN_PERIODS = 50  # shorter than this many ticks, one tick is over 2 % of the window
NOISY_SPREAD = 0.10
SOURCES_DISAGREE = 0.15
TEMPERATURES_APART_C = 10.0

Data = Mapping[str, Any]


def summarise(idle: Data, busy: Sequence[Data]) -> dict[str, Any]:
    """Joules of one call, from the idle window of the block and the arm's own windows.

    Returns:
        source: the meter's name, or "none".
        reason: why there is no number; None where there is one.
        gross_j_per_call: all joules of a window over its calls, median of the windows; and _low, _high of them.
        net_j_per_call: the same less idle power times the window, median; below zero means noise, and is flagged.
        idle_w: idle power with the context and its tensors alive.
        second_source, second_j_per_call: the first second source that every window has, median.
        flags: see docs/method.md.
    """
    if not busy:
        return _nothing(idle.get("source", "none"), idle.get("reason") or "no window was measured", [])
    flags = _about_windows(busy)
    fault = next(filter(None, map(_fault, busy)), None)
    if fault is not None:
        flag, reason = fault
        return _nothing(busy[0]["source"], reason, flags + ([flag] if flag else []))
    gross = [window["joules"] / window["calls"] for window in busy]
    middle = median(gross)
    idle_w = None if _fault(idle) else idle["joules"] / idle["seconds"]
    net = None if idle_w is None else median(_net(window, idle_w) for window in busy)
    if (max(gross) - min(gross)) / middle > NOISY_SPREAD:
        flags.append("energy_noisy")
    if net is None or idle_w is None:
        flags.append("energy_idle_unknown")
    elif net < 0:
        flags.append("energy_below_idle")
    second = _second(busy)
    if any(abs(joules - middle) > SOURCES_DISAGREE * middle for joules in second.values()):
        flags.append("energy_sources_disagree")
    name = next(iter(second), None)
    return {
        "source": busy[0]["source"],
        "reason": None,
        "gross_j_per_call": middle,
        "gross_j_per_call_low": min(gross),
        "gross_j_per_call_high": max(gross),
        "net_j_per_call": net,
        "idle_w": idle_w,
        "second_source": name,
        "second_j_per_call": None if name is None else second[name],
        "flags": flags,
    }


def _nothing(source: str, reason: str, flags: list[str]) -> dict[str, Any]:
    return {"source": source, "reason": reason, "flags": flags}


def _net(window: Data, idle_w: float) -> float:
    return float((window["joules"] - idle_w * window["seconds"]) / window["calls"])


def _fault(window: Data) -> tuple[str | None, str] | None:
    """(flag, reason) of a window that counts nothing."""
    if "reason" in window:
        return None, window["reason"]
    if not window["ticked"]:
        return "energy_counter_stuck", "the counter did not tick while the window opened or closed"
    watts = window["joules"] / window["seconds"]
    if window["wrap_missed"]:
        return "energy_wrap_missed", "one call outlasted a turn of the counter, which may have wrapped unseen"
    if window["jumped"] or not 0 < watts <= window["max_watts"]:
        return "energy_counter_reset", f"the counter was reset: it jumped, and says {watts:.4g} W over the window"
    return None


def _about_windows(busy: Sequence[Data]) -> list[str]:
    """Flags that do not touch the number."""
    counted = [window for window in busy if "reason" not in window]
    beside = [window["beside"] for window in counted]
    flags = []
    if any(window["seconds"] < MIN_PERIODS * window["period_s"] for window in counted):
        flags.append("energy_window_short")
    if any(seen.get("other_processes") for seen in beside):
        flags.append("energy_shared_gpu")
    reasons = sorted({reason for seen in beside for reason in seen.get("throttle_reasons") or []})
    flags += [f"energy_throttled:{reason}" for reason in reasons]
    starts = [seen["temperature_c"][0] for seen in beside if seen.get("temperature_c")]
    known = [start for start in starts if start is not None]
    if known and max(known) - min(known) > TEMPERATURES_APART_C:
        flags.append("energy_temperatures_apart")
    return flags


def _second(busy: Sequence[Data]) -> dict[str, float]:
    """J per call by second source, median over the windows, where each window has it."""
    watts = [window["beside"].get("watts") or {} for window in busy]
    names = [name for name in watts[0] if all(name in each for each in watts)]
    return {
        name: median(each[name] * window["seconds"] / window["calls"] for each, window in zip(watts, busy, strict=True))
        for name in names
    }
