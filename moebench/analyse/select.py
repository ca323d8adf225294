"""Which rows matter: Pareto fronts, and the few thousand that tell a large run's story."""

from __future__ import annotations

import numpy as np
import pandas as pd

from moebench.record import FAULTS

FRONTS = ("fidelity_error", "peak_memory_bytes", "energy_j_per_token", "usd_per_mtok")
NOISE = 1e-6  # smaller fidelity errors differ only by the order of float32 sums


def pareto(table: pd.DataFrame, x: str, y: str) -> pd.Series:
    """Whether each row is on the front of its problem: no other arm is as good in both and better in one.

    Args:
        table: from `name_rows`.
        x: a column, lower is better.
        y: a column, lower is better.

    Returns:
        bool on the table's index; rows without both numbers, and yardsticks, are never on a front.
    """
    known = (table["role"] == "arm") & table[x].notna() & table[y].notna()
    rows = (
        table.loc[known, ["problem", "scope", x, y]]
        .astype({x: float, y: float})
        .sort_values(["problem", "scope", x, y])
    )
    groups = [rows["problem"], rows["scope"]]
    best_before = rows[y].groupby(groups).cummin().groupby(groups).shift(fill_value=np.inf)
    twin = rows.duplicated(["problem", "scope", x, y])
    leads = (rows[y] < best_before) | twin
    # A twin of a dominated row is dominated too.
    leads = leads.groupby([*groups, rows[x], rows[y]]).transform("first")
    return leads.reindex(table.index, fill_value=False).astype(bool)


def fronts(table: pd.DataFrame) -> pd.DataFrame:
    """For each of `FRONTS`: is a row on the front of latency against it? Fidelity errors in the noise are equal."""
    floored = table.assign(fidelity_error=table["fidelity_error"].clip(lower=NOISE))
    return pd.DataFrame({cost: pareto(floored, "latency_ms", cost) for cost in FRONTS}, index=table.index)


def telling_rows(table: pd.DataFrame, limit: int = 5000) -> pd.DataFrame:
    """At most `limit` rows, in the table's order: faults, winners, losers, Pareto points, flagged, an even sample.

    Args:
        table: from `name_rows`.
        limit: most rows to keep.
    """
    if len(table) <= limit:
        return table
    chosen = np.zeros(len(table), dtype=bool)
    for wanted in (*_interests(table), np.ones(len(table), dtype=bool)):
        fresh = np.flatnonzero(wanted & ~chosen)
        room = limit - int(chosen.sum())
        if len(fresh) > room:
            fresh = fresh[np.linspace(0, len(fresh) - 1, room).round().astype(int)]
        chosen[fresh] = True
    return table[chosen]


def _interests(table: pd.DataFrame) -> list[np.ndarray]:
    arms = table[(table["role"] == "arm") & (table["status"] == "measured")]
    by_contest = arms.groupby(["block", "scope"])["latency_ms"]
    return [
        table["status"].isin(FAULTS).to_numpy(dtype=bool),
        table.index.isin(by_contest.idxmin()),
        table.index.isin(by_contest.idxmax()),
        fronts(table).any(axis=1).to_numpy(),
        table["flags"].map(len).to_numpy() > 0,
    ]
