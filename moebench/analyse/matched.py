"""Matched: what two runs have in common, point by point.

A point is compared where its point_id is in both runs: the same problem, computed the same way. Copy, read and gemm
are no points (every block has its own); layer forms and the dense FFN are.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import pandas as pd

from moebench.analyse.differences import CONDITIONS
from moebench.analyse.load import Run
from moebench.analyse.names import name_rows
from moebench.analyse.verdicts import Floats
from moebench.point import YARDSTICKS
from moebench.record import FAULTS, GOOD, STATUSES

OLD, NEW = 0, 1
FACTS = ["problem", "variant", "scope"]


class Matched:
    """The arms of two runs, their points matched.

    Attributes:
        tables: the rows of the old run and of the new one, on their positions.
        arms: of both, the rows that are points, on the same positions.
        ids: point_ids that are in both, in the order of the new run.
        every: point_ids that are in either.
    """

    def __init__(self, old: Run, new: Run) -> None:
        self.tables = old.table.reset_index(drop=True), new.table.reset_index(drop=True)
        self.arms = _arms(self.tables[OLD]), _arms(self.tables[NEW])
        self.every = pd.Index(pd.unique(pd.concat([self.arms[NEW]["point_id"], self.arms[OLD]["point_id"]])))
        of_new = pd.Index(self.arms[NEW]["point_id"].unique())
        self.ids = of_new[of_new.isin(self.arms[OLD]["point_id"])]
        if not len(self.ids):
            raise ValueError(f"{old.path} and {new.path} have no point in common")
        self._firsts = tuple(arms.groupby("point_id")[[*CONDITIONS, "provider_hash"]].first() for arms in self.arms)

    def grids(self, column: str) -> tuple[Floats, Floats]:
        """A numeric column of both runs, [points, replicates]; NaN where there is no number."""
        old, new = (
            grid_of(self.ids, arms["point_id"], arms["replicate"], arms[column].to_numpy(np.float64))
            for arms in self.arms
        )
        return old, new

    def facts(self) -> pd.DataFrame:
        """What goes with each point whatever is measured: columns `FACTS`, `source_changed`, `flags`."""
        arms = pd.concat([self.arms[NEW], self.arms[OLD]]).drop_duplicates("point_id")
        facts = name_rows(arms.assign(run_id="", suite="")).set_index("point_id")[FACTS].reindex(self.every)
        then, now = (first["provider_hash"].reindex(self.every) for first in self._firsts)
        facts["source_changed"] = (then != now) & then.notna() & now.notna()
        flags = [_flags_of(arms) for arms in self.arms]
        facts["flags"] = [_flags_text(flags[OLD].get(point), flags[NEW].get(point)) for point in self.every]
        return facts

    def conditions(self) -> pd.DataFrame:
        """Under what a point was measured that is not the same in both runs: point_id, name, then, now; first found."""
        found = []
        for name in CONDITIONS:
            both = pd.DataFrame(
                {"then": self._firsts[OLD][name].reindex(self.ids), "now": self._firsts[NEW][name].reindex(self.ids)}
            ).dropna()
            differ = both[both["then"] != both["now"]]
            found.append(differ.assign(name=name).rename_axis("point_id").reset_index())
        return pd.concat(found).drop_duplicates("point_id")

    def statuses(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """On `every`, `status` and `reason` in each run: a fault of any replicate before what the others came to."""
        order = [*FAULTS, *GOOD, *(status for status in STATUSES if status not in (*FAULTS, *GOOD))]
        rank = {status: n for n, status in enumerate(order)}
        old, new = (
            arms.assign(rank=arms["status"].map(rank))
            .sort_values("rank", kind="stable")
            .drop_duplicates("point_id")
            .set_index("point_id")[["status", "reason"]]
            .reindex(self.every)
            for arms in self.arms
        )
        return old, new


def grid_of(ids: pd.Index, points: pd.Series, replicates: pd.Series, values: Floats) -> Floats:
    """[points, replicates] of values that each belong to a point and a replicate; NaN where there is none."""
    rows, (columns, names) = ids.get_indexer(pd.Index(points)), pd.factorize(replicates)
    grid = np.full((len(ids), max(1, len(names))), np.nan)
    known = rows >= 0
    grid[rows[known], columns[known]] = values[known]
    return grid


def _arms(table: pd.DataFrame) -> pd.DataFrame:
    return table[~table["provider"].isin(YARDSTICKS)]


def _flags_of(arms: pd.DataFrame) -> dict[Hashable, set[str]]:
    """The flags of all replicates."""
    found: dict[Hashable, set[str]] = {}
    for point, flags in zip(arms["point_id"], arms["flags"], strict=True):
        if flags is not None and len(flags):
            found.setdefault(point, set()).update(flags)
    return found


def _flags_text(old: set[str] | None, new: set[str] | None) -> str | None:
    """'both: cache_resident; new: contended', or None."""
    old, new = old or set(), new or set()
    parts = (("both", old & new), ("old", old - new), ("new", new - old))
    return "; ".join(f"{name}: {', '.join(sorted(flags))}" for name, flags in parts if flags) or None
