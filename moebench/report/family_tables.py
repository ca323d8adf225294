"""A table for each family (layer and traffic), scope, precision and capacity rule: token counts by arms.

Like is compared with like: what differs in precision or capacity is in another table, what differs in scope in another
table or, for the stages of one layer, in another line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moebench.analyse import paired
from moebench.analyse.names import varying
from moebench.analyse.numbers import ratio_text, significant
from moebench.analyse.ratios import ROUNDS_FOR_95, ROUNDS_FOR_RANGE
from moebench.point import SCOPES, STAGES
from moebench.report.markdown_text import escaped, short, table

OURS = ("triton",)  # our kernels, where the run has no provider of its owner's
MOST_TABLES, MOST_LINES, MOST_STAGE_LINES, MOST_ARMS = 16, 10, 24, 6
GROUP = ["family", "part", "precision", "capacity_factor", "capacity_rounding", "drop_order"]
LINE = ["tokens", "phase", "scope"]
Line = tuple[int, str, str]
# What of the fastest arm is said beside its time: title, column, factor.
SHARES = (("S-MBU %", "s_mbu", 100), ("S-MFU %", "s_mfu", 100), ("TFLOP/s", "tflops", 1))
LEAST_SAMPLES = 3  # one or two have no spread to tell of
VERSUS_SECOND = "fastest against second"
CEILING = ("of ceiling %", "limit_fraction", 100)


READ = [
    *LINE, "family", *GROUP[2:], "variant", "provider", "block", "status", "latency_ms", "latency_ms_low",
    "latency_ms_high", *(column for _, column, _ in (*SHARES, CEILING)), "flags", "samples_ms", "sample_round",
]  # fmt: skip
Row = dict[Any, Any]


@dataclass(frozen=True)
class FamilyTable:
    """One table, written.

    Attributes:
        title: what all its rows share, as plain text.
        lines: the table in Markdown, and what was left out of it.
    """

    title: str
    lines: list[str]


def family_tables(rows: pd.DataFrame, ours: Sequence[str], marks: dict[str, str]) -> tuple[list[FamilyTable], int]:
    """At most `MOST_TABLES` tables, whole layers first, and how many there are.

    Args:
        rows: of one run, from `name_rows`.
        ours: providers whose ratio to the best other arm is given.
        marks: flag -> letter.
    """
    arms = rows.loc[rows["role"] == "arm", READ].reset_index(drop=True)
    arms = arms.assign(part=arms["scope"].where(~arms["scope"].isin(STAGES), "stages"))
    codes = arms.groupby(GROUP, dropna=False, sort=False).ngroup()
    timed = codes[arms["status"] == "measured"].unique()
    first = arms[codes.isin(timed)].drop_duplicates(GROUP)
    order = first["scope"].map(_scope_rank).sort_values(kind="stable")
    said = varying(arms, ["part", "precision"])
    shown = [_Group(arms[codes == codes[place]], ours, marks) for place in order.index[:MOST_TABLES]]
    return [FamilyTable(group.title(said), group.written()) for group in shown], len(order)


class _Group:
    """The rows of one table."""

    def __init__(self, part: pd.DataFrame, ours: Sequence[str], marks: dict[str, str]) -> None:
        self.part, self.marks, self.cells = part, marks, _cells(part)
        self.timed = part[part["status"] == "measured"]
        own = self.timed["provider"].isin(ours)
        self.own = set(self.timed.loc[own, "variant"])
        self.shares = self._known(SHARES[:2]) or self._known(SHARES[2:])
        self.shares += self._known([CEILING])
        names = part.drop_duplicates("variant")
        lone = dict(zip(names["variant"], ~names["provider"].duplicated(keep=False), strict=True))
        # What its title says already, a heading need not.
        self.heads = {
            name: by if lone[name] else name for name, by in zip(names["variant"], names["provider"], strict=True)
        }
        self.arms, self.all_arms = self._ranked(set(part.loc[part["provider"].isin(ours), "variant"]))

    def title(self, said: set[str]) -> str:
        """The family, and of scope and precision what is not the same for all tables."""
        row = self.part.iloc[0]
        parts = [row["family"], *(str(row[name]).replace("_", " ") for name in ("part", "precision") if name in said)]
        if pd.notna(row["capacity_factor"]):
            parts.append(f"capacity {row['capacity_factor']:g} ({row['capacity_rounding']}, {row['drop_order']})")
        return " · ".join(map(str, parts))

    def written(self) -> list[str]:
        """The table, and a line on what is not in it."""
        keys = sorted(self.cells, key=_in_order)
        kept = self._even(keys)
        labels = ["tokens", *(name for name in LINE[1:] if self.part[name].nunique() > 1)]
        head = [*labels, *(short(self.heads[name]) for name in self.arms), *(title for title, *_ in self.shares)]
        lines = [_labelled(key, labels) + self._line(key) for key in kept]
        if self.timed["variant"].nunique() > 1:
            versus = self._versus()
            own = ", ".join(sorted(self.heads[name] for name in self.own))
            head.append(f"{short(own)} against best other" if own else VERSUS_SECOND)
            lines = [[*line, versus.get(key, "—")] for key, line in zip(kept, lines, strict=True)]
        return table(head, lines, "l" * len(labels)) + self._missing(len(keys) - len(kept))

    def _even(self, keys: list[Line]) -> list[Line]:
        """An even sample of the token counts, with all their stages."""
        counts = list(dict.fromkeys(key[:2] for key in keys))
        stages = self.part["scope"].nunique()
        most = MOST_LINES if stages == 1 else max(1, MOST_STAGE_LINES // stages)
        kept = {counts[place] for place in np.linspace(0, len(counts) - 1, most).round().astype(int)}
        return [key for key in keys if key[:2] in kept]

    def _line(self, key: Line) -> list[str]:
        here = self.cells[key]
        timed = {name: row for name in self.all_arms if (row := _middle(here.get(name, []))) is not None}
        best = min(timed, key=lambda name: timed[name]["latency_ms"], default=None)
        cells = [self._cell(here.get(name, []), name == best) for name in self.arms]
        return cells + [_share(timed[best][column] if best else None, times) for _, column, times in self.shares]

    def _cell(self, rows: list[Row], best: bool) -> str:
        """'0.612 ±0.8 % ᵃ', or why there is no number; of several replicates the middle one, with all their flags."""
        row = _middle(rows)
        statuses = [str(each["status"]).replace("_", " ") for each in rows]
        if row is None:
            return short(", ".join(dict.fromkeys(statuses))) or "—"
        few = row["samples"] < LEAST_SAMPLES
        half = np.nan if few else 50 * (row["latency_ms_high"] - row["latency_ms_low"]) / row["latency_ms"]
        number = significant(row["latency_ms"])
        text = (f"**{number}**" if best else number) + ("" if pd.isna(half) else f" ±{significant(half, 2)} %")
        lost = [status for status in statuses if status != "measured"]
        text += f" ({len(lost)} of {len(rows)} {short(lost[0])})" if lost else ""
        found = {flag.partition(":")[0] for each in rows if each["flags"] is not None for flag in each["flags"]}
        letters = "".join(letter for flag, letter in self.marks.items() if flag in found)
        return f"{text} {letters}".rstrip()

    def _versus(self) -> dict[Line, str]:
        """Line -> how much faster ours is than the best other arm of its block; of replicates the middle."""
        pairs = self._pairs()
        if pairs.empty:
            return {}
        top, bottom = (pairs[name].to_numpy(np.int64) for name in ("other", "own"))
        found = pairs.reset_index(drop=True).join(paired(self.timed, top, bottom)).dropna(subset=["ratio"])
        middles = found.sort_values("ratio").groupby(LINE, sort=False)
        chosen = pd.concat([part.iloc[[(len(part) - 1) // 2]] for _, part in middles]) if len(found) else found
        return {
            (int(row["tokens"]), str(row["phase"]), str(row["scope"])): _ratio(row) for row in chosen.to_dict("records")
        }

    def _pairs(self) -> pd.DataFrame:
        """For each block, the positions in `timed` of ours and of the best other; else of the two fastest."""
        timed = self.timed.assign(place=np.arange(len(self.timed))).sort_values("latency_ms")
        ours = timed["variant"].isin(self.own)
        keys = [*LINE, "block"]
        if self.own:
            own, other = timed[ours].drop_duplicates(keys), timed[~ours].drop_duplicates(keys)
        else:
            rank = timed.groupby(keys).cumcount()
            own, other = timed[rank == 0], timed[rank == 1]
        both = own[[*keys, "place"]].merge(other[[*keys, "place"]], on=keys, suffixes=("_own", "_other"))
        return both.rename(columns={"place_own": "own", "place_other": "other"})

    def _ranked(self, ours: set[str]) -> tuple[list[str], list[str]]:
        """The arms that are shown, in the suite's order but ours first, and then those that are not: the slowest."""
        least = self.timed.groupby([*LINE, "block"])["latency_ms"].transform("min")
        behind = (self.timed["latency_ms"] / least).groupby(self.timed["variant"]).median()
        every = sorted(dict.fromkeys(self.part["variant"]), key=lambda name: name not in ours)
        kept = set(sorted(every, key=lambda name: (name not in ours, behind.get(name, np.inf)))[:MOST_ARMS])
        shown = [name for name in every if name in kept]
        return shown, [*shown, *(name for name in every if name not in kept)]

    def _missing(self, lines: int) -> list[str]:
        said = []
        if len(self.all_arms) > len(self.arms):
            said.append(f"arms: {', '.join(short(self.heads[name]) for name in self.all_arms[MOST_ARMS:])}")
        if lines:
            said.append(f"{lines:,} lines of other token counts")
        return ["", f"Not shown here: {'; '.join(said)}."] if said else []

    def _known(self, columns: Sequence[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
        return [column for column in columns if self.timed[column[1]].notna().any()]


def _labelled(line: Line, labels: list[str]) -> list[str]:
    known = dict(zip(LINE, line, strict=True))
    return [f"{known[name]:,}" if name == "tokens" else escaped(str(known[name]).replace("_", " ")) for name in labels]


def _in_order(line: Line) -> tuple[int, str, int]:
    return line[0], line[1], _scope_rank(line[2])


def _scope_rank(scope: str) -> int:
    return SCOPES.index(scope) if scope in SCOPES else len(SCOPES)


def _middle(rows: list[Row]) -> Row | None:
    """The measured row whose latency is in the middle (the lower one of two), or None."""
    timed = sorted((row for row in rows if row["status"] == "measured"), key=lambda row: float(row["latency_ms"]))
    return timed[(len(timed) - 1) // 2] if timed else None


def _cells(part: pd.DataFrame) -> dict[Line, dict[str, list[Row]]]:
    """Line -> variant -> rows, one for each replicate."""
    found: dict[Line, dict[str, list[Row]]] = {}
    counted = part.assign(samples=part["samples_ms"].str.len())
    for row in counted.drop(columns=["samples_ms", "sample_round"]).to_dict("records"):
        line = int(row["tokens"]), str(row["phase"]), str(row["scope"])
        found.setdefault(line, {}).setdefault(str(row["variant"]), []).append(row)
    return found


def _share(value: float | None, times: int) -> str:
    return "—" if value is None or pd.isna(value) else significant(times * float(value))


def _ratio(row: dict[Any, Any]) -> str:
    rounds = row["rounds"]
    if rounds < ROUNDS_FOR_RANGE:
        return f"— (shared rounds: {rounds})"
    basis = f", range of {rounds} rounds" if rounds < ROUNDS_FOR_95 else ""
    tie = ", tie" if row["low"] <= 1 <= row["high"] else ""
    return ratio_text(row["ratio"], row["low"], row["high"]) + basis + tie
