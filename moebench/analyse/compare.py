"""Compare: two runs point by point: latency against a control, energy, memory, error, status.

Between two runs nothing is paired. What a day does to all arms alike is taken out by
comparing each point's ratio to a control of its own block (rounds they share, see `controls`);
what is left is judged from the spread of replicates in fresh workers (see `verdicts`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from moebench.analyse.controls import NO_CONTROL, log_ratios, require_same_control
from moebench.analyse.differences import differences, require_comparable
from moebench.analyse.load import Run
from moebench.analyse.matched import Matched
from moebench.analyse.verdicts import MIN_EFFECT, Floats, Judged, judge
from moebench.record import FAULTS, GOOD

RANKS = ("BROKEN", "SLOWER", "HIGHER", "FASTER", "LOWER", "MENDED", "GONE", "NEW", "CHANGED", "UNSURE", "SAME")
WORSE = ("BROKEN", "SLOWER", "HIGHER")
ERROR_FACTOR, ERROR_FLOOR = 2.0, 1e-6  # an error matters when it doubles and is more than float32's own
MEMORY_FLOOR_BYTES = 1 << 20  # what page counters and allocators round to
COLUMNS = (
    "point_id", "problem", "variant", "scope", "metric", "verdict", "regression", "ratio", "ratio_low", "ratio_high",
    "p_adjusted", "old", "new", "unit", "replicates_old", "replicates_new", "control", "source_changed", "flags",
    "reason",
)  # fmt: skip

Row = dict[str, Any]


class Comparison(NamedTuple):
    """What came of comparing two runs.

    Attributes:
        rows: a flat object for each point and metric, worst first (`COLUMNS`); null where there is no number.
        warnings: what differs between the runs and may explain a verdict.
        inflation: by how much all latency intervals were widened, since points scatter more than replicates do.
    """

    rows: list[Row]
    warnings: list[str]
    inflation: float

    @property
    def regressed(self) -> bool:
        """Whether anything got worse."""
        return any(row["regression"] for row in self.rows)


def compare(old: Run, new: Run, control: str | None = None, min_effect: float = MIN_EFFECT) -> Comparison:
    """Compare two runs.

    Args:
        control: a provider that is in every block of both runs, "none" for plain latencies, or None for each
            block's own yardstick.
        min_effect: relative change that matters.

    Raises:
        ValueError: they cannot be compared, have no point in common, or their control is not the same.
    """
    require_comparable(old, new)
    points = Matched(old, new)
    judged, latency = _latency(points, control, min_effect)
    memory = _plain(points, "peak_memory_bytes", "memory", "bytes", 1 + min_effect, MEMORY_FLOOR_BYTES)
    error = _plain(points, "rel_error", "error", None, ERROR_FACTOR, ERROR_FLOOR)
    fidelity = _plain(points, "fidelity_error", "fidelity error", None, ERROR_FACTOR, ERROR_FLOOR)
    rows = [*latency, *_energy(points, min_effect), *memory, *error, *fidelity, *_status(points)]
    warnings = differences(old, new)
    if control == NO_CONTROL:
        warnings.append("control none: latencies as they are, with whatever the day did to all of them")
    return Comparison(sorted(rows, key=_order), warnings, judged.inflation)


def _latency(points: Matched, control: str | None, min_effect: float) -> tuple[Judged, list[Row]]:
    """Ratios to the control, judged; a point that was measured in another way in one of the runs has no verdict."""
    (old, of_old), (new, of_new) = (log_ratios(table, points.ids, control) for table in (points.old, points.new))
    require_same_control(points.old, points.new, {name for point, name in of_new.items() if of_old.get(point) == name})
    otherwise = [points.condition(point) for point in points.ids]
    alike = np.array([[not reason] for reason in otherwise])
    judged = judge(np.where(alike, old, np.nan), np.where(alike, new, np.nan), min_effect)
    rows = _judged_rows(points, "latency_ms", judged, metric="latency", unit="ms")
    for n, row in rows:
        row["control"] = of_new.get(points.ids[n])
        alone = "" if row["control"] else f"no {control or 'yardstick'} was measured beside it"
        row["reason"] = otherwise[n] or alone or row["reason"]
    return judged, [row for _, row in rows]


def _energy(points: Matched, min_effect: float) -> list[Row]:
    old, new = points.values("energy_j_per_token")
    judged = judge(np.log(old), np.log(new), min_effect)
    rows = [row for _, row in _judged_rows(points, "energy_j_per_token", judged, metric="energy", unit="J/token")]
    words = {"SLOWER": "HIGHER", "FASTER": "LOWER"}
    return [_row(points, **{**row, "verdict": words.get(row["verdict"], row["verdict"])}) for row in rows]


def _judged_rows(points: Matched, column: str, judged: Judged, **more: Any) -> list[tuple[int, Row]]:
    """(position, row) of the points that have a number in both runs."""
    found = judged.rows.to_dict("records")
    return [
        (
            n,
            _row(
                points, point_id=points.ids[n], old=old, new=new, verdict=found[n]["verdict"],
                ratio=_factor(found[n]["shift"]), ratio_low=_factor(found[n]["low"]),
                ratio_high=_factor(found[n]["high"]), p_adjusted=_known(found[n]["p"]),
                replicates_old=found[n]["replicates_old"], replicates_new=found[n]["replicates_new"],
                reason=found[n]["why"] or None, **more,
            ),
        )
        for n, old, new in _medians(points, column)
    ]  # fmt: skip


def _plain(
    points: Matched, column: str, metric: str, unit: str | None, factor: float, floor: float
) -> list[Row]:  # fmt: skip
    """What has next to no noise: changed by the factor and by more than `floor`, in every replicate."""
    grids = points.values(column)
    rows = []
    for n, old, new in _medians(points, column):
        then, now = (grid[n][np.isfinite(grid[n])] for grid in grids)
        changed = max(old, new) > factor * min(old, new) and abs(new - old) > floor
        verdict, reason = _turned(then, now) if changed else ("SAME", None)
        rows.append(
            _row(
                points, point_id=points.ids[n], metric=metric, unit=unit, verdict=verdict, reason=reason,
                old=old, new=new, ratio=new / old if old else None,
                replicates_old=len(then), replicates_new=len(now),
            )
        )  # fmt: skip
    return rows


def _turned(then: Floats, now: Floats) -> tuple[str, str | None]:
    if now.min() > then.max():
        return "HIGHER", None
    return ("LOWER", None) if now.max() < then.min() else ("UNSURE", "the replicates of the two runs overlap")


def _medians(points: Matched, column: str) -> Iterator[tuple[int, float, float]]:
    """(position, old, new) of the points that have a number in both runs."""
    old, new = points.medians(column)
    for n in np.flatnonzero(np.isfinite(old) & np.isfinite(new)):
        yield int(n), float(old[n]), float(new[n])


def _status(points: Matched) -> list[Row]:
    """A row for each point whose status is not what it was."""
    then, now, reasons = points.first(0, "status"), points.first(1, "status"), points.first(1, "reason")
    changed = [point for point in points.every if then.get(point) != now.get(point)]
    return [
        _row(points, point_id=point, metric="status", verdict=_turn(then.get(point), now.get(point)),
             reason=_told(then.get(point), now.get(point), reasons.get(point)))
        for point in changed
    ]  # fmt: skip


def _turn(before: str | None, after: str | None) -> str:
    if before is None or after is None:
        return "NEW" if before is None else "GONE"
    if before in GOOD and after in FAULTS:
        return "BROKEN"
    return "MENDED" if before in FAULTS and after in GOOD else "CHANGED"


def _told(before: str | None, after: str | None, reason: object) -> str:
    said = f"{before or 'not in the old run'}, now {after or 'not in the new run'}"
    return f"{said}: {reason}" if isinstance(reason, str) else said


def _row(points: Matched, **values: Any) -> Row:
    """All columns of one row, with what is known of its point."""
    point = values["point_id"]
    known = {"source_changed": points.source_changed(point), "flags": points.flags(point), **points.facts[point]}
    row = {**dict.fromkeys(COLUMNS), **known, **values}
    row["regression"] = row["verdict"] in WORSE
    return row


def _order(row: Row) -> tuple[int, str]:
    return RANKS.index(row["verdict"]), row["metric"]


def _factor(log: float) -> float | None:
    return float(np.exp(log)) if np.isfinite(log) else None


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
