"""What a nightly keeps of a run: for each case lists of numbers, all of them better when lower. No torch.

An empty list is a gap: the case could not be measured here. A `fault` is none: the case should
have been measured, and its benchmark fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moebench.analyse.controls import BY_DEFAULT
from moebench.analyse.load import load_run
from moebench.analyse.ratios import paired
from moebench.point import Block, Point
from moebench.record import FAULTS

Numbers = dict[str, Any]


def numbers_of(run: Path, points: Mapping[str, Point], replicates: int) -> dict[str, Numbers]:
    """Case id -> its numbers in a run directory that has so many replicates, if it is whole.

    Returns:
        For each case
        `fault`: why it failed in some replicate, or null;
        `device_ms`, `wall_ms`: samples, equally many of each replicate; wall empty where the host has the only clock;
        `over_control`: one ratio a replicate, to the yardstick `control` of its block, from paired rounds;
        `peak_memory_bytes`, `energy_j_per_token`, `rel_error`: one number a replicate.

    Raises:
        ValueError: it is no run directory.
    """
    table = load_run(run).table
    return {name: _numbers(table, _point_id(point), replicates) for name, point in points.items()}


def _point_id(point: Point) -> str:
    return Block(point.problem, (point.variant,)).point_ids()[0]


def _numbers(table: pd.DataFrame, point_id: str, replicates: int) -> Numbers:
    rows = table[table["point_id"] == point_id].sort_values("replicate")
    timed = rows[rows["status"] == "measured"]
    if len(timed) < replicates:
        timed = timed[:0]  # numbers of fewer processes are not the same numbers: a gap
    control, ratios = _over_control(table, timed)
    return {
        "fault": _fault(rows, replicates),
        "device_ms": _balanced(timed["samples_ms"]),
        "wall_ms": _balanced(timed["wall_samples_ms"]),
        "over_control": ratios,
        "control": control,
        **{name: _known(rows[name]) for name in ("peak_memory_bytes", "energy_j_per_token", "rel_error")},
    }


def _fault(rows: pd.DataFrame, replicates: int) -> str | None:
    """The first fault; a replicate that the run does not know, or did not reach, is one."""
    faulty = rows[rows["status"].isin(FAULTS)]
    found = [f"{row.status}: {row.reason}" for row in faulty.itertuples()]
    if found:
        return found[0]
    return None if len(rows) == replicates else f"the run has {len(rows)} of {replicates} replicates of this point"


def _balanced(samples: pd.Series) -> list[float]:
    """Equally many samples of each replicate, spread evenly over it: none outweighs the others."""
    lists = [np.asarray(values, dtype=float) for values in samples if values is not None]
    if not lists or len(lists) < len(samples):
        return []
    count = min(map(len, lists))
    chosen = [values[np.linspace(0, len(values) - 1, count).round().astype(int)] for values in lists]
    return [float(value) for value in np.concatenate(chosen)]


def _over_control(table: pd.DataFrame, timed: pd.DataFrame) -> tuple[str | None, list[float]]:
    """The yardstick's name, and latency over the yardstick's, one a replicate."""
    if timed.empty:
        return None, []
    first = timed.iloc[0]
    block = (table["block_id"] == first["block_id"]) & (table["status"] == "measured")
    for name in BY_DEFAULT:  # as `moebench compare` chooses
        same = table["precision"].eq(first["precision"]) if name == "gemm" else True
        controls = table[block & (table["provider"] == name) & same]
        both = timed[["replicate"]].assign(top=timed.index).merge(
            controls[["replicate"]].assign(bottom=controls.index), on="replicate"
        )  # fmt: skip
        if len(both) == len(timed):
            top, bottom = (table.index.get_indexer(both[side]).astype(np.int64) for side in ("top", "bottom"))
            return name, _known(paired(table, top, bottom)["ratio"])
    return None, []


def _known(values: pd.Series) -> list[float]:
    """All of them, or none where one is missing: fewer replicates are not the same number."""
    return [float(value) for value in values] if len(values) and values.notna().all() else []
