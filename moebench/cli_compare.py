"""The `compare` command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from moebench.analyse.compare import Comparison

SHOWN = (
    "verdict", "metric", "problem", "variant", "scope", "change", "interval", "p", "old", "new", "unit", "replicates",
    "control", "note",
)  # fmt: skip
REGRESSION = 3
SCATTER = " (points scatter more than their replicates do, so every interval was widened)"


@click.command()
@click.argument("old", type=click.Path(path_type=Path), metavar="OLD")
@click.argument("new", type=click.Path(path_type=Path), metavar="NEW")
@click.option("--control", metavar="PROVIDER", help="What latencies are held against. [default: the block's yardstick]")
@click.option(
    "--min-effect", type=click.FloatRange(0.0, 10.0, min_open=True), default=0.03, show_default=True,
    help="Relative change that matters.",
)  # fmt: skip
@click.option("--only-changed", is_flag=True, help="Leave out what is SAME or UNSURE.")
@click.option("--json", "as_json", is_flag=True, help="A list of flat objects on stdout.")
def compare(
    old: Path, new: Path, control: str | None, min_effect: float, only_changed: bool, as_json: bool
) -> None:  # fmt: skip
    """Say what got slower or faster between two runs, and what cannot be said.

    OLD and NEW are run directories of one suite on one machine, with at least three replicates each (`replicates = 3`
    in the suite). Verdicts: SAME, FASTER, SLOWER, UNSURE of latency; LOWER and HIGHER of energy, memory and error;
    BROKEN where a point is not measured any more.

    Exit codes: 0 nothing got worse, 2 bad words or runs that cannot be compared, 3 something is SLOWER, HIGHER or
    BROKEN.

    \b
    Examples:
      moebench compare moebench-runs/nightly-1 moebench-runs/nightly-2
      moebench compare old new --only-changed
      moebench compare old new --control torch-grouped --min-effect 0.05
      moebench compare old new --json
    """
    from moebench.analyse.compare import UNCHANGED, flat_rows
    from moebench.analyse.compare import compare as compared
    from moebench.analyse.load import load_run

    found = compared(load_run(old), load_run(new), control, min_effect)
    for warning in found.warnings:
        click.echo(f"moebench: warning: {warning}", err=True)
    table = found.table
    rows = flat_rows(table[~table["verdict"].isin(UNCHANGED)] if only_changed else table)
    if as_json:
        click.echo(json.dumps(rows))
    elif rows:
        _print(rows)
    for line in summary(found):
        click.echo(line, err=True)
    sys.exit(REGRESSION if found.regressed else 0)


def summary(found: Comparison) -> list[str]:
    """The verdicts counted, metric by metric; what latencies were held against, and what widened their intervals."""
    lines = []
    for metric, verdicts in found.table.groupby("metric", sort=False)["verdict"]:
        counts = verdicts.value_counts()
        lines.append(f"{metric}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    names = ", ".join(found.table["control"].dropna().unique())
    if names:
        lines.append(f"control: {names}; inflation: {found.inflation:.2f}" + (SCATTER if found.inflation > 1 else ""))
    return lines


def _print(rows: list[dict[str, Any]]) -> None:
    from moebench.terminal import print_rows

    shown = [_shown(row) for row in rows]
    print_rows(shown, tuple(name for name in SHOWN if any(row[name] not in (None, "") for row in shown)))


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    ratio, low, high = row["ratio"], row["ratio_low"], row["ratio_high"]
    timed = row["metric"] == "latency"
    notes = [
        row["reason"],
        "source changed" if timed and row["source_changed"] else None,
        row["flags"] if timed else None,
    ]
    counts = (row["replicates_old"], row["replicates_new"])
    return {
        **row,
        "change": None if ratio is None else f"{ratio - 1:+.1%}",
        "interval": None if low is None else f"{low - 1:+.1%} .. {high - 1:+.1%}",
        "p": row["p_adjusted"],
        "replicates": None if None in counts else "{:.0f}/{:.0f}".format(*counts),
        "note": "; ".join(note for note in notes if note),
    }
