"""Where the wall time of a run went, by phase. No torch.

Phases lie inside each other and each second counts once, for the innermost; what
is in no phase is the harness's own. The seconds of all phases are the wall time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from moebench.block_run import Asking
from moebench.remote import Reply

OWN = "harness"
# Message to the worker -> the phase its answer belongs to.
PHASE_OF = {
    "hello": "starting", "hold": "starting", "ceilings": "ceilings", "provider": "providers",
    "open": "building", "arm": "building", "yardstick": "building", "drop": "building",
    "check": "checking", "recheck": "checking", "warm": "warming", "memory": "memory",
    "state_begin": "sampling", "burst": "sampling", "state_end": "sampling", "idle": "energy",
    "energy": "energy",
}  # fmt: skip
# Windows in which what was asked for is looked at; all else is what the harness costs. Making weights, inputs and
# the providers' state (`building`) is named apart, since any benchmark would have to.
WINDOWS = ("ceilings", "checking", "warming", "memory", "sampling", "energy")


class Stopwatch:
    """Counts the seconds of one session."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._since = clock, clock()
        self._open = [OWN]
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside counts for this phase, but for phases inside it."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def seconds(self) -> dict[str, float]:
        """Phase -> seconds until now."""
        self._charge()
        return dict(self._seconds)

    def _charge(self) -> None:
        now = self._clock()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now


class TimedWorker:
    """A worker whose answers' time is counted by the kind of message."""

    def __init__(self, worker: Asking, watch: Stopwatch) -> None:
        self._worker, self._watch = worker, watch

    def ask(self, do: str, *, deadline_s: float, **arguments: Any) -> Reply:
        """As the worker's own."""
        with self._watch.phase(PHASE_OF.get(do, OWN)):
            return self._worker.ask(do, deadline_s=deadline_s, **arguments)

    def kill(self) -> None:
        """As the worker's own."""
        self._worker.kill()


def added(before: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    """Seconds by phase of all sessions so far, to the millisecond."""
    return {name: round(before.get(name, 0.0) + more.get(name, 0.0), 3) for name in {**before, **more}}


def spent(seconds: Mapping[str, float]) -> dict[str, float]:
    """Wall seconds, how many of them lie outside the windows (building among them), and those of building."""
    return {
        "seconds": round(sum(seconds.values()), 3),
        "overhead_seconds": round(sum(value for phase, value in seconds.items() if phase not in WINDOWS), 3),
        "building_seconds": round(seconds.get("building", 0.0), 3),
    }
