"""What a tuner shows: a bar on stderr, a table of what would be raced, flat rows for --json."""

from __future__ import annotations

import json
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from moebench.tune.case import Case
from moebench.tune.race import Result
from moebench.tune.run import Progress
from moebench.tune.thin import Field


class LiveTuning:
    """A bar over cases, and a line for each case that is done."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self._bar = Bar(*columns, TimeElapsedColumn(), console=self._console, transient=True)
        self._task = self._bar.add_task("starting", total=None)
        self.progress = Progress(self._started, self._racing, self._done)

    def __enter__(self) -> LiveTuning:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def _started(self, device: str, cases: int, done: int) -> None:
        again = f", {done} already there" if done else ""
        self._console.print(Text(f"tuning {cases} products on {device}{again}"))
        self._bar.update(self._task, total=cases, completed=done)

    def _racing(self, case: Case, field: Field) -> None:
        self._bar.update(self._task, description=f"{case.name}: {len(field.configs)} of {field.considered} tiles")

    def _done(self, case: Case, result: Result) -> None:
        self._bar.advance(self._task)
        self._console.print(Text(f"  {case.name}: {outcome(result)}"))


def outcome(result: Result) -> str:
    """A result in a few words."""
    wrong = sum(runner.wrong is not None for runner in result.runners)
    faults = f"; {wrong} of {len(result.runners)} failed or were wrong" if wrong else ""
    if result.config is None or result.median_ms is None:
        return f"no tile gave a right answer{faults}"
    if result.config == result.runners[0].config:
        return f"the shipped tile stays, {result.median_ms:.4g} ms{faults}"
    if result.shipped_ms is None:
        return f"{result.median_ms:.4g} ms; the shipped tile failed{faults}"
    gain = result.shipped_ms / result.median_ms
    return f"{result.median_ms:.4g} ms, {gain:.3g} times as fast as the shipped tile{faults}"


def print_fields(fields: Iterable[Field], target: str, as_json: bool) -> None:
    """What would be raced on a device of this family."""
    rows = [_row(field, target) for field in fields]
    if as_json:
        click.echo(json.dumps(rows))
        return
    table = Table("case", "tiles", "raced", "put out by the compiler")
    for row in rows:
        table.add_row(
            *(Text(str(row[name])) for name in ("case", "considered", "raced")), Text(row["faults"] or "none")
        )
    Console().print(table)


def _row(field: Field, target: str) -> dict[str, Any]:
    faults = ", ".join(f"{count} {why}" for why, count in sorted(field.faults.items()))
    return {
        "case": field.case.name,
        "target": target,
        "considered": field.considered,
        "raced": len(field.configs),
        "faults": faults,
    }


def flat_entries(content: dict[str, Any]) -> list[dict[str, Any]]:
    """A tuned file as flat rows: those with a winner, then those without."""
    found = [{**entry, **entry["config"]} for entry in content["entries"]]
    found += [{**entry, "reasons": "; ".join(entry["reasons"])} for entry in content["failed"]]
    return [{name: value for name, value in row.items() if name != "config"} for row in found]
