"""One block, measured: build, check, warm, sample in shuffled rounds; a fault costs its own point. No torch.

The worker is asked for one thing at a time, so the message in flight names the
culprit when it dies or hangs. Then the samples of the block so far are
discarded, a fresh worker rebuilds the others, and the block goes on without it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

from moebench.entry import Entry, entries_of, gemm_flops, plain
from moebench.measure.energy_summary import summarise
from moebench.measure.latency import SLOW_CALL_MS, enough, shortfall
from moebench.measure.steadiness import unsteady
from moebench.point import YARDSTICKS, Block, digest
from moebench.refusal import refusal
from moebench.remote import Reply, WorkerLost
from moebench.suite import Budget

BURST_S = 0.02  # bursts are short so that rounds are many: drift then hits every arm alike
MAX_BURST = 10
MIN_ROUNDS = 6  # ratios are taken over common rounds, and fewer give no 95 % interval
MAX_ROUNDS = 2000
# Samples that grew by less are not looked at again: that takes time, and who looks often stops on a lucky look.
LOOK_AGAIN = 1.1
FEW_SAMPLES, STALLED = 5, 3  # below 5 samples a point may take 3 times its time
NOTHING_TO_COMPARE = "no arm of this block can be timed here"
# So much of weights and oracle a slow host still makes, or a GPU: lengthens deadlines of large layers. What hangs on a
# GPU must not cost a quarter of an hour.
BYTES_PER_SECOND = {"cpu": 50e6, "cuda": 2e9}


class Asking(Protocol):
    """A worker, or a stand-in for one."""

    def ask(self, do: str, *, deadline_s: float, **arguments: Any) -> Reply: ...
    def kill(self) -> None: ...


@dataclass(frozen=True)
class Settings:
    """What does not change from block to block.

    Attributes:
        device_kind: cpu or cuda.
        unavailable: provider -> reason.
        check_only: stop after the check.
        timer, cache: what the suite asks for (`moebench.suite_file.SuiteFile`).
        energy: whether to measure energy.
    """

    device_kind: str
    budget: Budget
    unavailable: dict[str, str]
    check_only: bool = False
    timer: str = "auto"
    cache: str = "cold"
    energy: bool = False


class BlockRun:
    """One pass over one block.

    Args:
        start_worker: makes a fresh worker that has answered hello.
        worker: one to start with.
    """

    def __init__(self, block: Block, settings: Settings, worker: Asking, start_worker: Callable[[], Asking]) -> None:
        self.block, self.settings = block, settings
        self.worker, self._start_worker = worker, start_worker
        self.entries = entries_of(block, yardsticks=not settings.check_only)
        self.state_flags: list[str] = []
        self._asked: Entry | None = None
        self._random = random.Random(digest(block.problem))
        self._large_s = 4.0 * block.problem.layer.total_params() / BYTES_PER_SECOND[settings.device_kind]

    def run(self) -> list[Entry]:
        """Every entry, measured or with a status and its reason."""
        self._refuse()
        while self._live():
            try:
                self._measure()
                break
            except WorkerLost as lost:
                self._bury(lost)
        return self.entries

    def _live(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.live]

    def _refuse(self) -> None:
        for entry in self.entries:
            provider = entry.variant.provider
            reason = None if provider in YARDSTICKS else refusal(self.block.problem, entry.variant)
            if reason:
                entry.fail("not_applicable", reason)
            elif provider in self.settings.unavailable:
                entry.fail("unavailable", self.settings.unavailable[provider])
        if all(entry.variant.provider in YARDSTICKS for entry in self._live()):
            for entry in self._live():
                entry.fail("skipped", NOTHING_TO_COMPARE)

    def _bury(self, lost: WorkerLost) -> None:
        culprits = [self._asked] if self._asked else self._live()
        for entry in culprits:
            entry.fail(lost.status, lost.reason)
        for entry in self._live():
            entry.discard_samples()
        self.worker.kill()
        self.worker = self._start_worker()

    def _measure(self) -> None:
        self._open()
        for entry in self._live():
            self._prepare(entry)
        for entry in self._live():
            self._check(entry)
        if self.settings.check_only:
            return
        timed = [entry for entry in self._live() if entry.facts["timed"]]
        if all(entry.variant.provider in YARDSTICKS for entry in timed):
            for entry in timed:
                entry.fail("skipped", NOTHING_TO_COMPARE)
            return
        for entry in timed:
            self._warm(entry)
        for entry in timed:
            if entry.live and entry.role == "arm":
                entry.peak = self._ask(entry, "memory") or {}
        self._sample(timed)
        for entry in timed:
            if entry.live and entry.role == "arm":
                self._recheck(entry)
        if self.settings.energy:
            self._measure_energy(timed)

    def _open(self) -> None:
        self._asked = None
        problem = self.block.problem
        precisions = list(dict.fromkeys(entry.variant.precision for entry in self._live()))
        reply = self.worker.ask("open", deadline_s=self._deadline_s(), problem=plain(problem), precisions=precisions)
        if "status" in reply:
            for entry in self._live():
                entry.fail(reply["status"], reply["reason"])

    def _prepare(self, entry: Entry) -> None:
        variant = entry.variant
        if variant.provider in YARDSTICKS:
            flops = gemm_flops(self.block.problem, variant)
            reply = self._ask(entry, "yardstick", name=variant.provider, precision=variant.precision, flops=flops)
        else:
            reply = self._ask(entry, "arm", variant=plain(variant))
        if reply and "not_applicable" in reply:
            entry.fail("not_applicable", reply["not_applicable"])
        entry.facts = reply or {}

    def _check(self, entry: Entry) -> None:
        if entry.verdict is None:
            entry.verdict = self._ask(entry, "check")
        wrong = (entry.verdict or {}).get("wrong")
        if entry.live and wrong:
            entry.fail("inaccurate", wrong)
        if not entry.live:
            self._ask(entry, "drop")

    def _warm(self, entry: Entry) -> None:
        settings = self.settings
        wanted = {"timer": settings.timer, "cache": settings.cache}
        entry.warmth = self._ask(entry, "warm", max_seconds=settings.budget.seconds_per_point / 2, **wanted) or {}
        if entry.live and not entry.warmth["settled"]:
            entry.flag("not_settled")
        if entry.live and settings.cache == "cold" and entry.warmth["cache"] == "hot":
            entry.flag("cache_resident")

    def _sample(self, timed: list[Entry]) -> None:
        # Whoever ran last is blamed when the worker dies while its state is read: a death costs one point, not all.
        self.worker.ask("state_begin", deadline_s=self._deadline_s())
        running = timed
        for number in range(MAX_ROUNDS):
            running = [entry for entry in running if entry.live and not self._done(entry, number)]
            if not running:
                break
            self._random.shuffle(running)
            for entry in running:
                self._burst(entry, number)
        self._end_state()
        kind, minimum = self.settings.device_kind, self.settings.budget.min_samples
        for entry in timed:
            if entry.live:
                samples, rotation = entry.samples_ms, entry.warmth["rotation"]
                entry.flag(*shortfall(samples, device_kind=kind, min_samples=minimum))
                entry.flag(*unsteady(samples, entry.rounds, rotation, device_kind=kind))

    def _end_state(self) -> None:
        reply = self.worker.ask("state_end", deadline_s=self._deadline_s())
        self.state_flags = reply.get("flags", [])
        arms = {own["index"]: own for own in reply.get("arms", [])}
        for entry in self._live():
            own = arms.get(entry.index, {})
            entry.state = {**reply.get("state", {}), **own.get("state", {})}
            entry.flag(*own.get("flags", []))

    def _burst(self, entry: Entry, number: int) -> None:
        estimate_s = entry.warmth["estimate_ms"] / 1e3
        count = max(1, min(MAX_BURST, int(BURST_S / max(estimate_s, 1e-9))))
        reply = self._ask(entry, "burst", count=count, start=len(entry.samples_ms))
        if reply:
            entry.samples_ms += reply["device_ms"]
            entry.wall_ms += reply["wall_ms"]
            entry.spent_s += sum(reply["wall_ms"]) / 1e3
            entry.rounds += [number] * len(reply["device_ms"])

    def _recheck(self, entry: Entry) -> None:
        reply = self._ask(entry, "recheck", latency_ms=median(entry.samples_ms)) or {}
        entry.flag(*reply.get("flags", []))
        if entry.live and reply.get("wrong"):
            entry.fail("inaccurate", reply["wrong"])

    def _measure_energy(self, timed: list[Entry]) -> None:
        """Windows in shuffled rounds, as samples are taken; one idle window stands for the block.

        A window ends on a tick, and the rest after it is some whole ticks long: without a shift all windows of an arm
        would meet a sensor that looks part of the time in the same phase (arXiv 2312.02741).
        """
        running = [entry for entry in timed if entry.live and entry.role == "arm"]
        if not running:
            return
        idle = self._idle()
        windows: dict[int, list[Reply]] = {entry.index: [] for entry in running}
        trials = 0 if idle["source"] == "none" else self.settings.budget.energy_trials
        for trial in range(trials):
            shift_s = idle.get("period_s", 0.0) * trial / trials
            running = [entry for entry in running if entry.live]
            self._random.shuffle(running)
            for entry in running:
                reply = self._ask(entry, "energy", **self._window(shift_s))
                windows[entry.index] += [reply] if reply else []
        for entry in running:
            entry.energy = summarise(idle, windows[entry.index])

    def _idle(self) -> Reply:
        reply = self.worker.ask("idle", deadline_s=self._deadline_s(do="idle"), **self._window())
        if reply.get("fatal"):
            raise WorkerLost("crashed", f"idle: {reply['reason']}")
        return {"source": "unknown", "reason": reply["reason"]} if "status" in reply else reply

    def _window(self, shift_s: float = 0.0) -> dict[str, float]:
        budget = self.settings.budget
        return {"window_s": budget.energy_window_seconds, "cool_down_s": budget.energy_cool_down_seconds + shift_s}

    def _ask(self, entry: Entry, do: str, **arguments: Any) -> Reply | None:
        """Ask about one entry; None when that raised there, and then the entry has its status."""
        self._asked = entry
        reply = self.worker.ask(do, deadline_s=self._deadline_s(entry, do), index=entry.index, **arguments)
        if "changed_modes" in reply:
            entry.flag(*(f"changed_{name}" for name in reply["changed_modes"]))
        if "status" not in reply:
            return reply
        if reply.get("fatal"):
            raise WorkerLost("crashed", f"{do}: {reply['reason']}")
        entry.fail(reply["status"], reply["reason"] + self._beside(entry, reply["status"]))
        return None

    def _beside(self, entry: Entry, status: str) -> str:
        """Who else held memory: what did not fit beside them may fit alone."""
        others = sum(other is not entry and other.role == "arm" for other in self._live())
        if status != "out_of_memory" or not others:
            return ""
        return f" (beside {others} other arms; --provider {entry.variant.provider} tries it alone)"

    def _done(self, entry: Entry, rounds: int) -> bool:
        """Known well enough, or out of time (one stalled burst is not yet out of time)."""
        budget = self.settings.budget
        few = len(entry.samples_ms) < FEW_SAMPLES
        if entry.spent_s >= budget.seconds_per_point * (STALLED if few else 1):
            return True
        kind = self.settings.device_kind
        slow = entry.warmth["estimate_ms"] > SLOW_CALL_MS
        if not (slow or rounds >= MIN_ROUNDS) or len(entry.samples_ms) < LOOK_AGAIN * entry.looked_at:
            return False
        entry.looked_at = len(entry.samples_ms)
        return enough(entry.samples_ms, device_kind=kind, min_samples=budget.min_samples)

    def _deadline_s(self, entry: Entry | None = None, do: str = "") -> float:
        settings = self.settings
        deadline = settings.budget.deadline_seconds + self._large_s
        if do in ("idle", "energy"):
            deadline += 2 * sum(self._window().values())
        estimate_ms = entry.warmth.get("estimate_ms", 0.0) if entry else 0.0
        return deadline + MAX_BURST * 10 * float(estimate_ms) / 1e3
