"""CAP scores: cost, accuracy and performance as ratios to a named baseline.

Every axis reads "higher is better, 1 is the baseline". A score is the geometric
mean over the problems that the variant and the baseline share, so adding a
system never moves another. Fidelity is the ratio of *correct digits*,
-log10(fidelity error), the error held between 1e-6 and 0.99: under 1e-6 the
differences of float32 sums are noise, and a ratio of raw errors would call that
noise a thousandfold.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import pandas as pd

from moebench.analyse.ratios import ratios
from moebench.analyse.select import NOISE
from moebench.point import SCOPES

THROUGHPUT, DECODE, FIDELITY, MEMORY, ENERGY, COST = AXES = (
    "throughput at prefill",
    "latency at decode",
    "fidelity",
    "peak memory",
    "energy",
    "cost",
)
WRONG = 0.99  # fidelity errors are held between NOISE and this
PREFERRED = "torch-loop"
_LOWER_IS_BETTER = {MEMORY: "peak_memory_bytes", ENERGY: "energy_j_per_token", COST: "usd_per_mtok"}


@dataclass(frozen=True)
class Axis:
    """One axis of the radar; `missing` says why no variant has a score on it, "" where one has."""

    name: str
    missing: str = ""


@dataclass(frozen=True)
class Cap:
    """CAP scores of every measured variant.

    Attributes:
        baseline: the variant that is 1 on every axis.
        axes: in fixed order.
        left_out: axis -> why it says nothing here and is not drawn.
        scores: columns variant, axis, ratio (null: missing), n (common problems), reason ("" where there is a ratio).
    """

    baseline: str
    axes: tuple[Axis, ...]
    left_out: dict[str, str]
    scores: pd.DataFrame


def find_baseline(table: pd.DataFrame, name: str | None = None) -> str | None:
    """The variant called `name`, or that provider's, or the default; null where nothing was measured.

    Among several, the one measured on most problems; among equals torch-loop, then the first in the table.

    Raises:
        ValueError: no measured variant or provider has that name.
    """
    rows = _contenders(table)
    if rows.empty:
        return None
    if name in set(rows["variant"]):
        return name
    if name is not None:
        known = rows
        rows = rows[rows["provider"] == name]
        if rows.empty:
            _refuse(known, name)
    count = rows.groupby("variant", sort=False)["problem"].nunique()
    most = count[count == count.max()].index
    preferred = set(rows.loc[rows["provider"] == PREFERRED, "variant"])
    return str(next((variant for variant in most if variant in preferred), most[0]))


def _refuse(rows: pd.DataFrame, baseline: str) -> NoReturn:
    known = list(dict.fromkeys([*rows["variant"], *rows["provider"]]))
    near = difflib.get_close_matches(baseline, known, 1)
    hint = f"; nearest: {near[0]!r};" if near else ";"
    raise ValueError(f"baseline {baseline!r} has no measured row{hint} measured are {', '.join(known)}")


def cap(table: pd.DataFrame, baseline: str) -> Cap:
    """Scores of all variants against `baseline`.

    Args:
        table: from `name_rows`.
        baseline: a value of its `variant` column.

    Raises:
        ValueError: the baseline was never measured.
    """
    rows = _contenders(table)
    if baseline not in set(rows["variant"]):
        _refuse(rows, baseline)
    rows = rows.join(ratios(table, baseline)["speedup"])
    left_out = {COST: _cost_is_latency(rows)} if _cost_is_latency(rows) else {}
    columns = {axis: _axis_ratio(rows, axis, baseline) for axis in AXES if axis not in left_out}
    missing = {axis: _why_missing(rows, axis) if column.isna().all() else "" for axis, column in columns.items()}
    scores = pd.concat([_scores(rows, axis, column, missing[axis]) for axis, column in columns.items()])
    axes = tuple(Axis(name, missing[name]) for name in columns)
    return Cap(baseline, axes, left_out, scores.reset_index(drop=True))


def _contenders(table: pd.DataFrame) -> pd.DataFrame:
    """Measured arms of the widest scope each block has; one replicate."""
    rows = table[(table["role"] == "arm") & (table["status"] == "measured") & (table["replicate"] == 0)]
    rank = rows["scope"].map({scope: place for place, scope in enumerate(SCOPES)})
    return rows[rank == rank.groupby(rows["block"]).transform("min")]


def _axis_ratio(rows: pd.DataFrame, axis: str, baseline: str) -> pd.Series:
    """Ratio of each row to the baseline's row of its block, higher is better; null where not of this axis."""
    if axis in (THROUGHPUT, DECODE):
        speedup: pd.Series = rows["speedup"]
        return speedup.where(_of_phase(rows, axis))
    if axis == FIDELITY:
        digits: pd.Series = -np.log10(rows["fidelity_error"].clip(NOISE, WRONG))
        relative: pd.Series = digits / _baseline_value(rows, digits, baseline)
        return relative
    cost = rows[_LOWER_IS_BETTER[axis]].astype(float)
    paid: pd.Series = cost.where(cost > 0)
    if axis == MEMORY:
        paid = paid.where(~rows["flags"].map(lambda flags: "memory_below_resolution" in list(flags)))
    return _baseline_value(rows, paid, baseline) / paid


