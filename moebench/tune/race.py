"""The race of one case: candidates checked, then sampled in shuffled rounds, the slow ones leaving early.

Only the first candidate, the shipped tile, stays to the end whatever its times: it is what the winner is compared with.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Protocol

from moebench.measure.latency import enough, median_interval
from moebench.remote import Reply, WorkerLost

CHECK_DEADLINE_S = 300.0  # compiles too
BURST_DEADLINE_S = 60.0
BURST = 5
MIN_ROUNDS, MAX_ROUNDS = 3, 40
# A candidate leaves when even the low end of its interval lies this far above the high end of the best one's.
HOPELESS = 1.02


class Asks(Protocol):
    """The worker's end, as `Remote` is."""

    def ask(self, do: str, *, deadline_s: float, **arguments: Any) -> Reply: ...


@dataclass
class Runner:
    """One tile in the race.

    Attributes:
        config: the tile.
        samples_ms: its times so far.
        wrong: why it is out: its error, its death, or a wrong answer; None while it is in.
        slow: whether it left because others were clearly faster.
    """

    config: Any
    samples_ms: list[float] = field(default_factory=list)
    wrong: str | None = None
    slow: bool = False

    @property
    def racing(self) -> bool:
        """Whether it is still sampled."""
        return self.wrong is None and not self.slow


@dataclass(frozen=True)
class Result:
    """What a race gave.

    Attributes:
        config: the winner; None when no candidate gave a right answer.
        median_ms: of the winner.
        shipped_ms: median of the shipped tile in the same rounds; None where it failed.
        settled: whether the winner's interval is as narrow as measurements here must be.
        runners: everyone.
    """

    config: Any
    median_ms: float | None
    shipped_ms: float | None
    settled: bool
    runners: list[Runner]


def race(
    start: Callable[[], Asks],
    configs: list[Any],
    *,
    device_kind: str,
    seed: int = 0,
    max_rounds: int = MAX_ROUNDS,
) -> Result:
    """Check every tile, then sample those that are right until the best is known.

    `start` gives a worker with the case open; it is called again after a tile has killed one. Samples of
    before a death are discarded: the new process may run at another pace.
    """
    if not configs:
        return Result(None, None, None, False, [])
    runners = [Runner(config) for config in configs]
    worker = _check_all(start, runners)
    order = random.Random(seed)
    for number in range(max_rounds):
        racing = [at for at, runner in enumerate(runners) if runner.racing]
        if not racing:
            break
        order.shuffle(racing)
        for at in racing:
            if not _burst(worker, runners, at, number * BURST):
                worker = _check_all(start, runners)
                for runner in runners:
                    runner.samples_ms = []
                break
        if number + 1 >= MIN_ROUNDS:
            _leave(runners)
            if _known(runners, device_kind):
                break
    return _result(runners, device_kind)


def _check_all(start: Callable[[], Asks], runners: list[Runner]) -> Asks:
    """A worker in which every runner that is in has been checked; whoever kills it is out, and a new one begins."""
    while True:
        worker = start()
        for at, runner in enumerate(runners):
            if not runner.racing:
                continue
            try:
                reply = worker.ask("candidate", deadline_s=CHECK_DEADLINE_S, index=at, config=asdict(runner.config))
            except WorkerLost as lost:
                runner.wrong = f"{lost.status}: {lost.reason}"
                break
            runner.wrong = reply.get("wrong") or reply.get("reason")
            if reply.get("fatal"):
                break
        else:
            return worker


def _burst(worker: Asks, runners: list[Runner], at: int, begin: int) -> bool:
    try:
        reply = worker.ask("burst", deadline_s=BURST_DEADLINE_S, index=at, count=BURST, start=begin)
    except WorkerLost as lost:
        runners[at].wrong = f"{lost.status}: {lost.reason}"
        return False
    if "samples_ms" in reply:
        runners[at].samples_ms += reply["samples_ms"]
        return True
    runners[at].wrong = reply["reason"]
    return not reply.get("fatal")


def _leave(runners: list[Runner]) -> None:
    """Who is clearly slower than the best goes, the shipped tile excepted."""
    racing = [runner for runner in runners if runner.racing and runner.samples_ms]
    if not racing:
        return
    best = min(racing, key=lambda runner: median(runner.samples_ms))
    limit = median_interval(best.samples_ms)[1] * HOPELESS
    for runner in racing:
        if runner is not runners[0] and median_interval(runner.samples_ms)[0] > limit:
            runner.slow = True


def _known(runners: list[Runner], device_kind: str) -> bool:
    return all(enough(runner.samples_ms, device_kind=device_kind) for runner in runners if runner.racing)


def _result(runners: list[Runner], device_kind: str) -> Result:
    racing = [runner for runner in runners if runner.racing and runner.samples_ms]
    shipped = runners[0]
    shipped_ms = median(shipped.samples_ms) if shipped.wrong is None and shipped.samples_ms else None
    if not racing:
        return Result(None, None, shipped_ms, False, runners)
    best = min(racing, key=lambda runner: median(runner.samples_ms))
    if shipped in racing and median_interval(shipped.samples_ms)[0] <= median_interval(best.samples_ms)[1]:
        best = shipped  # a tie is no reason to change
    settled = enough(best.samples_ms, device_kind=device_kind)
    return Result(best.config, median(best.samples_ms), shipped_ms, settled, runners)
