"""The regressions that asv found, and those among them that no earlier night told. No torch, no asv.

asv has no command that lists them; `asv publish` writes `regressions.json`. Its step detection sees a
step as soon as two commits are stored; in a long and noisy history a step may need one night more to
stand out, and is then dated back to where it began. So "is there one at this commit" would miss it,
and "is there one at all" would fail every night until somebody mends it. What was told is therefore
kept in a file beside the results: a regression is news when it began after the last commit at which
one of the same case was told.
"""

from __future__ import annotations

import json
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
    """

    graph: str
    entry: str
    before: float
    after: float
    unit: str
    last_good: str | None
    commit: str
    revision: int


def regressions(site: Path) -> list[Regression]:
    """All that asv published."""
    index = _read(site / "index.json")
    hashes = {int(revision): commit for revision, commit in index["revision_to_hash"].items()}
    found = []
    for entry, graph, _, _, _, _, steps in _read(site / "regressions.json")["regressions"]:
        unit = index["benchmarks"][entry.partition("(")[0]].get("unit", "")
        for last_good, revision, before, after in steps:
            earlier = None if last_good is None else hashes[last_good]
            found.append(Regression(graph, entry, before, after, unit, earlier, hashes[revision], revision))
    return found


def news(site: Path, told: Path, head: str) -> list[Regression]:
    """Those that began after the last commit at which one of the same case was told.

    What was told at `head` itself is told again, so that a night that is repeated ends as it did.
    """
    order = {commit: int(revision) for revision, commit in _read(site / "index.json")["revision_to_hash"].items()}
    known: dict[tuple[str, str], int] = {}
    for line in _lines(told):
        if line["told_at"] != head:
            key = line["graph"], line["entry"]
            # A commit whose results are gone is older than all that are left.
            known[key] = max(known.get(key, -1), order.get(line["told_at"], -1))
    return [found for found in regressions(site) if found.revision > known.get((found.graph, found.entry), -1)]


def remember(told: Path, found: Iterable[Regression], head: str) -> None:
    """Add what is told now."""
    before = _lines(told)
    lines = [
        {"graph": each.graph, "entry": each.entry, "since": each.commit, "told_at": head}
        for each in found
    ]  # fmt: skip
    fresh = [line for line in lines if line not in before]
    if fresh:
        told.parent.mkdir(parents=True, exist_ok=True)
        with told.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in fresh)


def _lines(told: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []


def _read(path: Path) -> Any:
    return json.loads(path.read_text())
