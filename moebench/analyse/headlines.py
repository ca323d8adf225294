"""One sentence per problem: who wins, by how much, and what that is over a whole model.

Like is compared with like: the contest of a block is among its arms of one scope, one precision and one
capacity rule (dropless where there is one, then the rule with most arms, then the most precise). What is faster
by computing something else is named after it, with its fidelity error.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from moebench.analyse.numbers import ratio_text, significant, time_text
from moebench.analyse.ratios import ROUNDS_FOR_95, paired
from moebench.point import PRECISIONS, SCOPES, STAGES

PRICE_OF_SPARSITY = "dense-ffn"
Row = dict[Hashable, Any]
_CONTEST = ["block", "scope", "precision", "capacity_factor", "capacity_rounding", "drop_order"]


@dataclass(frozen=True)
class Headline:
    """The verdict on one block.

    Attributes:
        problem: what was computed.
        kind: "winner", "tie", "undecided" (too few shared rounds), "alone" (one arm measured) or "none".
        winners: the winner, or those that tie.
        sentence: the verdict, its ratio and interval, and the time over the model's MoE layers.
        remarks: what is faster by computing something else; the price of sparsity.
        row: index of the fastest row in the table; null when nothing was measured.
    """

    problem: str
    kind: str
    winners: tuple[str, ...]
    sentence: str
    remarks: tuple[str, ...] = ()
    row: int | None = None


def headlines(table: pd.DataFrame) -> list[Headline]:
    """One `Headline` for each block of the first replicate, in the table's order.

    Args:
        table: from `name_rows`.
    """
    first = table[table["replicate"] == table.groupby(["run_id", "block_id"])["replicate"].transform("min")]
    arms = _whole(first[first["role"] == "arm"])
    contest = _contest(arms)
    best = _ranked(contest, 0)
    verdicts = best.join(_against(table, _ranked(contest, 1), best, "second"))
    verdicts = verdicts.join(_against(table, best, _shortcuts(arms, contest, best), "other"))
    verdicts = verdicts.join(_against(table, best, _dense(first, best), "dense"))
    spoken = {block: _headline(row) for block, row in zip(verdicts.index, verdicts.to_dict("records"), strict=True)}
    parts = _parts(arms)
    return [
        _place(spoken.get(block) or _nothing(rows), parts.get(block, ""))
        for block, rows in _by_block(arms, without=set(spoken))
    ]


def _whole(arms: pd.DataFrame) -> pd.DataFrame:
    """Without stages timed alone, which are no contest of their own beside whole layers."""
    whole = arms[~arms["scope"].isin(STAGES)]
    return arms if whole.empty else whole


def _contest(arms: pd.DataFrame) -> pd.DataFrame:
    """The measured arms of each block's main scope, precision and capacity rule."""
    timed = arms[arms["status"] == "measured"]
    classes = timed.groupby(_CONTEST, dropna=False, sort=False).size().rename("arms").reset_index()
    classes["scope_rank"] = classes["scope"].map({scope: rank for rank, scope in enumerate(SCOPES)})
    classes["precision_rank"] = classes["precision"].map({name: rank for rank, name in enumerate(PRECISIONS)})
    classes["drops"] = classes["capacity_factor"].notna()
    order = ["block", "scope_rank", "drops", "arms", "precision_rank"]
    main = classes.sort_values(order, ascending=[True, True, True, False, True]).drop_duplicates("block")
    timed = timed.assign(position=timed.index)
    return timed.merge(main[_CONTEST], on=_CONTEST).sort_values(["block", "latency_ms"])


def _ranked(contest: pd.DataFrame, place: int) -> pd.DataFrame:
    """The arm at that place of each block, indexed by block."""
    return contest[contest.groupby("block").cumcount() == place].set_index("block")


def _shortcuts(arms: pd.DataFrame, contest: pd.DataFrame, best: pd.DataFrame) -> pd.DataFrame:
    """Each block's fastest arm that beats the winner at another precision or capacity rule."""
    timed = arms[(arms["status"] == "measured") & ~arms.index.isin(contest["position"])]
    bar = timed["block"].map(best["latency_ms"])
    scope = timed["block"].map(best["scope"])
    faster = timed[(timed["latency_ms"] < bar) & (timed["scope"] == scope)]
    faster = faster.assign(position=faster.index).sort_values(["block", "latency_ms"])
    return faster.drop_duplicates("block").set_index("block")


def _dense(first: pd.DataFrame, best: pd.DataFrame) -> pd.DataFrame:
    """Each block's dense FFN at the winner's precision."""
    dense = first[(first["provider"] == PRICE_OF_SPARSITY) & (first["status"] == "measured")]
    dense = dense[dense["precision"] == dense["block"].map(best["precision"])]
    return dense.assign(position=dense.index).drop_duplicates("block").set_index("block")


def _against(table: pd.DataFrame, top: pd.DataFrame, bottom: pd.DataFrame, name: str) -> pd.DataFrame:
    """Paired ratio top / bottom of latencies where a block has both, with the other row's facts; indexed by block.

    `position` of either is the row's place in `table`.
    """
    both = top.index.intersection(bottom.index)
    found = paired(
        table, top.loc[both, "position"].to_numpy(np.int64), bottom.loc[both, "position"].to_numpy(np.int64)
    ).set_axis(both)
    other = top if name == "second" else bottom
    facts = other.loc[both, ["variant", "fidelity_error", "drop_rate", "latency_ms"]]
    return found.join(facts).add_prefix(f"{name}_")


