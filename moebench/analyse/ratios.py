"""Ratios of latencies, only between arms that were sampled in the same rounds.

Each round gives one log ratio (of the medians of the two bursts); the ratio is
their median. Its 95 % interval is the order-statistic one (the sign test turned
round; Conover, Practical Nonparametric Statistics, section 3.2): exact for any
distribution, no seed, no resampling, so 100,000 rows cost a second. Under six
rounds no such interval exists; the range of the rounds is given instead, and
under three nothing.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

ROUNDS_FOR_95 = 6  # 1 - 2 * 0.5**6 is the first that reaches 95 %
ROUNDS_FOR_RANGE = 3

Positions = NDArray[np.int64]
Floats = NDArray[np.float64]


def ratios(table: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """How much faster each row is than the baseline variant, in its own block and scope.

    Args:
        table: from `name_rows`.
        baseline: a value of its `variant` column.

    Returns:
        On the table's index: `speedup` (baseline latency / own latency; over 1 is faster), `speedup_low`,
        `speedup_high` (95 %) and `rounds` (pairs used). Null where the block has no measured baseline.
    """
    position = pd.Series(np.arange(len(table)), index=table.index)
    timed = table["status"] == "measured"
    keys = ["block", "scope"]
    is_base = timed & (table["variant"] == baseline)
    base = table.loc[is_base, keys].assign(base=position[is_base]).drop_duplicates(keys)
    rows = table.loc[timed, keys].assign(row=position[timed]).merge(base, on=keys, how="inner")
    found = paired(table, rows["base"].to_numpy(np.int64), rows["row"].to_numpy(np.int64))
    found.index = table.index[rows["row"].to_numpy(np.int64)]
    found.columns = pd.Index(["speedup", "speedup_low", "speedup_high", "rounds"])
    return found.reindex(table.index)


def paired(table: pd.DataFrame, top: Positions, bottom: Positions) -> pd.DataFrame:
    """Ratio of latencies top / bottom for pairs of rows, given by position.

    Both rows of a pair must be of one block. Returns one row a pair: `ratio`, `low`, `high`, `rounds`.
    """
    rounds = _round_medians(table, np.union1d(top, bottom))
    pairs = pd.DataFrame({"pair": np.arange(len(top)), "top": top, "bottom": bottom})
    joined = pairs.merge(rounds, left_on="top", right_on="row").merge(
        rounds, left_on=["bottom", "round"], right_on=["row", "round"], suffixes=("_top", "_bottom")
    )
    joined["log_ratio"] = joined["log_top"] - joined["log_bottom"]
    joined = joined.sort_values(["pair", "log_ratio"])
    count = np.bincount(joined["pair"].to_numpy(np.int64), minlength=len(top))
    middle, low, high = _median_interval(joined["log_ratio"].to_numpy(np.float64), count)
    return pd.DataFrame({"ratio": np.exp(middle), "low": np.exp(low), "high": np.exp(high), "rounds": count})


def _round_medians(table: pd.DataFrame, rows: Positions) -> pd.DataFrame:
    """Median log latency of each row's burst in each round: columns row, round, log."""
    samples, rounds = table["samples_ms"].to_numpy()[rows], table["sample_round"].to_numpy()[rows]
    whole = [_length(s) == _length(r) > 0 for s, r in zip(samples, rounds, strict=True)]
    samples, rounds, rows = samples[whole], rounds[whole], rows[whole]
    if not len(rows):
        return pd.DataFrame({"row": np.empty(0, np.int64), "round": np.empty(0, np.int64), "log": np.empty(0)})
    flat = pd.DataFrame(
        {
            "row": np.repeat(rows, [len(s) for s in samples]),
            "round": np.concatenate(list(rounds)).astype(np.int64),
            "log": np.log(np.concatenate(list(samples)).astype(np.float64)),
        }
    )
    return flat.groupby(["row", "round"], sort=False)[["log"]].median().reset_index()


def _length(values: object) -> int:
    return len(values) if isinstance(values, (list, np.ndarray)) else 0


def _median_interval(ordered: Floats, count: Positions) -> tuple[Floats, Floats, Floats]:
    """Median and 95 % interval of each run of `count` sorted values laid end to end."""
    from scipy.stats import binom  # slow to import, and the runner needs only `write_results`

    start = np.cumsum(count) - count
    # One value stands in for an empty run; its result is masked below.
    ordered = np.append(ordered, np.nan)
    below, above = start + np.maximum(count - 1, 0) // 2, start + count // 2
    middle = (ordered[below] + ordered[above]) / 2
    rank = np.maximum(binom.ppf(0.025, np.maximum(count, 1), 0.5).astype(np.int64), 1)
    low = ordered[np.minimum(start + rank - 1, len(ordered) - 1)]
    high = ordered[np.maximum(start + count - rank, 0)]
    few = count < ROUNDS_FOR_RANGE
    nan = np.full(len(count), np.nan)
    return np.where(count > 0, middle, nan), np.where(few, nan, low), np.where(few, nan, high)
