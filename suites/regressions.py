"""The regressions that asv found, and those among them that are clear and news. No torch, no asv.

asv has no command that lists them; `asv publish` writes `regressions.json`. Its step detection sees a
step as soon as two commits are stored, and compares their medians with a threshold: in a short
history that is all it does, so on a noisy machine every other night would be a regression. A step is
*clear* when the newest night's lower quartile lies above the upper quartile of the last night before
the step; asv stores both. What is not clear is said, and stays open: more nights may show it.

In a long history a step may need one night more to stand out, and is then dated back to where it
began. So "is there one at this commit" would miss it, and "is there one at all" would fail every night
until somebody mends it. What was told is therefore kept in a file beside the results: a regression
is *news* when it began after the last commit at which one of the same case was told.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


class Regression(NamedTuple):
    """A step up in the history of one case, which is there still.

    Attributes:
        graph: which history: machine and whatever else sets it apart.
        entry: benchmark(case).
        before, after: levels around the step, in `unit`.
        last_good: the commit before the step; null where that is the parent of `commit`.
        commit: the first one after the step.
        revision: its place in the order of commits.
        clear: whether the quartiles of the newest night and of the last before the step do not meet.
    """

    graph: str
    entry: str
    before: float
    after: float
    unit: str
    last_good: str | None
    commit: str
    revision: int
    clear: bool


class Night(NamedTuple):
    """What one commit's results say of one case."""

    revision: int
    low: float | None
    high: float | None


def news(site: Path, results: Path, told: Path, head: str) -> list[Regression]:
    """Those that began after the last commit at which one of the same case was told, in order.

    What was told at `head` itself is told again, so that a night that is repeated ends as it did.
    """
    order = {commit: int(revision) for revision, commit in _read(site / "index.json")["revision_to_hash"].items()}
    known: dict[tuple[str, str], int] = {}
    for line in _lines(told):
        if line["told_at"] != head:
            key = line["graph"], line["entry"]
            # A commit whose results are gone is older than all that are left.
            known[key] = max(known.get(key, -1), order.get(line["told_at"], -1))
    found = regressions(site, results)
    fresh = [each for each in found if each.revision > known.get((each.graph, each.entry), -1)]
    return sorted(fresh, key=lambda each: (each.graph, each.entry, each.revision))


def remember(told: Path, found: Iterable[Regression], head: str) -> None:
    """Add what is told now."""
    before = _lines(told)
    lines = [{"graph": each.graph, "entry": each.entry, "since": each.commit, "told_at": head} for each in found]
    fresh = [line for line in lines if line not in before]
    if fresh:
        told.parent.mkdir(parents=True, exist_ok=True)
        with told.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in fresh)


def regressions(site: Path, results: Path) -> list[Regression]:
    """All that asv published."""
    index = _read(site / "index.json")
    hashes = {int(revision): commit for revision, commit in index["revision_to_hash"].items()}
    stored = _stored(results, {commit: revision for revision, commit in hashes.items()})
    found = []
    for entry, graph, _, _, _, _, steps in _read(site / "regressions.json")["regressions"]:
        unit = index["benchmarks"][entry.partition("(")[0]].get("unit", "")
        nights = [night for machine, night in stored.get(entry, []) if f"machine-{machine}/" in graph]
        for last_good, revision, before, after in steps:
            earlier = None if last_good is None else hashes[last_good]
            apart = _apart(nights, revision)
            found.append(Regression(graph, entry, before, after, unit, earlier, hashes[revision], revision, apart))
    return found


def _apart(nights: list[Night], revision: int) -> bool:
    """Whether the newest night is clear of the last one before the revision; so it is where nothing else is known."""
    before = [night for night in nights if night.revision < revision]
    if not before:
        return True
    good, newest = (max(some, key=lambda night: night.revision) for some in (before, nights))
    return good.high is None or newest.low is None or newest.low > good.high


def _stored(results: Path, order: dict[str, int]) -> dict[str, list[tuple[str, Night]]]:
    """benchmark(case) -> (machine, night) of every commit that has a number of it."""
    found: dict[str, list[tuple[str, Night]]] = {}
    for path in results.glob("*/*.json"):
        stored = _read(path) if path.name != "machine.json" else {}
        if stored.get("commit_hash") in order:
            for benchmark, values in stored["results"].items():
                columns = dict(zip(stored["result_columns"], values, strict=False))  # asv leaves empty ones out
                for entry, low, high in _quartiles(benchmark, columns):
                    night = Night(order[stored["commit_hash"]], low, high)
                    found.setdefault(entry, []).append((stored["params"]["machine"], night))
    return found


def _quartiles(benchmark: str, columns: dict[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """(benchmark(case), lower quartile, upper quartile) of every case with a number."""
    values = columns.get("result") or []
    cases = (columns.get("params") or [[]])[0]
    low, high = (columns.get(name) or [None] * len(values) for name in ("stats_q_25", "stats_q_75"))
    rows = zip(cases, values, low, high, strict=False)
    # Null is a failure and NaN a gap: neither is a night of this case.
    known = [row for row in rows if row[1] is not None and not math.isnan(row[1])]
    return [(f"{benchmark}({case})", q25, q75) for case, _, q25, q75 in known]


def _lines(told: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []


def _read(path: Path) -> Any:
    return json.loads(path.read_text())
