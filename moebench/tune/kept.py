"""The tuned file as it grows: rewritten whole after each case, so that whatever stops the tuner leaves a good file.

The format is moebench_kernels.tuned_tiles'; beside it stand what it was made with, and for each entry the
shipped tile's time in the same race. A case without a right answer has no entry, and stands under "failed".
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moebench.tune.case import Case
from moebench.tune.race import Result

SCHEMA = 1
KEY = ("kind", "dtype", "block_m", "n", "k")
SAME = ("device", "device_family", "triton", "source")


def _has_key(row: Any) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(name), str | int) for name in KEY)


class Kept:
    """A tuned file under construction."""

    def __init__(self, path: Path, made_with: Mapping[str, str], *, resume: bool) -> None:
        """Open a fresh file, or go on with one.

        Raises:
            ValueError: it exists and `resume` is not set, or it cannot be read, or was made with something else.
            OSError: it cannot be written.
        """
        self.path = path
        self._content: dict[str, Any] = {"schema": SCHEMA, **made_with, "entries": [], "failed": []}
        if path.exists() and not resume:
            raise ValueError(f"{path} exists; --resume goes on with it, or choose another --out")
        if path.exists():
            self._content = self._read(made_with)
        self._write()  # now, so that a place that cannot be written is known before hours are spent

    def has(self, case: Case) -> bool:
        """Whether the case was raced already."""
        return case.key in self._raced()

    def add(self, case: Case, result: Result) -> None:
        """Keep a result, durably."""
        row: dict[str, Any] = {**dict(zip(KEY, case.key, strict=True)), "raced_on": case.name}
        if result.config is None:
            reasons = sorted({runner.wrong for runner in result.runners if runner.wrong})
            self._content["failed"].append({**row, "reasons": reasons[:5]})
        else:
            self._content["entries"].append(
                {
                    **row,
                    "config": asdict(result.config),
                    "median_ms": result.median_ms,
                    "shipped_ms": result.shipped_ms,
                    "settled": result.settled,
                }
            )
        self._write()

    @property
    def failed(self) -> int:
        """Cases without a right answer."""
        return len(self._content["failed"])

    def _raced(self) -> set[tuple[Any, ...]]:
        rows = [*self._content["entries"], *self._content["failed"]]
        return {tuple(row[name] for name in KEY) for row in rows}

    def _read(self, made_with: Mapping[str, str]) -> dict[str, Any]:
        from moebench_kernels.tuned_tiles import load_tuned

        load_tuned(self.path)  # refuses what the library would refuse
        content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        for name in SAME:
            if content.get(name) != made_with[name]:
                raise ValueError(
                    f"{self.path} was made with {name} {content.get(name)!r}, this is {made_with[name]!r}; "
                    "choose another --out"
                )
        failed = content.setdefault("failed", [])
        if not isinstance(failed, list) or not all(map(_has_key, failed)):
            raise ValueError(f"{self.path}: failed is no list of objects with {', '.join(KEY)}")
        return content

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(self._content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)
