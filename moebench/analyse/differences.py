"""What differs between two runs, and whether they can be compared at all."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pandas as pd

from moebench.analyse.load import Run

VERSIONS = ("python", "torch", "triton", "numpy", "transformers")
MACHINE = (
    "cpu", "usable_cores", "memory_bytes", "os", "gpu", "gpus", "driver", "cuda", "power_limit_w", "max_sm_mhz",
    "max_memory_mhz", "torch_threads", "held_cores",
)  # fmt: skip
CONDITIONS = ("timer", "cache", "threads", "modes")  # of a row: where one differs, so does what was measured
CLOCKS = {"sm_mhz": 0.02, "memory_mhz": 0.02, "cpu_mhz": 0.1}  # relative change of the median that is worth a word


def require_comparable(old: Run, new: Run) -> None:
    """Refuse what cannot be compared.

    Raises:
        ValueError: the runs are one, or of different devices.
    """
    if old.manifest.run_id == new.manifest.run_id:
        raise ValueError(f"{old.path} and {new.path} are the same run ({old.manifest.run_id})")
    for name in ("device_kind", "device"):
        then, now = getattr(old.manifest, name), getattr(new.manifest, name)
        if then != now:
            raise ValueError(f"{name} was {then!r} and is {now!r}: runs on different devices are not compared")


def differences(old: Run, new: Run) -> list[str]:
    """What matters and differs, one line each with both values; runs that did not end come first."""
    before, after = old.manifest, new.manifest
    unfinished = [run.path for run in (old, new) if run.manifest.finished != "complete"]
    found = [f"{path} is not complete: some of its points may be missing" for path in unfinished]
    found += [_line(name, before.versions.get(name), after.versions.get(name)) for name in VERSIONS]
    found += [_line(name, before.machine.get(name), after.machine.get(name)) for name in MACHINE]
    found += [_line("suite", before.suite, after.suite)]
    if before.suite == after.suite and before.suite_hash != after.suite_hash:
        found.append("the suite file, its overrides or the share of it changed: only points of both runs are compared")
    found += [_clock(name, old.table, new.table, share) for name, share in CLOCKS.items()]
    return [line for line in found if line]


def changed_conditions(conditions: pd.DataFrame) -> list[str]:
    """A line for each change of what points were measured under (`Matched.conditions`)."""
    changes = Counter(zip(conditions["name"], conditions["then"], conditions["now"], strict=True))
    return [
        f"{name}: {then} then, {now} now, at {count} points; there is no verdict on their latency"
        for (name, then, now), count in changes.items()
    ]


def _line(name: str, then: Any, now: Any) -> str:
    return "" if then == now else f"{name}: {_shown(then)} then, {_shown(now)} now"


def _shown(value: Any) -> str:
    return "unknown" if value is None else str(value)


def _clock(name: str, old: pd.DataFrame, new: pd.DataFrame, share: float) -> str:
    then, now = old[name].median(), new[name].median()
    if pd.isna(then) or pd.isna(now) or abs(now - then) <= share * then:
        return ""
    return f"{name}: median {then:.0f} then, {now:.0f} now"
