"""What the page says in words and small tables: scores, faults, flags, absences, the manifest."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd

from moebench.analyse import Cap, Run, cap, find_baseline
from moebench.analyse.numbers import bytes_text, significant
from moebench.point import YARDSTICKS
from moebench.record import FAULTS, GOOD, STATUSES, Manifest
from moebench.report.columns import COLUMNS, FLAGS

POLYGONS = 4
REASONS = 200  # most lines of the faults table
NAMED = 4  # most variants named in one of them


def scores(table: pd.DataFrame, baseline: str | None = None) -> Cap | None:
    """CAP scores of one run; null where nothing was measured.

    Raises:
        ValueError: the named baseline was never measured.
    """
    variant = find_baseline(table, baseline)
    return None if variant is None else cap(table, variant)


def score_table(found: Cap) -> dict[str, Any]:
    """Rows for the key table beside the radar: variants by axes, the baseline first, then the faster ones."""
    axes = [axis.name for axis in found.axes]
    cells = {(row.variant, row.axis): row for row in found.scores.itertuples()}
    variants = ranked_variants(found)
    lines = [
        {"variant": name, "baseline": name == found.baseline, "cells": [_cell(cells[name, axis]) for axis in axes]}
        for name in variants
    ]
    return {"axes": axes, "lines": lines, "missing": {axis.name: axis.missing for axis in found.axes if axis.missing}}


def ranked_variants(found: Cap) -> list[str]:
    """The baseline, then variants by how many axes they have and the geometric mean of their speeds."""
    wide = found.scores.pivot_table(index="variant", columns="axis", values="ratio", sort=False)
    speed = np.log(wide.reindex(columns=[axis.name for axis in found.axes[:2]])).mean(axis=1)
    order = pd.DataFrame({"axes": wide.notna().sum(axis=1), "speed": speed}).sort_values(
        ["axes", "speed"], ascending=False
    )
    return [found.baseline, *(name for name in order.index if name != found.baseline)]


def drawn_variants(found: Cap, providers: dict[str, str]) -> list[str]:
    """The at most four variants a radar draws: the baseline and the leading variant of each further provider."""
    ranked = ranked_variants(found)
    provider = pd.Series(ranked).map(providers)
    first = pd.Series(ranked)[~provider.duplicated()].tolist()
    return [*first, *(name for name in ranked if name not in first)][:POLYGONS]


def radar(found: Cap, providers: dict[str, str]) -> dict[str, Any]:
    """The radar's axes and polygons.

    Args:
        providers: variant -> provider.
    """
    cells = found.scores.set_index(["variant", "axis"])["ratio"].to_dict()
    axes = [{"name": axis.name, "missing": axis.missing} for axis in found.axes]
    shown = drawn_variants(found, providers)
    polygons = [{"variant": name, "ratios": [_number(cells[name, axis.name]) for axis in found.axes]} for name in shown]
    return {"baseline": found.baseline, "axes": axes, "polygons": polygons}


def counts(table: pd.DataFrame) -> list[tuple[str, int]]:
    """(status, rows) for the statuses present, in their fixed order; yardsticks not counted."""
    found = table.loc[table["role"] == "arm", "status"].value_counts()
    return [(status, int(found[status])) for status in STATUSES if status in found]


def reached(table: pd.DataFrame) -> int:
    """Points of the suite that were tried; the yardsticks that every block brings along are none of its points."""
    return int((~table["provider"].isin(YARDSTICKS) & (table["status"] != "skipped")).sum())


def troubles(table: pd.DataFrame, shown: pd.DataFrame) -> list[dict[str, Any]]:
    """Statuses with a reason, grouped: faults first, then by how often.

    `anchor` leads to the first such row among those `shown` on the page; "" where none is.
    """
    rows = table[table["reason"].notna() & ~table["status"].isin(GOOD)]
    rows = rows.assign(anchor=shown["anchor"].reindex(rows.index))
    grouped = rows.groupby(["status", "reason"], sort=False)
    lines = grouped.agg(rows=("status", "size"), anchor=("anchor", "first"), variants=("variant", _names)).reset_index()
    lines["anchor"] = lines["anchor"].astype(object).where(lines["anchor"].notna(), "")
    lines["fault"] = lines["status"].isin(FAULTS)
    worst = lines.sort_values(["fault", "rows"], ascending=False, kind="stable").head(REASONS)
    return [{str(name): value for name, value in line.items()} for line in worst.to_dict("records")]


def checked(table: pd.DataFrame) -> list[dict[str, Any]]:
    """What was checked and not timed: `checked_on`, how many rows, which variants."""
    grouped = table[table["status"] == "verified"].groupby("checked_on", sort=False)
    lines = grouped.agg(rows=("status", "size"), variants=("variant", _names)).reset_index()
    return [{str(name): value for name, value in line.items()} for line in lines.to_dict("records")]


def _names(variants: pd.Series) -> str:
    """'a, b, c and 4 more'."""
    names = list(dict.fromkeys(variants.astype(str)))
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def flags(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Each flag, how many rows carry it, and what it means."""
    every = table["flags"].explode().dropna()
    found = every.value_counts().head(REASONS)
    return [
        {"flag": name, "rows": int(n), "meaning": FLAGS.get(str(name).split(":")[0], "")} for name, n in found.items()
    ]


