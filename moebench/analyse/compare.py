"""Compare: two runs point by point, in latency, energy, memory, error and status. No torch.

Between two runs nothing is paired. What a day does to all arms alike is taken out by comparing each point's ratio to a
control of its own block and worker (`controls`); what is left is judged by how a run's own workers differ (`verdicts`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from moebench.analyse.controls import NO_CONTROL, controlled
from moebench.analyse.differences import changed_conditions, differences, require_comparable
from moebench.analyse.load import Run
from moebench.analyse.matched import NEW, OLD, Matched
from moebench.analyse.verdicts import MIN_EFFECT, POINTS_FOR_SCATTER, Floats, judge
from moebench.record import FAULTS, GOOD

# Worst first, and so is the table.
VERDICTS = (
    "BROKEN", "SLOWER", "HIGHER", "FASTER", "LOWER", "MENDED", "GONE", "NEW", "CHANGED", "UNSURE", "SAME",
)  # fmt: skip
REGRESSIONS = ("BROKEN", "SLOWER", "HIGHER")
UNCHANGED = ("UNSURE", "SAME")
COLUMNS = (
    "point_id", "problem", "variant", "scope", "metric", "verdict", "regression", "ratio", "ratio_low", "ratio_high",
    "p_adjusted", "old", "new", "unit", "replicates_old", "replicates_new", "control", "source_changed", "flags",
    "reason",
)  # fmt: skip
ERROR_FACTOR, ERROR_FLOOR = 1.5, 1e-6  # float32's own errors are of this size and move with the order of its sums
MEMORY_FLOOR_BYTES = 1 << 20  # what allocators and page counts round to


class Comparison(NamedTuple):
    """What came of comparing two runs.

    Attributes:
        table: a row for each point and metric, worst first; the columns are `COLUMNS`.
        warnings: what differs between the runs and may explain a verdict.
        inflation: by how much all latency intervals were widened, since points scatter more than their replicates.
    """

    table: pd.DataFrame
    warnings: list[str]
    inflation: float

    @property
    def regressed(self) -> bool:
        """Whether any point got worse."""
        return bool(self.table["regression"].any())


def compare(old: Run, new: Run, control: str | None = None, min_effect: float = MIN_EFFECT) -> Comparison:
    """Compare two runs.

    Args:
        control: a provider, "none" for plain latencies, or None for each block's own yardstick.
        min_effect: relative change that matters.

    Raises:
        ValueError: they cannot be compared, have no point in common, or their control is not the same.
    """
    require_comparable(old, new)
    points = Matched(old, new)
    conditions = points.conditions()
    latency, inflation = _latency(points, conditions, control, min_effect)
    rows = [latency, _energy(points, min_effect), *_quiet(points, min_effect), _status(points)]
    table = pd.concat([part for part in rows if len(part)] or [latency], ignore_index=True)
    table = table.merge(points.facts(), left_on="point_id", right_index=True, how="left")
    table["regression"] = table["verdict"].isin(REGRESSIONS)
    order = table["verdict"].map(VERDICTS.index)
    table = table.iloc[np.argsort(order.to_numpy(), kind="stable")].reindex(columns=list(COLUMNS))
    warnings = differences(old, new) + changed_conditions(conditions)
    if control == NO_CONTROL:
        warnings.append("control none: nothing takes out what a day does to all latencies alike")
    if len(latency) < POINTS_FOR_SCATTER:
        few = f"{len(latency)} points were timed in both runs"
        warnings.append(f"{few}: what differs from day to day, point by point, shows from {POINTS_FOR_SCATTER} on")
    return Comparison(table.reset_index(drop=True), warnings, inflation)


def flat_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a comparison as flat objects; null where there is no number."""
    numbers = table.replace([np.inf, -np.inf], np.nan).astype(object)
    return [dict(zip(table.columns, row, strict=True)) for row in numbers.where(numbers.notna(), None).to_numpy()]


def _latency(
    points: Matched, conditions: pd.DataFrame, control: str | None, min_effect: float
) -> tuple[pd.DataFrame, float]:
    """Ratios to the control, judged. Where the conditions or the control are missing, the row says so."""
    against = controlled(points, control)
    said = conditions["name"] + " was " + conditions["then"].astype(str) + " and is " + conditions["now"].astype(str)
    odd = said.set_axis(conditions["point_id"]).reindex(points.ids)
    usable = odd.isna().to_numpy()
    old, new = (np.where(usable[:, None], grid, np.nan) for grid in (against.old, against.new))
    judged, inflation = judge(old, new, min_effect, against.groups)
    names = pd.Series(against.names, dtype=object)
    rows = _changes(points, judged).assign(metric="latency", unit="ms", control=names.where(names != "", None))
    rows.loc[names == "", "reason"] = f"no {control or 'yardstick'} was timed beside it in both runs"
    rows["reason"] = odd.reset_index(drop=True).combine_first(rows["reason"])
    return _with_values(rows, *points.grids("latency_ms")), inflation


