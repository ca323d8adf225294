"""Controls: what each point is divided by, in its own block and worker, so that what a day does to both cancels.

By default a yardstick of the block: the GEMM in the point's precision, or else the read, or else the copy. A point
keeps to one control in all replicates of both runs: the one that most of them share.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moebench.analyse.matched import NEW, Matched, grid_of
from moebench.analyse.ratios import paired
from moebench.analyse.verdicts import Floats
from moebench.point import YARDSTICKS

NO_CONTROL = "none"
BY_DEFAULT = ("gemm", "read", "copy")  # the nearest to a layer's work comes first
OF_ALL_PRECISIONS = ("read", "copy")  # one of each stands in a block, whatever its precisions


class Controlled(NamedTuple):
    """Every point over its control.

    Attributes:
        old, new: log ratios of both runs, [points, replicates].
        names: the control of each point; "" where it has none.
        groups: [points], equal where the control is one and the same; None where nothing was divided by.
    """

    old: Floats
    new: Floats
    names: list[str]
    groups: NDArray[np.int64] | None


def controlled(points: Matched, control: str | None) -> Controlled:
    """Take the control out of every point of two runs.

    Args:
        control: a provider, `NO_CONTROL` for log latencies as they are, or None for the yardsticks.

    Raises:
        ValueError: a control is not the same thing in both runs, or no point has the one that was named.
    """
    if control == NO_CONTROL:
        with np.errstate(divide="ignore"):
            old, new = (np.log(grid) for grid in points.grids("latency_ms"))
        return Controlled(old, new, [NO_CONTROL] * len(points.ids), None)
    wanted = (control,) if control else BY_DEFAULT
    pairs = [_pairs(table, arms, wanted) for table, arms in zip(points.tables, points.arms, strict=True)]
    chosen = _chosen(*pairs)
    if control and not len(chosen):
        raise ValueError(f"--control {control}: it was not measured beside any point in both runs")
    _require_same(points, list(dict.fromkeys(chosen["control"])))
    old, new = (
        _log_ratios(points.ids, table, found.merge(chosen, on=["point_id", "key"]))
        for table, found in zip(points.tables, pairs, strict=True)
    )
    names = chosen.set_index("point_id")["control"].reindex(points.ids).fillna("")
    blocks = points.arms[NEW].drop_duplicates("point_id").set_index("point_id")["block_id"].reindex(points.ids)
    return Controlled(old, new, list(names), pd.factorize(blocks + " " + names)[0].astype(np.int64))


def _pairs(table: pd.DataFrame, arms: pd.DataFrame, wanted: tuple[str, ...]) -> pd.DataFrame:
    """Every point with every control beside it: point_id, replicate, key (what the control is), rank, arm, beside."""
    keys = ["block_id", "replicate"]
    beside = table[(table["status"] == "measured") & table["provider"].isin(wanted)]
    beside = beside.assign(beside=beside.index, rank=beside["provider"].map(wanted.index))
    beside = beside.rename(columns={"point_id": "control_id", "provider": "control"})
    timed = arms[(arms["status"] == "measured") & ~arms["provider"].isin(wanted)]
    timed = timed.assign(arm=timed.index)[["point_id", *keys, "precision", "scope", "arm"]]
    kept = ["control_id", "control", "precision", "scope", "rank", "beside"]
    pairs = timed.merge(beside[[*keys, *kept]], on=keys, suffixes=("", "_beside"))
    yardstick = pairs["control"].isin(YARDSTICKS)
    # A GEMM of another precision does other work. Yardsticks stand in a block once, whatever the scopes.
    fits = (pairs["precision"] == pairs["precision_beside"]) | pairs["control"].isin(OF_ALL_PRECISIONS)
    fits &= (pairs["scope"] == pairs["scope_beside"]) | yardstick
    # A provider may stand in a block several times (capacity factors): its point says which.
    pairs["key"] = pairs["control"].where(yardstick, pairs["control_id"])
    return pairs[fits].drop_duplicates(["point_id", "replicate", "key"])


def _chosen(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """One control a point: point_id, key, control."""
    by = ["point_id", "key"]
    told = old.groupby(by).agg(count=("beside", "size"), rank=("rank", "first"), control=("control", "first"))
    both = told.join(new.groupby(by).size().rename("count_new"), how="inner").reset_index()
    both["shared"] = both[["count", "count_new"]].min(axis=1)
    best = both.sort_values(["shared", "rank", "key"], ascending=[False, True, True]).drop_duplicates("point_id")
    return best[[*by, "control"]]


def _log_ratios(ids: pd.Index, table: pd.DataFrame, pairs: pd.DataFrame) -> Floats:
    if not len(pairs):
        return np.full((len(ids), 1), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):  # a hurt file may hold samples of 0 ms
        found = paired(table, pairs["arm"].to_numpy(np.int64), pairs["beside"].to_numpy(np.int64))["ratio"]
        logs = np.log(found.to_numpy(np.float64))
    logs[~np.isfinite(logs)] = np.nan
    return grid_of(ids, pairs["point_id"], pairs["replicate"], logs)


def _require_same(points: Matched, names: list[str]) -> None:
    for name in names:
        then, now = (_identity(table, name) for table in points.tables)
        if then != now:
            raise ValueError(
                f"control {name} was {then} and is {now}, so it may have changed itself; name another with --control,"
                f" or --control {NO_CONTROL} for latencies as they are"
            )


def _identity(table: pd.DataFrame, provider: str) -> str:
    """Version and source of a provider, as its rows have them."""
    rows = table.loc[table["provider"] == provider, ["provider_version", "provider_hash"]].drop_duplicates()
    told = rows.fillna("unknown").apply(lambda row: f"{row.iloc[0]} (source {row.iloc[1]})", axis=1)
    return " and ".join(sorted(told))
