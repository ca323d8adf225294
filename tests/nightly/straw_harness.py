"""`moebench ...` with a worker of straw, whose calls take as long as the file `speed_ms` of the current commit says.

The parent, its journal and its table are the real ones; only the numbers are made up, so that a
test knows the truth and needs no clock. They scatter a little, by fixed numbers, as samples do.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

from pipeline.stand_in import Answers, StandIn

from moebench import run as product
from moebench.cli import main

SCATTER = (1.0, 1.004, 0.997, 1.002, 0.999)
YARDSTICK_MS = 0.5


class Slow(Answers):
    """Arms take `latency_ms`, yardsticks always the same."""

    def __init__(self, latency_ms: float) -> None:
        super().__init__(latency_ms)
        self.yardsticks: set[int] = set()
        self.turns = itertools.cycle(SCATTER)

    def yardstick(self, index: int, name: str, precision: str, flops: float) -> dict[str, Any]:
        self.yardsticks.add(index)
        return super().yardstick(index, name, precision, flops)

    def open(self, problem: dict[str, Any], precisions: list[str]) -> dict[str, Any]:
        self.yardsticks.clear()
        return super().open(problem, precisions)

    def burst(self, index: int, count: int, start: int) -> dict[str, Any]:
        usual = YARDSTICK_MS if index in self.yardsticks else self.latency_ms
        samples = [usual * next(self.turns) for _ in range(count)]
        return {"device_ms": samples, "wall_ms": samples}


def start(*_: object) -> StandIn:
    """A worker as slow as the commit says."""
    speed = Path(os.environ["STRAW_PROJECT"]) / "speed_ms"
    wrong = {("torch-bmm", "check"): {"wrong": "is off"}} if speed.with_name("broken").exists() else {}
    return StandIn(wrong, Slow(float(speed.read_text())))


if __name__ == "__main__":
    product.Remote = start  # type: ignore[assignment,misc]
    main()
