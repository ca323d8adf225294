"""Recorded energy counters: write what a real one showed, and show it again without the device.

A log is CSV with the columns time_s (from the start) and joules, one line a reading. It has
in it whatever the sensor does: its ticks, its lag, the part of the time it looks. So the
windows of `moebench.measure.energy` can be tried on a counter of a GPU that is elsewhere:

    python -m moebench.measure.energy_replay cuda log.csv 60

records a minute, while something else keeps the GPU busy.
"""

from __future__ import annotations

import csv
import math
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moebench.measure.energy import Clock, EnergyMeter, MeterError

HEADER = ("time_s", "joules")
Row = tuple[float, float]


def record_log(
    meter: EnergyMeter,
    path: Path,
    seconds: float,
    *,
    every_s: float = 0.002,
    sleep: Callable[[float], object] = time.sleep,
    clock: Clock = time.monotonic,
) -> int:
    """Write what a counter shows, read every `every_s` for so many seconds; returns the number of readings.

    Raises:
        MeterError: the counter is gone; what was read before stands in the file.
        OSError: the file cannot be written.
    """
    began, count = clock(), 0
    with path.open("w", newline="") as file:
        log = csv.writer(file)
        log.writerow(HEADER)
        while (now := clock() - began) <= seconds:
            log.writerow([f"{now:.6f}", repr(meter.read_j())])
            count += 1
            sleep(every_s)
    return count


def read_log(path: Path) -> list[Row]:
    """The rows of a log.

    Raises:
        ValueError: it is no such log: file, line, what was found.
    """
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    if not lines or tuple(lines[0]) != HEADER:
        raise ValueError(f"{path}: line 1: is not {','.join(HEADER)}")
    rows: list[Row] = []
    for number, line in enumerate(lines[1:], 2):
        try:
            at, joules = map(float, line)
        except ValueError:
            raise ValueError(f"{path}: line {number}: found {','.join(line)!r}, not two numbers") from None
        if not (math.isfinite(at) and math.isfinite(joules)) or (rows and at < rows[-1][0]):
            raise ValueError(f"{path}: line {number}: found {','.join(line)!r}, not finite numbers at a later time")
        rows.append((at, joules))
    if not rows:
        raise ValueError(f"{path}: has no readings")
    return rows


@dataclass(frozen=True)
class ReplayMeter:
    """A counter that shows what a log says of the moment.

    Attributes:
        rows: (time_s, joules), in order.
        clock: seconds on the log's own time; after its end the last reading stays.
    """

    rows: Sequence[Row]
    clock: Clock
    name: str = "replay"
    update_period_s: float = 0.1
    wrap_s: float = math.inf
    max_watts: float = 5000.0

    def read_j(self) -> float:
        place = bisect_right(self.rows, (self.clock(), math.inf))
        return self.rows[max(place - 1, 0)][1]


def main() -> None:
    """KIND FILE SECONDS on the command line."""
    from moebench.measure.energy_meters import find_meter

    if len(sys.argv) != 4 or sys.argv[1] not in ("cpu", "cuda"):
        raise SystemExit("usage: python -m moebench.measure.energy_replay cpu|cuda FILE SECONDS")
    meter, reason = find_meter(sys.argv[1])
    if meter is None:
        raise SystemExit(f"moebench: no energy counter: {reason}")
    try:
        count = record_log(meter, Path(sys.argv[2]), float(sys.argv[3]))
    except (OSError, ValueError, MeterError) as error:
        raise SystemExit(f"moebench: {error}") from None
    print(f"{count} readings of {meter.name} in {sys.argv[2]}")


if __name__ == "__main__":
    main()
