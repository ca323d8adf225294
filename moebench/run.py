"""Run: a suite becomes a run directory. The one place where providers meet meters. No torch in this process."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from moebench.agenda import Agenda
from moebench.analyse.load import write_results
from moebench.block_run import Asking, BlockRun, Settings
from moebench.catalogue.hardware import Hardware, hardware_table
from moebench.expand import VARIANT_DEFAULTS
from moebench.failures import RunError
from moebench.journal import Keys
from moebench.manifest import new_manifest, now, require_same, stated_commit, yardstick_facts
from moebench.options import Options
from moebench.point import Block
from moebench.providers import is_file, is_yardstick
from moebench.record import FAULTS, GOOD, Manifest, Record
from moebench.recording import Context, reached, record_of, skipped
from moebench.remote import Remote, Reply, WorkerLost
from moebench.run_directory import RunDirectory
from moebench.signals import stops_on_sigterm
from moebench.stopwatch import Stopwatch, TimedWorker, added
from moebench.suite import Suite

START_DEADLINE_S = 300.0
StartWorker = Callable[[Path, Mapping[str, str]], Asking]


@dataclass
class Progress:
    """What a run tells while it goes; every call may be ignored."""

    started: Callable[[Manifest, int], None] = lambda manifest, done: None
    block: Callable[[Block], None] = lambda block: None
    block_done: Callable[[Block, list[Record]], None] = lambda block, records: None


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        path: the run directory.
        counts: status -> number of arms (yardsticks not counted).
        interrupted: whether points are left to measure.
        reasons: reason -> number of points, of those that are not good.
        seconds: wall time of this session by phase (`moebench.stopwatch`).
    """

    path: Path
    counts: Counter[str] = field(default_factory=Counter)
    interrupted: bool = False
    reasons: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 all good, 1 some point failed or none could be run, 130 interrupted."""
        if self.interrupted:
            return 130
        failed = any(self.counts[status] for status in FAULTS)
        return 1 if failed or not any(self.counts[status] for status in GOOD) else 0


def run_suite(
    suite: Suite, options: Options, progress: Progress | None = None, start: StartWorker | None = None
) -> Outcome:
    """Measure every point of a suite that is not measured yet.

    Args:
        start: makes a worker, from its log and what to add to its environment; a `Remote` by default.

    Raises:
        ValueError: the folder, the hardware file, MOEBENCH_COMMIT, a provider file or a resume that does not fit.
        RunError: the worker does not start, or the folder cannot be written any more.
    """
    table = hardware_table(options.hardware)
    stated_commit()  # a bad one is said now
    directory = RunDirectory(options.out)
    with directory.opened(resume=options.resume) as before, stops_on_sigterm():
        try:
            return _Run(suite, options, directory, table, progress or Progress(), start or Remote).go(before)
        except OSError as error:
            what = os.strerror(error.errno) if error.errno else str(error)  # pyarrow puts a sentence around it
            raise RunError(f"{options.out} cannot be written any more: {what}; what was measured is kept") from error


class _Run:
    """One session of one run."""

    def __init__(
        self,
        suite: Suite,
        options: Options,
        directory: RunDirectory,
        table: dict[str, Hardware],
        progress: Progress,
        start: StartWorker,
    ) -> None:
        self.suite, self.options, self.directory, self.progress = suite, options, directory, progress
        self.table, self.start = table, start
        self.hello: Reply = {}
        self.worker: TimedWorker | None = None
        self.watch = Stopwatch()

    def go(self, before: Manifest | None) -> Outcome:
        """All sessions' records become results.parquet, whatever happens on the way."""
        finished: Literal["complete", "interrupted"] = "interrupted"
        manifest: Manifest | None = None
        try:
            try:
                self._start_worker()
                manifest = self._manifest(before)
                agenda = self._agenda(manifest)
                done = agenda.done(self.directory.journal, manifest.run_id)  # refused: the folder stays as it is
                self.directory.write_manifest(manifest)
                self.directory.results.unlink(missing_ok=True)  # a stale table would outlive the journal
                left_out = self._measure_all(manifest, agenda, done)
                finished = "interrupted" if left_out else "complete"
            except KeyboardInterrupt:
                left_out = True
            finally:
                if self.worker is not None:
                    self.worker.kill()
            if manifest is None:
                return Outcome(self.options.out, interrupted=True)
            return self._finish(manifest, finished, left_out)
        except KeyboardInterrupt:  # a second one, while the table was being written: the journal has everything
            return Outcome(self.options.out, interrupted=True)

    def _measure_all(self, manifest: Manifest, agenda: Agenda, done: Keys) -> bool:
        """Measure what is not done; True when the budget left something out."""
        self.progress.started(manifest, len(done))
        deadline = self._deadline()
        unavailable = {
            name: facts["unavailable"] for name, facts in manifest.providers.items() if "unavailable" in facts
        }
        settings = Settings(
            self.hello["device_kind"],
            self.suite.budget,
            unavailable,
            self.options.check_only,
            timer=self.suite.timer,
            cache=self.suite.cache,
            energy=self.suite.energy,
        )
        for replicate in range(self.suite.replicates):
            if replicate and self.worker is not None:
                self.worker.kill()
                self._start_worker()
            context = replace(self._context(manifest), replicate=replicate)
            for block in agenda.blocks():
                if agenda.holds(done, block, replicate):
                    continue
                if time.monotonic() > deadline:
                    return True
                self._measure(block, settings, context)
        return False

    def _measure(self, block: Block, settings: Settings, context: Context) -> None:
        assert self.worker is not None
        self.progress.block(block)
        running = BlockRun(block, settings, self.worker, self._start_worker)
        entries = running.run()
        context = replace(context, reached=reached(context.ceilings, entries))
        records = [record_of(entry, block, context, running.state_flags) for entry in entries]
        with self.watch.phase("journal"):
            self.directory.journal.append(records)
        self.progress.block_done(block, records)

    def _finish(self, manifest: Manifest, finished: Literal["complete", "interrupted"], left_out: bool) -> Outcome:
        outcome = Outcome(self.options.out, interrupted=finished == "interrupted")
        with self.watch.phase("table"):
            records = _counted(self.directory.journal.stream(), outcome)
            rest = self._rest(manifest) if left_out else iter(())
            write_results(chain(records, rest), self.directory.results)
        outcome.seconds = self.watch.seconds()
        spent = added(manifest.seconds, outcome.seconds)
        ended = manifest.model_copy(update={"finished": finished, "finished_at": now(), "seconds": spent})
        self.directory.write_manifest(ended)
        return outcome

    def _rest(self, manifest: Manifest) -> Iterator[Record]:
        """A `skipped` row for every point that was not reached; `--resume` measures them."""
        agenda, context = self._agenda(manifest), self._context(manifest)
        done = self.directory.journal.keys()
        reason = "not reached before the run was interrupted or its budget of seconds_total was used up"
        for replicate, block, entry in agenda.entries():
            if (entry.point_id, replicate) not in done:
                yield skipped(entry, block, replace(context, replicate=replicate), reason)

    def _agenda(self, manifest: Manifest) -> Agenda:
        return Agenda(
            self.suite,
            self.hello["device_kind"],
            self.options.shard,
            manifest.machine["available_bytes"],
            yardsticks=not self.options.check_only,
        )

    def _start_worker(self) -> TimedWorker:
        with self.watch.phase("starting"):
            self.worker = TimedWorker(self.start(self.directory.log, {"PYTHONUNBUFFERED": "1"}), self.watch)
            import scipy.stats  # noqa: F401 - needed later: half a second or more, while the worker has its own to do
        try:
            hello = self.worker.ask("hello", deadline_s=START_DEADLINE_S, device_kind=self.options.device)
        except WorkerLost as lost:
            raise RunError(f"the worker does not start: {lost.reason}; {self.directory.log} may say why") from None
        if "status" in hello:
            raise ValueError(f"--device {self.options.device}: {hello['reason'].partition(': ')[2]}")
        self.hello = self._held(self.worker, hello)
        return self.worker

    def _held(self, worker: TimedWorker, hello: Reply) -> Reply:
        """What the worker said of itself, and of the modes that it holds from now on."""
        try:
            held = worker.ask("hold", deadline_s=START_DEADLINE_S, **self.suite.modes.model_dump())
        except WorkerLost as lost:
            raise RunError(f"the worker does not start: {lost.reason}; {self.directory.log} may say why") from None
        if "status" in held:
            raise ValueError(f"{self.suite.name}: {held['reason'].partition(': ')[2]}")
        machine = {**hello["machine"], "torch_threads": held["threads"], "held_cores": held["cores"]}
        return {**hello, "machine": machine, "threads": held["threads"], "modes": held["modes"]}

    def _manifest(self, before: Manifest | None) -> Manifest:
        device_kind = self.hello["device_kind"]
        points = self.suite.count(device_kind).points
        if not points:
            raise ValueError(f"{self.suite.name} has no point on {device_kind}: its sweeps are for another device")
        providers = {name: self._provider(name) for name in _named(self.suite, "provider", device_kind)}
        providers |= yardstick_facts(self.hello)
        if before is not None:
            require_same(before, self.suite, self.options, self.hello, providers)
            return before.model_copy(update={"sessions": before.sessions + 1, "finished": None, "finished_at": None})
        ceilings = None if self.options.check_only else self._ceilings()
        return new_manifest(self.suite, self.options, self.hello, self.table, providers, ceilings)

    def _ceilings(self) -> Reply | None:
        assert self.worker is not None
        precisions = _named(self.suite, "precision", self.hello["device_kind"])
        seconds = min(2.0, self.suite.budget.seconds_per_point)
        try:
            found = self.worker.ask("ceilings", deadline_s=START_DEADLINE_S, precisions=precisions, seconds=seconds)
        except WorkerLost:
            self._start_worker()
            return None
        return None if "status" in found else found

    def _provider(self, name: str) -> dict[str, Any]:
        assert self.worker is not None
        try:
            # Loading runs the provider's code, which may end or hang the worker.
            found = self.worker.ask("provider", deadline_s=self.suite.budget.deadline_seconds, name=name)
        except WorkerLost as lost:
            self._start_worker()
            return {"unavailable": f"loading it: {lost.reason}"}
        if is_file(name) and "unavailable" in found:
            raise ValueError(f"provider {found['unavailable']}")
        return found

    def _context(self, manifest: Manifest) -> Context:
        return Context(
            run_id=manifest.run_id,
            suite=manifest.suite,
            device=manifest.device,
            hardware=Hardware(**manifest.hardware) if manifest.hardware else None,
            ceilings=manifest.ceilings,
            providers=manifest.providers,
            threads=self.hello["threads"],
            modes=self.hello["modes"],
        )

    def _deadline(self) -> float:
        total = self.suite.budget.seconds_total
        return float("inf") if total is None else time.monotonic() + total


def _counted(records: Iterable[Record], outcome: Outcome) -> Iterator[Record]:
    """The records as they pass, their statuses counted."""
    for record in records:
        if record.role == "arm" or is_yardstick(record.provider):
            outcome.counts[record.status] += 1
            if record.status not in GOOD:
                outcome.reasons[record.provider, record.status, record.reason or ""] += 1
        yield record


def _named(suite: Suite, axis: str, device_kind: str) -> list[str]:
    """The values of a variant axis that a suite has on a device, in order; where a sweep names none, its default."""
    default = VARIANT_DEFAULTS.get(axis, "")
    sweeps = [sweep for sweep in suite.sweeps if sweep.device in (None, device_kind)]
    return list(dict.fromkeys(value for sweep in sweeps for value in sorted(map(str, sweep.values(axis) or [default]))))
