"""The whole layer, forward: a few rows for README.md, every row for reports/README.md.

On a GPU our kernels stand against the fastest other arm of their block and against torch-grouped. On a CPU they are
verified and not timed, so the two fastest arms stand there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from moebench_suites.published.pages import MARK, NOTHING, table, words
from moebench_suites.published.ratios import OURS
from moebench_suites.published.runs import Published, commands, counting, gpus, made_with, rows_of

from moebench.analyse import numbers, paired
from moebench.analyse.ratios import ROUNDS_FOR_95
from moebench.point import base_precision

GPU_SUITES, CPU_SUITES = ("h200-decode", "h200-prefill"), ("quick",)
GROUPED = "torch-grouped"
DECODE_TOKENS = 128  # up to here the bytes of the weights bound a layer, beyond it the products do
MOST_LINES = 12  # of README.md, which is one screen to the first result
# The token counts that README.md shows, from the last to be left out to the first.
TOKENS = (16, 4096, 1, 32768, 128, 1024)
LAYER = ["model", "hidden_size", "expert_ffn_size", "routed_experts", "top_k", "shared_experts", "router", "traffic"]


@dataclass(frozen=True)
class Standing:
    """One layer at one number of tokens.

    Attributes:
        layer: the model, or the shape of a layer without one; with its traffic where there are several.
        first: on a GPU our row, whatever became of it; on a CPU the fastest.
        other: the fastest other arm of the same block, or None.
        grouped: torch-grouped's row in the same block, or None.
        over_other, over_grouped: their latency over that of first, with its interval; or why there is none.
    """

    layer: str
    tokens: int
    first: pd.Series
    other: pd.Series | None
    grouped: pd.Series | None
    over_other: str
    over_grouped: str


def headline_block(published: Sequence[Published], beside: Path) -> str:
    """At most a dozen rows, and under them what made them. Links lead from the folder `beside`."""
    device, runs = _chosen(published)
    if not runs:
        return NOTHING
    on_gpu = runs[0].manifest.device_kind == "cuda"
    found = standings(rows_of(runs), ours_first=on_gpu)
    if not found:
        return f"{_made(device, runs)} No whole layer was timed there."
    link = os.path.relpath(Path("reports"), beside)
    others = [words(name) for name in gpus(published) if on_gpu and name != device]
    more = f" More rows: [{link}/]({link}/README.md)" + (f", also of {' and '.join(others)}." if others else ".")
    return f"{_table(few(found), on_gpu)}\n\n{_note(device, runs, on_gpu, found)}{more}"


def layer_block(published: Sequence[Published]) -> str:
    """Every row, for each GPU a table of its own."""
    parts = []
    for device in gpus(published):
        runs = counting(published, device, GPU_SUITES)
        found = standings(rows_of(runs), ours_first=True) if runs else []
        if found:
            parts.append(f"### {words(device)}\n\n{_table(found, True)}\n\n{_note(device, runs, True, found)}")
    return "\n\n".join(parts) or "No whole layer on a GPU is published yet."


def _chosen(published: Sequence[Published]) -> tuple[str, list[Published]]:
    """The GPU with most of the suites, of equals the newest; else the newest CPU."""
    on_gpu = [counting(published, device, GPU_SUITES) for device in gpus(published)]
    for runs in sorted(filter(None, on_gpu), key=lambda runs: (len(_suites(runs)), runs[0].when), reverse=True):
        return runs[0].manifest.device, runs
    for each in published:
        if each.counts and each.manifest.suite in CPU_SUITES and each.manifest.device_kind == "cpu":
            return each.manifest.device, counting(published, each.manifest.device, CPU_SUITES)
    return "", []


def _suites(runs: Sequence[Published]) -> set[str]:
    return {each.manifest.suite for each in runs}


def standings(rows: pd.DataFrame, *, ours_first: bool) -> list[Standing]:
    """Whole layers, forward and dropless, unquantised; by layer as the suites name them, then by tokens.

    Args:
        rows: from `rows_of`, of one device.
        ours_first: whether our kernels are timed there.
    """
    plain = rows["precision"].map(base_precision) == rows["precision"]
    arms = rows[plain & (rows["role"] == "arm") & (rows["scope"] == "layer") & (rows["direction"] == "forward")
                & rows["capacity_factor"].isna() & (rows["replicate"] == 0)]  # fmt: skip
    several = arms.groupby("model")["traffic"].nunique() > 1
    problems = arms.groupby([*LAYER, "precision", "seed", "phase", "tokens"], sort=False)
    held = [each for each in (_held(problem, ours_first) for _, problem in problems) if each]
    texts = iter(overs(rows, [(top, first) for first, *others in held for top in others]))
    found = [
        Standing(_layer_text(first, bool(several[first["model"]])), int(first["tokens"]), first, other, grouped,
                 next(texts), next(texts))
        for first, other, grouped in held
    ]  # fmt: skip
    order = {layer: place for place, layer in enumerate(dict.fromkeys(each.layer for each in found))}
    return sorted(found, key=lambda each: (order[each.layer], each.tokens))


def _held(arms: pd.DataFrame, ours_first: bool) -> tuple[pd.Series, pd.Series | None, pd.Series | None] | None:
    """(first, fastest other, torch-grouped) of the arms of one problem; of the others those in the first's block."""
    timed = arms[arms["status"] == "measured"]
    ours = arms[arms["provider"] == OURS]
    if timed.empty or (ours_first and ours.empty):
        return None
    first = ours.iloc[0] if ours_first else timed.loc[timed["latency_ms"].idxmin()]
    others = timed[(timed["block"] == first["block"]) & (timed.index != first.name)]
    grouped = others[others["provider"] == GROUPED]
    other = others.loc[others["latency_ms"].idxmin()] if len(others) else None
    return first, other, grouped.iloc[0] if len(grouped) else None


