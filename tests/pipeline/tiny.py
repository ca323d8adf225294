"""Suites small enough for tests, and how to run them as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from moebench.journal import Journal
from moebench.record import Record

CHECKOUT = Path(__file__).parents[2]

HEAD = 'name = "tiny"\nquestion = "Does it run?"\n[budget]\nseconds_per_point = 0.05\ndeadline_seconds = {deadline}\n'
SWEEP = (
    "[[sweep]]\n[sweep.grid]\nhidden_size = 16\nexpert_ffn_size = 8\nexperts = 4\ntop_k = 2\n"
    'tokens = {tokens}\ntraffic = "uniform"\nprovider = {providers}\n'
)


def write_suite(
    folder: Path, providers: list[str] | None = None, *, tokens: list[int] | None = None, deadline: float = 60.0
) -> Path:
    """A suite of tiny layers: one block for each number of tokens."""
    path = folder / "tiny.toml"
    names = json.dumps(providers or ["torch-loop", "torch-bmm"])
    path.write_text(HEAD.format(deadline=deadline) + SWEEP.format(tokens=tokens or [4], providers=names))
    return path


def environment(**more: str) -> dict[str, str]:
    """This checkout first, whatever is installed."""
    return {**os.environ, "PYTHONPATH": f"{CHECKOUT}{os.pathsep}{CHECKOUT / 'kernels'}", "COLUMNS": "200", **more}


def moebench(*words: object, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """`moebench ...` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "moebench", *map(str, words)],
        cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300, check=False, **options,
    )  # fmt: skip


def records(run: Path) -> list[Record]:
    """What the journal holds, each record once."""
    return Journal(run / "journal.jsonl").read()


def written_points(run: Path) -> list[tuple[str, int]]:
    """(point_id, replicate) of every line of the journal, repeats included."""
    lines = (run / "journal.jsonl").read_bytes().splitlines()
    return [(row["point_id"], row["replicate"]) for row in map(json.loads, lines)]
