"""What has to hold of a run after whatever happened to it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
from pipeline.stand_in import Crew
from pipeline.tiny import records

from moebench.record import Record

PER_BLOCK = 5  # two arms and three yardsticks


def complete(run: Path, blocks: int, kept: list[Record] | None = None, *, per_block: int = PER_BLOCK) -> list[Record]:
    """The records of a run that is finished: each point once, the table as the journal, what was kept unchanged."""
    rows = records(run)
    keys = [(row.point_id, row.replicate) for row in rows]
    assert len(keys) == len(set(keys)) == blocks * per_block
    assert pq.read_table(run / "results.parquet").to_pylist() == [row.model_dump() for row in rows]
    assert json.loads((run / "manifest.json").read_text())["finished"] == "complete"
    assert len({row.run_id for row in rows}) == 1
    assert all(row in rows for row in kept or [])
    return rows


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run, but the lock and what workers said."""
    return {path.name: path.read_bytes() for path in run.iterdir() if path.name not in ("lock", "worker.log")}


def second_block(crew: Crew) -> bool:
    """Whether the block that is being measured is the second of three."""
    opened = crew.asked("open")
    return bool(opened) and opened[-1].arguments["problem"]["tokens"] == 8
