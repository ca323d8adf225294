"""The page's section on an audit that lies beside a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moebench.audit.rows import COLUMNS, shown, summary
from moebench.audit.saved import read_audit

MOST_ROWS = 1000
NUMBERS = ("registers", "spills B", "shared KiB", "CTAs", "warps", "compile")


def audit_sections(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """One for each run directory that holds an audit; a file that cannot be read is a section that says so."""
    sections = []
    for folder in runs:
        try:
            found = read_audit(folder)
        except ValueError as error:
            sections.append(_section(folder, broken=str(error)))
            continue
        if found is not None:
            sections.append(_section(folder, **_facts(found)))
    return sections


def _section(folder: Path, **more: Any) -> dict[str, Any]:
    empty = {"broken": "", "summary": "", "versions": "", "made_at": "", "lines": [], "more": 0}
    return {**empty, "run": folder.name, "columns": COLUMNS, "numbers": NUMBERS, **more}


def _facts(found: dict[str, Any]) -> dict[str, Any]:
    # What is wrong is read first; the rest keeps the order of the files.
    rows = sorted(found["rows"], key=lambda row: row["verdict"] == "ok")
    tools = {name: version for name, version in found["versions"].items() if name in ("triton", "ptxas")}
    return {
        "summary": summary(found["rows"]),
        "versions": ", ".join(f"{name} {version}" for name, version in tools.items()),
        "made_at": found["made_at"][:16].replace("T", " "),
        "lines": [{"cells": shown(row), "faults": row["faults"]} for row in rows[:MOST_ROWS]],
        "more": max(0, len(rows) - MOST_ROWS),
    }
