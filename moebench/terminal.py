"""What a run and a table look like in a terminal. Progress goes to stderr, tables to stdout."""

from __future__ import annotations

from collections import Counter
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from moebench.point import Block, problem_name
from moebench.providers import is_yardstick
from moebench.record import Manifest, Record
from moebench.run import Outcome, Progress
from moebench.suite import Suite

MOST_REASONS = 20
STYLES = {"measured": "green", "verified": "cyan", "not_applicable": "dim", "unavailable": "dim", "skipped": "dim"}


class LiveProgress(Progress):
    """A bar over blocks, and a line for each block that is done."""

    def __init__(self, suite: Suite) -> None:
        super().__init__(self._started, self._block, self._block_done)
        self._suite = suite
        self._console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("starting: worker, ceilings", total=None)

    def __enter__(self) -> LiveProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def _started(self, manifest: Manifest, done: int) -> None:
        size = self._suite.count(manifest.device_kind)
        again = f", {done} records already there" if done else ""
        self._console.print(
            Text(f"{manifest.suite}: {size.points} points in {size.blocks} blocks on {manifest.device}{again}")
        )
        self._bar.update(self._task, total=size.blocks)

    def _block(self, block: Block) -> None:
        self._bar.update(self._task, description=block_name(block))

    def _block_done(self, block: Block, records: list[Record]) -> None:
        self._bar.advance(self._task)
        line = Text(f"  {block_name(block)}: ")
        counts = Counter(record.status for record in records if record.role == "arm" or is_yardstick(record.provider))
        for number, (status, count) in enumerate(counts.items()):
            line.append(", " if number else "").append(f"{count} {status}", STYLES.get(status, "bold red"))
        self._console.print(line)


def block_name(block: Block) -> str:
    """A block in a few words."""
    return problem_name(block.problem)


def outcome_lines(outcome: Outcome) -> list[str]:
    """How a run ended: the counts, then each reason for what is not good, once, with those it concerns."""
    counts = ", ".join(f"{count} {status}" for status, count in outcome.counts.most_common()) or "nothing measured"
    concerned: dict[tuple[str, str], list[str]] = {}
    points: Counter[tuple[str, str]] = Counter()
    for (provider, status, reason), count in outcome.reasons.items():
        concerned.setdefault((status, reason), []).append(provider)
        points[status, reason] += count
    listed = [
        f"  {status}: {', '.join(concerned[status, reason])}{_times(count)}: {reason}"
        for (status, reason), count in points.most_common(MOST_REASONS)
    ]
    rest = len(points) - len(listed)
    return [counts, *listed] + ([f"  ... and {rest} more reasons, in the report"] if rest else [])


def _times(count: int) -> str:
    return f" ({count} points)" if count > 1 else ""


def print_rows(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """A table of flat rows; text is printed as it is, never as markup."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        numbers = any(isinstance(row.get(name), int | float) and not isinstance(row.get(name), bool) for row in rows)
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_shown(row.get(name))) for name in columns))
    print_renderable(table)


def print_renderable(renderable: RenderableType) -> None:
    """On stdout, at the terminal's width; wide when it is a pipe, so that nothing is cut for a grep."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    console.print(renderable)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