def absences(table: pd.DataFrame, manifests: list[Manifest]) -> list[str]:
    """A sentence for each quantity no row has, with the reason."""
    measured = table[table["status"] == "measured"]
    if measured.empty:
        return []
    groups = {column.group: column.key for column in COLUMNS if column.group}
    absent = [group for group, key in groups.items() if measured[key].isna().all()]
    return [f"{group[0].upper()}{group[1:]}: {why_absent(group, measured, manifests)}." for group in absent]


def why_absent(group: str, measured: pd.DataFrame, manifests: list[Manifest]) -> str:
    """Why no row carries this quantity."""
    devices = ", ".join(dict.fromkeys(manifest.device for manifest in manifests))
    if group == "energy":
        reason = next(iter(measured["energy_reason"].dropna()), None)
        return f"no energy source was read on {devices}" + (f" ({reason})" if reason else "")
    if group == "cost":
        return f"no price is known for {devices}; --hardware FILE brings your own"
    if group in ("S-MFU", "S-MBU"):
        return f"no data-sheet peak is known for {devices}; “of limit” uses the ceilings measured here"
    return "not measured in this run"


def constants(table: pd.DataFrame) -> list[tuple[str, str]]:
    """What is the same for all rows and therefore has no column."""
    keys = ("model", "direction", "traffic", "router", "precision", "scope", "device")
    same = [(key, table[key].dropna().unique()) for key in keys]
    return [(key.replace("_", " "), str(values[0])) for key, values in same if len(values) == 1]


def ceilings(runs: list[Run]) -> dict[str, Any]:
    """Per run_id: measured bandwidth (GB/s) and GEMM TFLOP/s by precision; null where not measured."""
    return {run.manifest.run_id: _ceiling(run.manifest.ceilings) for run in runs}


def _ceiling(found: dict[str, Any] | None) -> dict[str, Any] | None:
    found = found or {}
    speeds = [found[key] for key in ("copy_gbs", "read_gbs") if found.get(key)]
    compute = {str(name): float(value) for name, value in (found.get("gemm_tflops") or {}).items() if value}
    return {"gbs": float(max(speeds)), "tflops": compute} if speeds and compute else None


def facts(manifest: Manifest) -> list[tuple[str, list[tuple[str, str]]]]:
    """The manifest as titled lists of (name, value)."""
    apart = {"suite_text", "versions", "machine", "ceilings", "hardware", "cost", "providers"}
    run = manifest.model_dump(exclude=apart | {"seconds", "expected_seconds", "expected_by"})
    sections: list[tuple[str, Any]] = [
        ("Run", run),
        ("Machine", manifest.machine),
        ("Versions", manifest.versions),
        ("Measured ceilings", manifest.ceilings),
        ("Data sheet", manifest.hardware),
        ("Cost inputs", manifest.cost),
        ("Wall time by phase", {phase: f"{seconds:.1f} s" for phase, seconds in manifest.seconds.items()}),
        ("Providers", {name: _provider(facts) for name, facts in manifest.providers.items()}),
    ]
    return [(title, _lines(values)) for title, values in sections]


def _provider(facts: dict[str, Any]) -> str:
    """'torch 2.13.0 · 58c111894ee8cf4c', or why it is unavailable."""
    if "unavailable" in facts:
        return f"unavailable: {facts['unavailable']}"
    return " · ".join(str(value) for value in facts.values() if value is not None)


def _lines(values: dict[str, Any] | None) -> list[tuple[str, str]]:
    kept = {name: value for name, value in (values or {}).items() if value not in ({}, "")}
    return [_line(str(name), value) for name, value in kept.items()]


def _line(name: str, value: Any) -> tuple[str, str]:
    if name.endswith("bytes") and isinstance(value, int):
        return name.removesuffix("bytes").strip("_").replace("_", " ") or "size", bytes_text(value)
    return name.replace("_", " "), _text(value)


def _text(value: Any) -> str:
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return significant(value, 4)
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_text(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _cell(row: Any) -> dict[str, Any]:
    value = _number(row.ratio)
    return {"text": "" if value is None else f"{significant(value)}×", "n": int(row.n), "reason": row.reason}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(f"{value:.5g}")