def _layer_text(row: pd.Series, several: bool) -> str:
    shape = f"E {row['routed_experts']} K {row['top_k']} D {row['hidden_size']} F {row['expert_ffn_size']}"
    name = shape if row["model"] == "custom" else row["model"]
    return words(f"{name} {row['traffic']}" if several else name)


def overs(rows: pd.DataFrame, pairs: Sequence[tuple[pd.Series | None, pd.Series]]) -> list[str]:
    """Latency of top over that of bottom, from the rounds they share; "tie" where its interval includes 1."""
    known = [top is not None and bottom["status"] == "measured" for top, bottom in pairs]
    timed = [pair for pair, there in zip(pairs, known, strict=True) if there]
    tops, bottoms = (np.array([rows.index.get_loc(pair[side].name) for pair in timed], dtype=np.int64)
                     for side in (0, 1))  # fmt: skip
    found = iter(paired(rows, tops, bottoms).itertuples())
    return [_over_text(top, bottom, next(found)) if there else "—"
            for (top, bottom), there in zip(pairs, known, strict=True)]  # fmt: skip


def _over_text(top: pd.Series, bottom: pd.Series, found: Any) -> str:
    if np.isnan(found.low):
        return f"{numbers.significant(top['latency_ms'] / bottom['latency_ms'])}× (too few rounds)"
    few_rounds = f" of {found.rounds} rounds" if found.rounds < ROUNDS_FOR_95 else ""
    text = numbers.ratio_text(found.ratio, found.low, found.high) + few_rounds
    return f"tie, {text}" if found.low <= 1 <= found.high else text


def few(found: Sequence[Standing]) -> list[Standing]:
    """At most `MOST_LINES`: of each layer as many token counts as there is room for."""
    layers = list(dict.fromkeys(each.layer for each in found))
    room = max(1, MOST_LINES // len(layers))
    kept = []
    for layer in layers[:MOST_LINES]:
        of_layer = [each for each in found if each.layer == layer]
        ranked = sorted(of_layer, key=lambda each: (_rank(each.tokens), each.tokens))
        kept += sorted(ranked[:room], key=lambda each: each.tokens)
    return kept[:MOST_LINES]


def _rank(tokens: int) -> int:
    return TOKENS.index(tokens) if tokens in TOKENS else len(TOKENS)


# Text


def _table(found: Sequence[Standing], on_gpu: bool) -> str:
    if on_gpu:
        heads = (
            "layer",
            "tokens",
            "ours",
            "best other arm",
            "its time over ours",
            f"`{GROUPED}` over ours",
            "of the peak",
        )
        return table(heads, ([each.layer, f"{each.tokens:,}", _ours(each), _arm(each.other), each.over_other,
                              each.over_grouped, _peak(each.first)] for each in found))  # fmt: skip
    heads = ("layer", "tokens", "fastest arm", "second", "its time over the fastest")
    return table(heads, ([each.layer, f"{each.tokens:,}", _arm(each.first), _arm(each.other), each.over_other]
                         for each in found))  # fmt: skip


def _ours(each: Standing) -> str:
    if each.first["status"] != "measured":
        return words(each.first["status"].replace("_", " "))
    return f"{numbers.time_text(each.first['latency_ms'])}{_mark(each.first)}"


def _arm(row: pd.Series | None) -> str:
    return "—" if row is None else f"{words(row['provider'])} {numbers.time_text(row['latency_ms'])}{_mark(row)}"


def _mark(row: pd.Series) -> str:
    return f" {MARK}" if len(row["flags"]) else ""


def _peak(row: pd.Series) -> str:
    """S-MBU where bytes bound, S-MFU where products do."""
    name = "s_mbu" if row["tokens"] <= DECODE_TOKENS else "s_mfu"
    share = row[name]
    return "—" if pd.isna(share) else f"{name.upper().replace('_', '-')} {100 * share:.1f} %"


def _note(device: str, runs: Sequence[Published], on_gpu: bool, found: Sequence[Standing]) -> str:
    precision = " and ".join(sorted({each.first["precision"] for each in found}))
    said = [_made(device, runs, precision)]
    if on_gpu:
        said.append("Over 1: ours is faster; in brackets the 95 % interval, a tie where it includes 1.")
    else:
        said.append("On a CPU our Triton kernels are verified and not timed, so the two fastest arms stand here.")
    flags = sorted({flag for each in found for row in (each.first, each.other) if row is not None
                    for flag in row["flags"]})  # fmt: skip
    said += [f"{MARK} flagged: {', '.join(map(words, flags))}."] if flags else []
    return " ".join(said)


def _made(device: str, runs: Sequence[Published], precision: str = "") -> str:
    parts = [words(device), *([precision] if precision else []), words(made_with(runs), 300)]
    return f"{', '.join(parts)}: {', '.join(commands(runs))}."
