"""An audit in a terminal: a bar on stderr, the table on stdout, one line a fault."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from moebench.audit.rows import COLUMNS, Row, fault_lines, shown, summary
from moebench.audit.run import Audit, Watcher

NUMBERS = {"registers", "spills B", "shared KiB", "CTAs", "warps", "compile"}
STYLES = {"ok": "green", "fault": "bold red"}
PIPE_WIDTH = 240


class Bar(Watcher):
    """A bar over the builds; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._faults = 0
        self._task = self._bar.add_task("reading the kernels", total=None)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def listed(self, count: int) -> None:
        """So many builds will be looked at."""
        self._bar.update(self._task, total=count, description="compiling")

    def row(self, row: Row) -> None:
        """One is done."""
        self._faults += row["verdict"] != "ok"
        many = f", {self._faults} with a fault" if self._faults else ""
        self._bar.update(self._task, advance=1, description=f"compiling{many}")


def print_audit(audit: Audit) -> None:
    """The table and what it comes to on stdout, the faults on stderr; text is printed as it is, never as markup."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in NUMBERS else "left", overflow="fold")
    for row in audit.rows:
        cells = shown(row)
        table.add_row(*(Text(cells[name], STYLES.get(cells[name], "")) for name in COLUMNS))
    console.print(table)
    console.print(Text(summary(audit.rows)))
    for line in fault_lines(audit.rows):
        print(line, file=sys.stderr)
