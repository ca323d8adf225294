"""The rows a page carries, packed small: at most `LIMIT`, whole families for the charts first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from moebench.analyse import fronts, telling_rows
from moebench.analyse.select import FRONTS
from moebench.report.columns import COLUMNS, DETAILS

LIMIT = 5000
CHARTED = 2000  # rows of whole families; a line with holes would mislead


def page_rows(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows for the page, in the table's order, and the families charted from them.

    Args:
        table: from `name_rows`, joined with `ratios`.
    """
    families = _charted_families(table)
    whole = table["family"].isin(families)
    charted = telling_rows(table[whole], CHARTED if whole.sum() < len(table) else LIMIT)
    rest = telling_rows(table[~whole], LIMIT - len(charted))
    return _derived(table, table.loc[charted.index.union(rest.index)]), families


def _charted_families(table: pd.DataFrame) -> list[str]:
    """All families, or an even sample of as many as make about `CHARTED` rows."""
    families = table["family"].drop_duplicates().tolist()
    if len(table) <= LIMIT:
        return families
    count = max(1, min(len(families), CHARTED * len(families) // len(table)))
    return [families[place] for place in np.linspace(0, len(families) - 1, count).round().astype(int)]


def _derived(table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """What charts and details need beside the record's own columns."""
    same_problems = table[table["problem"].isin(rows["problem"])]
    on_front = fronts(same_problems).loc[rows.index].add_prefix("front_")
    rows = rows.join(on_front)
    rows["intensity"] = 1e3 * rows["tflops"] / rows["gbytes_per_s"]
    rows["samples"] = rows["samples_ms"].map(lambda samples: None if samples is None else len(samples))
    rows["anchor"] = anchors(rows["point_id"])
    return rows


def anchors(point_ids: pd.Series) -> pd.Series:
    """The point id; where several runs hold the same point, the later ones get a number."""
    seen = point_ids.groupby(point_ids).cumcount()
    return point_ids.astype(object).where(seen == 0, point_ids.astype(object) + "-" + (seen + 1).astype(str))


def pack(rows: pd.DataFrame) -> dict[str, Any]:
    """Columns for the page: {"n": rows, "columns": {key: packed}}; see `_pack_column`."""
    shown = [column.key for column in COLUMNS]
    bounds = [key for column in COLUMNS for key in (column.low, column.high) if key]
    charts = ["anchor", "intensity", "model", "problem", *(f"front_{cost}" for cost in FRONTS)]
    keys = dict.fromkeys([*shown, *bounds, *charts, *DETAILS])
    return {"n": len(rows), "columns": {key: _pack_column(rows[key]) for key in keys}}


def _pack_column(column: pd.Series) -> dict[str, Any]:
    """{"all": value} for a constant, {"words": [...], "codes": [...]} for repeating values, else {"values": [...]}."""
    values = [_plain(value) for value in column]
    words = list(dict.fromkeys(map(_hashable, values)))
    if len(words) == 1:
        return {"all": values[0]}
    if len(words) <= max(2, len(values) // 2):
        code = {word: place for place, word in enumerate(words)}
        return {"words": [_unhashable(word) for word in words], "codes": [code[_hashable(value)] for value in values]}
    return {"values": values}


def _plain(value: Any) -> Any:
    """What JSON can hold: null for NaN, five significant digits for floats."""
    if isinstance(value, (list, np.ndarray)):
        return [str(item) for item in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if value is None or pd.isna(value):
        return None
    if isinstance(value, (float, np.floating)):
        number = float(f"{value:.5g}") if not float(value).is_integer() else float(value)
        return int(number) if number.is_integer() and abs(number) < 2**53 else number
    return int(value) if isinstance(value, np.integer) else value


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _unhashable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