def _energy(points: Matched, min_effect: float) -> pd.DataFrame:
    old, new = points.grids("energy_j_per_token")
    then, now = (np.log(np.where(grid > 0, grid, np.nan)) for grid in (old, new))
    rows = _changes(points, judge(then, now, min_effect).rows).assign(metric="energy", unit="J/token")
    rows["verdict"] = rows["verdict"].replace({"SLOWER": "HIGHER", "FASTER": "LOWER"})
    return _with_values(rows, old, new)


def _changes(points: Matched, judged: pd.DataFrame) -> pd.DataFrame:
    rows = judged[["verdict", "p_adjusted", "replicates_old", "replicates_new"]].copy()
    rows["point_id"] = points.ids
    rows["reason"] = judged["why"].where(judged["why"] != "", None)
    for name, log in (("ratio", "shift"), ("ratio_low", "low"), ("ratio_high", "high")):
        rows[name] = np.exp(judged[log])
    return rows


def _quiet(points: Matched, min_effect: float) -> list[pd.DataFrame]:
    """What has next to no noise: memory and errors."""
    return [
        _beyond(points, "peak_memory_bytes", 1 + min_effect, MEMORY_FLOOR_BYTES).assign(metric="memory", unit="bytes"),
        _beyond(points, "rel_error", ERROR_FACTOR, ERROR_FLOOR).assign(metric="error"),
        _beyond(points, "fidelity_error", ERROR_FACTOR, ERROR_FLOOR).assign(metric="fidelity error"),
    ]


def _beyond(points: Matched, column: str, factor: float, floor: float) -> pd.DataFrame:
    """Changed: by the factor, by more than the floor, and every new replicate beyond every old one (else UNSURE)."""
    old, new = points.grids(column)
    then, now = _medians(old), _medians(new)
    with np.errstate(invalid="ignore", divide="ignore"):
        large, small = np.maximum(then, now), np.minimum(then, now)
        changed = (large > factor * small) & (large - small > floor)
        higher = np.fmin.reduce(new, axis=1) > np.fmax.reduce(old, axis=1)
        lower = np.fmax.reduce(new, axis=1) < np.fmin.reduce(old, axis=1)
        ratio = np.where(then > 0, now / then, np.nan)
    verdict = np.select([~changed, higher, lower], ["SAME", "HIGHER", "LOWER"], "UNSURE")
    rows = pd.DataFrame({"point_id": points.ids, "verdict": verdict, "ratio": ratio})
    rows.loc[verdict == "UNSURE", "reason"] = "the replicates of both runs overlap"
    rows["replicates_old"], rows["replicates_new"] = (np.isfinite(grid).sum(axis=1) for grid in (old, new))
    return _with_values(rows, old, new)


def _with_values(rows: pd.DataFrame, old: Floats, new: Floats) -> pd.DataFrame:
    """The medians of both runs; only points that have a number in both."""
    rows = rows.assign(old=_medians(old), new=_medians(new))
    return rows[rows["old"].notna() & rows["new"].notna()]


def _medians(grid: Floats) -> Floats:
    """Median of each row; NaN where there is nothing."""
    medians: Floats = pd.DataFrame(grid).median(axis=1).to_numpy()
    return medians


def _status(points: Matched) -> pd.DataFrame:
    """A row for each point whose status is not what it was."""
    both = points.statuses()
    differ = (both[OLD]["status"] != both[NEW]["status"]).to_numpy()
    then, now = (statuses["status"][differ].astype(object) for statuses in both)
    said = then.fillna("not in the old run") + ", now " + now.fillna("not in the new run")
    reason = both[NEW]["reason"][differ]
    broken = then.isin(GOOD) & now.isin(FAULTS)
    mended = then.isin(FAULTS) & now.isin(GOOD)
    verdict = np.select([then.isna(), now.isna(), broken, mended], ["NEW", "GONE", "BROKEN", "MENDED"], "CHANGED")
    told = said.where(reason.isna(), said + ": " + reason.fillna(""))
    return pd.DataFrame({"point_id": told.index, "verdict": verdict, "reason": told.to_numpy()}).assign(metric="status")
