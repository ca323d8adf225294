"""From the rows of one block to one ratio of a target: whose latency over whose, and scaled by what.

Each measure names rows of the block of our row: `top` and `bottom`. The ratio is the sum of the latencies of top over
that of bottom, times `scale`, so that for all but shares and totals over 1 is better:

    of_gemm      (our FLOP/s) / (the block's dense GEMM's FLOP/s)
    of_copy      (our compulsory bytes/s) / (the block's copy's bytes/s)
    over_rival   the fastest rival's latency / ours
    over_bf16    our bfloat16's latency / ours in the row's precision
    share        our stages' latencies / our layer's
    total_us     our stages' latencies in microseconds
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
import pandas as pd
from moebench_suites.published.pages import words
from moebench_suites.published.target_table import Target

from moebench.analyse import paired

OURS = "triton"


@dataclass(frozen=True)
class Pair:
    """Rows of one block, by their place in the table; `bottom` is empty where the sum of `top` is wanted itself."""

    top: list[int]
    bottom: list[int]
    scale: float = 1.0


@dataclass(frozen=True)
class Ratio:
    """One point's ratio with its 95 % interval (nan: too few rounds), the point in words, the flags of its rows."""

    value: float
    low: float
    high: float
    point: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Missing:
    """A point that counts and has no ratio, and why."""

    point: str
    reason: str


def points_of(target: Target, table: pd.DataFrame) -> list[Ratio | Missing]:
    """What each of our rows that counts for the target says, in the table's order.

    Args:
        table: from `rows_of`, of one device.

    Raises:
        ValueError: the target's condition is none that the columns can answer.
    """
    ours = table[(table["provider"] == OURS) & (table["status"] != "not_applicable")]
    try:
        counted = ours.query(target.where, engine="python").index
    except (NameError, SyntaxError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"targets.toml: {target.id}: where: {' '.join(str(error).split())}") from None
    found = [_pair(target, table, place) for place in counted]
    pairs = [each for each in found if isinstance(each, Pair)]
    values = iter(_values(table, pairs))
    return [
        _ratio(table, place, each, *next(values)) if isinstance(each, Pair) else Missing(_text(table, place), each)
        for place, each in zip(counted, found, strict=True)
    ]


def _pair(target: Target, table: pd.DataFrame, place: int) -> Pair | str:
    """Who is held against whom for our row at that place; or why there is no ratio."""
    row = table.loc[place]
    if row["status"] != "measured":
        return _why_not(row)
    found = _MEASURES[target.measure](table[table["block"] == row["block"]], row, target)
    return found if isinstance(found, str) or found.scale > 0 else "a rate of it or of its yardstick is not known"


def _ratio(table: pd.DataFrame, place: int, pair: Pair, value: float, low: float, high: float) -> Ratio:
    flags = {flag for each in pair.top + pair.bottom for flag in table.at[each, "flags"]}
    return Ratio(value, low, high, _text(table, place), tuple(sorted(flags)))


def _text(table: pd.DataFrame, place: int) -> str:
    return point_text(table.loc[place])


def point_text(row: pd.Series) -> str:
    """`qwen3-30b-a3b T 8,192 up_projection uniform`."""
    shape = f"E {row['routed_experts']} K {row['top_k']} D {row['hidden_size']} F {row['expert_ffn_size']}"
    model = shape if row["model"] == "custom" else row["model"]
    replicate = f" replicate {row['replicate']}" if row["replicate"] else ""
    return words(f"{model} T {row['tokens']:,} {row['scope']} {row['traffic']}{replicate}")


def _why_not(row: pd.Series) -> str:
    reason = "" if pd.isna(row["reason"]) else f": {words(row['reason'])}"
    return f"{words(row['provider'])} {row['status'].replace('_', ' ')}{reason}"


# Who is held against whom


def _of_gemm(block: pd.DataFrame, row: pd.Series, target: Target) -> Pair | str:
    gemm = _yardstick(block[block["precision"] == row["precision"]], "gemm")
    if isinstance(gemm, str):
        return gemm
    # The block's GEMM has the FLOPs of its first scope; rates make them equal.
    return Pair([gemm.name], [row.name], row["tflops"] * row["latency_ms"] / (gemm["tflops"] * gemm["latency_ms"]))


def _of_copy(block: pd.DataFrame, row: pd.Series, target: Target) -> Pair | str:
    copy = _yardstick(block, "copy")
    if isinstance(copy, str):
        return copy
    moved = row["gbytes_per_s"] * row["latency_ms"] / (copy["gbytes_per_s"] * copy["latency_ms"])
    return Pair([copy.name], [row.name], moved)


def _over_rival(block: pd.DataFrame, row: pd.Series, target: Target) -> Pair | str:
    same = _alike(block, row)
    others = same[(same["role"] == "arm") & (same["provider"] != OURS)]
    if target.rivals:
        others = others[others["provider"].isin(target.rivals)]
    timed = others[others["status"] == "measured"]
    if len(timed):
        return Pair([timed["latency_ms"].idxmin()], [row.name])
    return _why_not(others.iloc[0]) if len(others) else f"no {' or '.join(target.rivals) or 'other arm'} in its block"


