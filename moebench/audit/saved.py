"""An audit beside a run: audit.json in the run directory, for the report. No torch, no triton."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moebench.audit.rows import FACTS, LIMITED
from moebench.audit.run import Audit

NAME = "audit.json"
SCHEMA = 1


def require_run(folder: Path) -> None:
    """Raises ValueError unless the folder holds a run."""
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder}: not a run directory (it has no manifest.json)")


def write_audit(folder: Path, audit: Audit) -> Path:
    """Write audit.json into a run directory, whole or not at all; an earlier one is replaced."""
    require_run(folder)
    path = folder / NAME
    partial = folder / f"{NAME}.{os.getpid()}.partial"
    made = {"schema": SCHEMA, "made_at": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        partial.write_text(json.dumps({**made, "versions": audit.versions, "rows": audit.rows}) + "\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_audit(folder: Path) -> dict[str, Any] | None:
    """What `write_audit` wrote: made_at, versions, rows; None where there is none.

    Raises:
        ValueError: the file is damaged or of another version, in one line.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())[:200]}); audit again") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or not _are_rows(found.get("rows")):
        raise ValueError(f"{path} is not an audit of this version; audit again")
    return found


def _are_rows(rows: Any) -> bool:
    needed = {"build", "target", "verdict", "faults", "cached", "compile_ms", *FACTS, *LIMITED}
    return isinstance(rows, list) and all(isinstance(row, dict) and needed <= row.keys() for row in rows)
