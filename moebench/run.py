"""Run: a suite becomes a run directory. The one place where providers meet meters. No torch in this process."""

from __future__ import annotations

import hashlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from moebench import __version__
from moebench.analyse.load import write_results
from moebench.block_run import BlockRun, Settings, entries_of
from moebench.catalogue.cost import cost_inputs
from moebench.catalogue.hardware import Hardware, hardware_table, match
from moebench.expand import VARIANT_DEFAULTS
from moebench.failures import RunError
from moebench.point import Block, digest
from moebench.providers import is_file
from moebench.record import FAULTS, GOOD, Manifest, Record
from moebench.recording import Context, record_of, skipped
from moebench.remote import Remote, Reply, WorkerLost
from moebench.run_directory import RunDirectory
from moebench.suite import Suite, shard
from moebench.work import BYTES_PER_WEIGHT

START_DEADLINE_S = 300.0
WEIGHTS_SHARE = 0.6  # of what is available; a block whose precisions need more together is split by precision


@dataclass(frozen=True)
class Options:
    """How to run a suite.

    Attributes:
        out: the run directory.
        resume: go on with it.
        device: auto, cpu or cuda.
        check_only: check every point, time none.
        shard: (i, n), this run's share of the blocks.
        hardware: a file of the user's hardware rows.
        command: what to write into the manifest and to repeat for resuming.
    """

    out: Path
    resume: bool = False
    device: str = "auto"
    check_only: bool = False
    shard: tuple[int, int] = (1, 1)
    hardware: Path | None = None
    command: str = ""


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
    """

    path: Path
    counts: Counter[str] = field(default_factory=Counter)
    interrupted: bool = False
    reasons: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    @property
    def exit_code(self) -> int:
        """0 all good, 1 some point failed or none could be run, 130 interrupted."""
        if self.interrupted:
            return 130
        failed = any(self.counts[status] for status in FAULTS)
        return 1 if failed or not any(self.counts[status] for status in GOOD) else 0


def run_suite(suite: Suite, options: Options, progress: Progress | None = None) -> Outcome:
    """Measure every point of a suite that is not measured yet.

    Raises:
        ValueError: the folder, the hardware file, a provider file or a resume that does not fit.
        RunError: the worker does not start, or the folder cannot be written any more.
    """
    table = hardware_table(options.hardware)
    directory = RunDirectory(options.out)
    with directory.opened(resume=options.resume) as before, _stops_on_sigterm():
        try:
            return _Run(suite, options, directory, table, progress or Progress()).go(before)
        except OSError as error:
            what = error.strerror or str(error)
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
    ) -> None:
        self.suite, self.options, self.directory, self.progress = suite, options, directory, progress
        self.table = table
        self.hello: Reply = {}
        self.worker: Remote | None = None

    def go(self, before: Manifest | None) -> Outcome:
        """All sessions' records become results.parquet, whatever happens on the way."""
        finished: Literal["complete", "interrupted"] = "interrupted"
        manifest: Manifest | None = None
        try:
            try:
                self._start_worker()
                manifest = self._manifest(before)
                self.directory.write_manifest(manifest)
                self.directory.results.unlink(missing_ok=True)  # a stale table would outlive the journal
                left_out = self._measure_all(manifest)
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

    def _measure_all(self, manifest: Manifest) -> bool:
        """Measure what is not in the journal; True when the budget left something out."""
        done = {(record.point_id, record.replicate) for record in self.directory.records()}
        self.progress.started(manifest, len(done))
        deadline = self._deadline()
        unavailable = {
            name: facts["unavailable"] for name, facts in manifest.providers.items() if "unavailable" in facts
        }
        settings = Settings(
            self.hello["device_kind"], self.suite.budget, unavailable, self.options.check_only, self.suite.energy
        )
        for replicate in range(self.suite.replicates):
            if replicate and self.worker is not None:
                self.worker.kill()
                self._start_worker()
            context = replace(self._context(manifest), replicate=replicate)
            for block in self._blocks():
                if all((entry.point_id, replicate) in done for entry in self._entries(block)):
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
        records = [record_of(entry, block, context, running.state_flags) for entry in entries]
        self.directory.journal.append(records)
        self.progress.block_done(block, records)

    def _finish(self, manifest: Manifest, finished: Literal["complete", "interrupted"], left_out: bool) -> Outcome:
        records = self.directory.records()
        rest = self._rest(manifest, records) if left_out else iter(())
        write_results(chain(records, rest), self.directory.results)
        ended = manifest.model_copy(update={"finished": finished, "finished_at": _now()})
        self.directory.write_manifest(ended)
        outcome = Outcome(self.options.out, interrupted=finished == "interrupted")
        for record in records:
            if record.role == "arm" or record.provider == "dense-ffn":
                outcome.counts[record.status] += 1
                if record.status not in GOOD:
                    outcome.reasons[record.provider, record.status, record.reason or ""] += 1
        return outcome

    def _rest(self, manifest: Manifest, records: Iterable[Record]) -> Iterator[Record]:
        """A `skipped` row for every point that was not reached; `--resume` measures them."""
        done = {(record.point_id, record.replicate) for record in records}
        reason = "not reached before the run was interrupted or its budget of seconds_total was used up"
        for replicate in range(self.suite.replicates):
            context = replace(self._context(manifest), replicate=replicate)
            for block in self._blocks():
                for entry in self._entries(block):
                    if (entry.point_id, replicate) not in done:
                        yield skipped(entry, block, context, reason)

    def _blocks(self) -> Iterator[Block]:
        blocks = shard(self.suite.blocks(self.hello["device_kind"]), *self.options.shard)
        return chain.from_iterable(_split_for_memory(block, self.hello["available_bytes"]) for block in blocks)

    def _entries(self, block: Block) -> list[Any]:
        return list(entries_of(block, yardsticks=not self.options.check_only))

    def _start_worker(self) -> Remote:
        self.worker = Remote(self.directory.log, {"PYTHONUNBUFFERED": "1"})
        try:
            hello = self.worker.ask("hello", deadline_s=START_DEADLINE_S, device_kind=self.options.device)
        except WorkerLost as lost:
            raise RunError(f"the worker does not start: {lost.reason}; {self.directory.log} may say why") from None
        if "status" in hello:
            raise ValueError(f"--device {self.options.device}: {hello['reason'].partition(': ')[2]}")
        self.hello = hello
        return self.worker

    def _manifest(self, before: Manifest | None) -> Manifest:
        device_kind = self.hello["device_kind"]
        points = self.suite.count(device_kind).points
        if not points:
            raise ValueError(f"{self.suite.name} has no point on {device_kind}: its sweeps are for another device")
        providers = {name: self._provider(name) for name in _named(self.suite, "provider", device_kind)}
        if before is not None:
            self._require_same(before, providers)
            return before.model_copy(update={"sessions": before.sessions + 1, "finished": None, "finished_at": None})
        hardware = match(self.hello["device"], self.table)
        started = _now()
        return Manifest(
            run_id=hashlib.sha256(f"{started}{os.getpid()}{self.options.out}".encode()).hexdigest()[:12],
            suite=self.suite.name,
            question=self.suite.question,
            suite_hash=self._suite_hash(),
            suite_text=self.suite.text,
            overrides={axis: list(values) for axis, values in self.suite.overrides.items()},
            command=self.options.command,
            **_git(),
            device=self.hello["device"],
            device_kind=device_kind,
            versions={"moebench": __version__, **self.hello["versions"]},
            machine={**self.hello["machine"], "cache_bytes": self.hello["cache_bytes"]},
            ceilings=None if self.options.check_only else self._ceilings(),
            hardware=None if hardware is None else dict(vars(hardware)),
            cost=cost_inputs(hardware),
            providers=providers,
            points=points,
            started_at=started,
        )

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

    def _require_same(self, before: Manifest, providers: dict[str, dict[str, Any]]) -> None:
        """Resuming may only go on with what was begun."""
        changed = []
        if before.suite_hash != self._suite_hash():
            changed.append("the suite file, its overrides, --shard or --check-only")
        if before.device != self.hello["device"]:
            changed.append(f"the device ({before.device} then, {self.hello['device']} now)")
        for name, facts in providers.items():
            then = before.providers.get(name, {})
            if then.get("hash") != facts.get("hash"):
                changed.append(f"provider {name} ({_state(then)} then, {_state(facts)} now)")
        if changed:
            raise ValueError(f"{self.options.out} cannot be resumed, since this changed: {'; '.join(changed)}")

    def _suite_hash(self) -> str:
        return digest([self.suite.digest, list(self.options.shard), self.options.check_only])

    def _context(self, manifest: Manifest) -> Context:
        return Context(
            run_id=manifest.run_id,
            suite=manifest.suite,
            device=manifest.device,
            hardware=Hardware(**manifest.hardware) if manifest.hardware else None,
            ceilings=manifest.ceilings,
            providers=manifest.providers,
            cache_bytes=manifest.machine.get("cache_bytes"),
        )

    def _deadline(self) -> float:
        total = self.suite.budget.seconds_total
        return float("inf") if total is None else time.monotonic() + total