def _headline(row: Row) -> Headline:
    variant = str(row["variant"])
    kind, winners, verdict = _verdict(row, variant)
    remarks = tuple(remark for remark in (_shortcut_remark(row), _sparsity_remark(row)) if remark)
    return Headline(
        str(row["problem"]), kind, winners, f"{verdict}; {_over_the_model(row)}.", remarks, int(row["position"])
    )


def _verdict(row: Row, variant: str) -> tuple[str, tuple[str, ...], str]:
    second, ratio = row.get("second_variant"), _number(row, "second_ratio")
    if second is None or pd.isna(second):
        return "alone", (variant,), f"{variant} is the only arm measured"
    low, high, rounds = (_number(row, f"second_{name}") for name in ("low", "high", "rounds"))
    if np.isnan(low):
        gap = significant(_number(row, "second_latency_ms") / _number(row, "latency_ms"))
        shared = f"only {rounds:.0f} shared round{'s' if rounds != 1 else ''}"
        return "undecided", (), f"no verdict: {variant} leads {second} by {gap}× on {shared}"
    basis = f" (range of only {rounds:.0f} rounds)" if rounds < ROUNDS_FOR_95 else ""
    if low <= 1 <= high:
        return "tie", (variant, str(second)), f"{variant} and {second} tie, {ratio_text(ratio, low, high)}{basis}"
    if high < 1:
        # Medians over all samples and medians over shared rounds can disagree; the paired ones decide.
        variant, second, ratio, low, high = str(second), variant, 1 / ratio, 1 / high, 1 / low
    return "winner", (variant,), f"{variant} wins, {ratio_text(ratio, low, high)} faster than {second}{basis}"


def _over_the_model(row: Row) -> str:
    ms = _number(row, "latency_ms")
    layers = moe_layers(str(row["model"]))
    part = "a layer" if row["scope"] == "layer" else f"for {str(row['scope']).replace('_', ' ')} of a layer"
    if layers is None:
        return f"{time_text(ms)} {part}"
    return f"{time_text(ms)} {part}, {time_text(ms * layers)} over the model's {layers} MoE layers"


def _shortcut_remark(row: Row) -> str:
    variant = row.get("other_variant")
    if variant is None or pd.isna(variant) or np.isnan(_number(row, "other_low")):
        return ""
    ratio = ratio_text(*(_number(row, f"other_{part}") for part in ("ratio", "low", "high")))
    error, dropped = _number(row, "other_fidelity_error"), _number(row, "other_drop_rate")
    price = "an unmeasured fidelity error" if np.isnan(error) else f"a fidelity error of {significant(error)}"
    drops = f", {significant(100 * dropped)} % of assignments dropped" if dropped > 0 else ""
    return f"{variant} is {ratio} faster at the price of {price}{drops}."


def _sparsity_remark(row: Row) -> str:
    if np.isnan(_number(row, "dense_low")):
        return ""
    text = ratio_text(*(_number(row, f"dense_{part}") for part in ("ratio", "low", "high")))
    return f"Price of sparsity: {text} the time of one dense FFN of the same active FLOPs."


def _number(row: Row, name: str) -> float:
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _by_block(arms: pd.DataFrame, without: set[int]) -> list[tuple[int, pd.DataFrame]]:
    """Blocks in the table's order; the rows only of those that still need them."""
    needed = arms[~arms["block"].isin(without)]
    rows = dict(iter(needed.groupby("block", sort=False)))
    empty = arms.iloc[:0]
    return [(int(block), rows.get(block, empty)) for block in arms["block"].unique()]


def _nothing(rows: pd.DataFrame) -> Headline:
    counts = rows["status"].value_counts()
    said = ", ".join(f"{count} {str(status).replace('_', ' ')}" for status, count in counts.items())
    reasons = rows["reason"].dropna()
    why = f" First reason: {str(reasons.iloc[0]).rstrip('.')}." if len(reasons) else ""
    return Headline(str(rows["problem"].iloc[0]), "none", (), f"Nothing was timed: {said}.{why}")


def _parts(arms: pd.DataFrame) -> dict[int, str]:
    """'block 2 of 3' for problems that memory split over several blocks."""
    blocks = arms[["problem", "block"]].drop_duplicates()
    count = blocks.groupby("problem")["block"].transform("size")
    number = blocks.groupby("problem").cumcount() + 1
    split = blocks[count > 1]
    return {
        int(block): f"block {which} of {total}"
        for block, which, total in zip(split["block"], number[split.index], count[split.index], strict=True)
    }


def _place(headline: Headline, part: str) -> Headline:
    if not part:
        return headline
    return replace(headline, problem=f"{headline.problem} · {part}")


@functools.lru_cache(maxsize=1024)
def moe_layers(model_id: str) -> int | None:
    """MoE layers of a preset (of the one kind, for ids like `swin-moe-s-64:stage3`); null for other shapes."""
    from moebench.catalogue.models import models

    name, _, kind = model_id.partition(":")
    spec = models().get(name)
    counts = [layers.count for layers in spec.layers if not kind or layers.name == kind] if spec else []
    return sum(counts) or None