def _over_bf16(block: pd.DataFrame, row: pd.Series, target: Target) -> Pair | str:
    plain = _ours(_alike(block, row, "bf16"), "bf16")
    return plain if isinstance(plain, str) else Pair([plain.name], [row.name])


def _share(block: pd.DataFrame, row: pd.Series, target: Target) -> Pair | str:
    stages = _stages(block, row, target.stages)
    whole = [row.name]
    if row["scope"] == "experts":  # the layer is its gate, and what comes after
        gate = _stages(block, row, ("gate",))
        if isinstance(gate, str):
            return gate
        whole += gate
    return stages if isinstance(stages, str) else Pair(stages, whole)


def _total_us(block: pd.DataFrame, row: pd.Series, target: Target) -> Pair | str:
    stages = _stages(block, row, target.stages)
    return stages if isinstance(stages, str) else Pair(stages, [], 1e3)


_MEASURES: dict[str, Callable[[pd.DataFrame, pd.Series, Target], Pair | str]] = {
    "of_gemm": _of_gemm, "of_copy": _of_copy, "over_rival": _over_rival, "over_bf16": _over_bf16, "share": _share,
    "total_us": _total_us,
}  # fmt: skip
assert set(_MEASURES) == set(Target.measures())


def _alike(block: pd.DataFrame, row: pd.Series, precision: str | None = None) -> pd.DataFrame:
    """Rows of the block that compute the same as `row`, or the same in another precision."""
    dropless = pd.isna(row["capacity_factor"])
    capacity = block["capacity_factor"].isna() if dropless else block["capacity_factor"] == row["capacity_factor"]
    same = capacity & (block["scope"] == row["scope"])
    return block[same & (block["precision"] == (precision or row["precision"]))]


def _yardstick(block: pd.DataFrame, name: str) -> pd.Series | str:
    return _first(block[block["provider"] == name], name)


def _ours(rows: pd.DataFrame, what: str) -> pd.Series | str:
    return _first(rows[rows["provider"] == OURS], f"{OURS} {what}", f"{what}: ")


def _first(rows: pd.DataFrame, what: str, of: str = "") -> pd.Series | str:
    """The first row where it is measured, else why it is not; `of` tells it from other rows of its provider."""
    if rows.empty:
        return f"no {what} in its block"
    row = rows.iloc[0]
    return row if row["status"] == "measured" else f"{of}{_why_not(row)}"


def _stages(block: pd.DataFrame, row: pd.Series, stages: Sequence[str]) -> list[int] | str:
    same = block[block["precision"] == row["precision"]]
    found = [_ours(same[same["scope"] == stage], stage) for stage in stages]
    lacking = [each for each in found if isinstance(each, str)]
    return lacking[0] if lacking else [each.name for each in found]  # type: ignore[union-attr]


# From latencies to a number


def _values(table: pd.DataFrame, pairs: Sequence[Pair]) -> list[tuple[float, float, float]]:
    """(value, low, high) of each pair."""
    sides = pd.DataFrame([_by_round(table, side) for pair in pairs for side in (pair.top, pair.bottom) if pair.bottom])
    places = np.arange(len(sides))
    found = iter(paired(sides, places[::2], places[1::2]).itertuples() if len(sides) else ())
    return [_of_rounds(table, pair, next(found)) if pair.bottom else _of_sums(table, pair) for pair in pairs]


def _of_rounds(table: pd.DataFrame, pair: Pair, found: Any) -> tuple[float, float, float]:
    if found.rounds:
        value, low, high = (pair.scale * float(each) for each in (found.ratio, found.low, found.high))
        return value, low, high
    # Without common rounds the medians are all there is, and no interval.
    top, bottom = (float(table.loc[side, "latency_ms"].sum()) for side in (pair.top, pair.bottom))
    return pair.scale * top / bottom, nan, nan


def _of_sums(table: pd.DataFrame, pair: Pair) -> tuple[float, float, float]:
    """A sum, and the sums of the ends of its intervals."""
    names = ["latency_ms", "latency_ms_low", "latency_ms_high"]
    value, low, high = (pair.scale * table.loc[pair.top, names].sum(skipna=False)).astype(float)
    return value, low, high


def _by_round(table: pd.DataFrame, places: list[int]) -> dict[str, object]:
    """Samples and rounds of one row; of several, in each round that all share, the sum of their medians."""
    rows = table.loc[places, ["samples_ms", "sample_round"]]
    if len(places) == 1:
        return dict(rows.iloc[0])
    medians = [pd.Series(samples).groupby(list(rounds)).median() if _whole(samples, rounds) else pd.Series(dtype=float)
               for samples, rounds in rows.itertuples(index=False)]  # fmt: skip
    total = pd.concat(medians, axis=1).sum(axis=1, skipna=False).dropna()
    return {"samples_ms": total.to_numpy(), "sample_round": total.index.to_numpy()}


def _whole(samples: object, rounds: object) -> bool:
    return samples is not None and rounds is not None and len(samples) == len(rounds)  # type: ignore[arg-type]