def resume_command(options: Options) -> str:
    """What to type to go on."""
    words = options.command.split(" ") if options.command else ["moebench", "run", "suite"]
    if "--out" not in options.command:
        words += ["--out", shlex.quote(str(options.out))]
    return " ".join(words if "--resume" in words else [*words, "--resume"])


def _split_for_memory(block: Block, available_bytes: int) -> list[Block]:
    """The block, or one for each of its precisions where all their weights at once would not fit."""
    precisions = list(dict.fromkeys(variant.precision for variant in block.variants))
    needed = sum(block.problem.layer.total_params() * BYTES_PER_WEIGHT[precision] for precision in precisions)
    if len(precisions) == 1 or needed <= WEIGHTS_SHARE * available_bytes:
        return [block]
    return [
        Block(block.problem, tuple(variant for variant in block.variants if variant.precision == precision))
        for precision in precisions
    ]


def _named(suite: Suite, axis: str, device_kind: str) -> list[str]:
    """The values of a variant axis that a suite has on a device, in order; where a sweep names none, its default."""
    default = VARIANT_DEFAULTS.get(axis, "")
    sweeps = [sweep for sweep in suite.sweeps if sweep.device in (None, device_kind)]
    return list(dict.fromkeys(value for sweep in sweeps for value in sorted(map(str, sweep.values(axis) or [default]))))


def _state(facts: dict[str, Any]) -> str:
    if "unavailable" in facts:
        return "unavailable"
    return f"{facts.get('version')} with source {facts.get('hash')}" if facts else "not part of it"


def _git() -> dict[str, Any]:
    """Commit and dirtiness of the checkout that moebench runs from; nulls outside one."""
    here = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "moebench/run.py") is None:
        return {"git_commit": None, "git_dirty": None}
    return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain"))}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def _stops_on_sigterm() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does; the handler is put back."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread: then the caller owns the signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def default_command(argv: Sequence[str] | None = None) -> str:
    """The command line, as one would type it again."""
    return "moebench " + shlex.join(sys.argv[1:] if argv is None else argv)
