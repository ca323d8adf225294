"""The index of published runs, newest first."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from moebench_suites.published.pages import NOTHING, table, words
from moebench_suites.published.runs import Published, commit

from moebench.record import FAULTS

HEADS = ("date", "device", "suite", "measured", "verified", "at fault", "other", "flagged", "commit", "torch", "triton")
NOTE = (
    "Rows of arms and yardsticks. *At fault*: inaccurate, failed, out of memory, timeout, crashed. *Other*: "
    "unavailable, not applicable, skipped. *Flagged*: measured rows with a remark about the number, such as throttled, "
    "contended or not settled; they stay in every table. Of two runs of a suite on a device the newer one counts."
)


def index_block(published: Sequence[Published], beside: Path) -> str:
    """A row for each run; links lead from the folder `beside`."""
    if not published:
        return NOTHING
    return f"{table(HEADS, (_line(each, beside) for each in published))}\n\n{NOTE}"


def _line(each: Published, beside: Path) -> list[str]:
    manifest, rows = each.manifest, each.run.table
    counts = rows["status"].value_counts()
    measured, verified = (int(counts.get(status, 0)) for status in ("measured", "verified"))
    at_fault = int(sum(counts.get(status, 0) for status in FAULTS))
    flagged = int(rows.loc[rows["status"] == "measured", "flags"].map(len).gt(0).sum())
    share = f"{flagged} ({100 * flagged / measured:.1f} %)" if measured else "—"
    link = quote(os.path.relpath(each.run.path, beside), safe="/")
    remarks = [] if each.counts else ["older"]
    remarks += [] if manifest.finished == "complete" else [manifest.finished or "unfinished"]
    suite = f"[{words(manifest.suite)}]({link}/)" + (f" ({', '.join(remarks)})" if remarks else "")
    versions = [words(manifest.versions.get(name) or "—") for name in ("torch", "triton")]
    numbers = [measured, verified, at_fault, len(rows) - measured - verified - at_fault]
    return [f"{each.when:%Y-%m-%d}", words(manifest.device), suite, *map(str, numbers), share,
            words(commit(manifest)), *versions]  # fmt: skip