def _baseline_value(rows: pd.DataFrame, values: pd.Series, baseline: str) -> pd.Series:
    of_baseline = rows["variant"] == baseline
    by_block = values[of_baseline].groupby(rows.loc[of_baseline, "block"]).first()
    return rows["block"].map(by_block)


def _of_phase(rows: pd.DataFrame, axis: str) -> pd.Series:
    """Rows that speak for prefill (throughput) or decode (latency).

    By label where any row of the family has it, else the largest or smallest T of the family. A family with
    a single T speaks for throughput only. Forward passes only, where there are any.
    """
    forward = rows["direction"] == "forward"
    forward = forward if forward.any() else ~forward
    family = rows["family"]
    label = "prefill" if axis == THROUGHPUT else "decode"
    labelled = (rows["phase"] == label).groupby(family).transform("any")
    several = rows.groupby(family)["tokens"].transform("nunique") > 1
    tokens = rows.groupby(family)["tokens"]
    extreme = tokens.transform("max") if axis == THROUGHPUT else tokens.transform("min")
    at_extreme = (rows["tokens"] == extreme) & (several | (axis == THROUGHPUT))
    # An unlabelled extreme must not pass for a phase when the row says it is another one.
    other = rows["phase"].isin({"prefill", "decode"} - {label})
    chosen: pd.Series = (rows["phase"] == label).where(labelled, at_extreme & ~other)
    return chosen & forward


def _scores(rows: pd.DataFrame, axis: str, ratio: pd.Series, missing: str) -> pd.DataFrame:
    named = pd.DataFrame({"variant": rows["variant"], "log": np.log(ratio)})
    grouped = named.groupby("variant", sort=False)["log"]
    scores = pd.DataFrame({"ratio": np.exp(grouped.mean()), "n": grouped.count()}).reset_index()
    reason = missing or "no problem in common with the baseline on this axis"
    return scores.assign(axis=axis, reason=np.where(scores["n"] > 0, "", reason))[
        ["variant", "axis", "ratio", "n", "reason"]
    ]


def _why_missing(rows: pd.DataFrame, axis: str) -> str:
    if axis == ENERGY:
        sources = set(rows["energy_source"].dropna()) - {"none"}
        return "not measured in this run" if sources else "no energy source on this machine, or energy not asked for"
    if axis == COST:
        return "no price is known for this device"
    if axis == DECODE:
        return "every layer was run at one token count only"
    if axis == THROUGHPUT:
        return "no prefill was timed in this run"
    return "not measured in this run"


def _cost_is_latency(rows: pd.DataFrame) -> str:
    """Why the cost axis would repeat the latency axes; "" where it says something of its own."""
    rate = (rows["usd_per_mtok"] * rows["tokens_per_s"]).dropna()
    if rate.empty or rate.max() / rate.min() > 1.001:
        return ""
    return "left out: every row has the same price per second, so cost would repeat latency"
