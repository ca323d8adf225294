"""The one loop: thin each case's candidates, race them, keep the winner; then the next case."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moebench.failures import RunError
from moebench.remote import Remote, WorkerLost
from moebench.tune.case import Case
from moebench.tune.kept import Kept
from moebench.tune.race import MAX_ROUNDS, Asks, Result, Runner, race
from moebench.tune.thin import Field, thin

START_DEADLINE_S = 300.0
OPEN_DEADLINE_S = 600.0


@dataclass
class Progress:
    """What a tuner tells while it goes; every call may be ignored."""

    started: Callable[[str, int, int], None] = lambda device, cases, done: None
    racing: Callable[[Case, Field], None] = lambda case, field: None
    done: Callable[[Case, Result], None] = lambda case, result: None


def tune(
    cases: Sequence[Case],
    out: Path | None,
    *,
    keep: int,
    resume: bool = False,
    progress: Progress | None = None,
    interpreter: bool = False,
    max_rounds: int = MAX_ROUNDS,
    seed: int = 0,
) -> Kept:
    """Race every case on the GPU here and write the tuned file.

    Args:
        out: the file; None: the device's name in the current folder.
        keep: candidates a case races at most.
        interpreter: race on the CPU in Triton's interpreter (for tests: its times mean nothing).
        max_rounds: of a race, whatever is known by then.

    Raises:
        RunError: there is no GPU, or a worker cannot start.
        ValueError: the file exists, or was made with something else.
    """
    progress = progress or Progress()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "worker.log"
        first = Remote(log, {}, "moebench.tune.worker")
        try:
            device = _hello(first, interpreter)
        finally:
            first.kill()
        kept = Kept(out or Path(f"{_slug(device['device'])}.json"), _made_with(device), resume=resume)
        left = [case for case in cases if not kept.has(case)]
        progress.started(device["device"], len(cases), len(cases) - len(left))
        for case in left:
            field = thin([case], device["family"], keep, device["shared_limit"])[0]
            progress.racing(case, field)
            result = _race(case, field, device, log, seed, max_rounds)
            kept.add(case, result)
            progress.done(case, result)
    return kept


def _hello(worker: Remote, interpreter: bool) -> dict[str, Any]:
    try:
        reply = worker.ask("hello", deadline_s=START_DEADLINE_S)
    except WorkerLost as lost:
        raise RunError(f"the tuner's worker did not start: {lost.reason}") from None
    if "reason" in reply:
        raise RunError(f"the tuner's worker did not start: {reply['reason']}")
    if reply["device_kind"] != "cuda" and not interpreter:
        raise RunError(
            "tuning races kernels on a GPU, and there is none here; "
            "--dry-run --target sm_90 shows what would be raced on one"
        )
    return reply


def _race(case: Case, field: Field, device: dict[str, Any], log: Path, seed: int, max_rounds: int) -> Result:
    workers: list[Remote] = []

    def start() -> Asks:
        for worker in workers:
            worker.kill()
        workers.append(Remote(log, {}, "moebench.tune.worker"))
        opened = workers[-1].ask("open", deadline_s=OPEN_DEADLINE_S, case=asdict(case), seed=seed)
        if "reason" in opened:
            raise _NotOpened(opened["reason"])
        return workers[-1]

    try:
        return race(start, field.configs, device_kind=device["device_kind"], seed=seed, max_rounds=max_rounds)
    except WorkerLost as lost:  # the race sees to those that a tile has killed
        return _not_opened(f"{lost.status}: {lost.reason}")
    except _NotOpened as reason:
        return _not_opened(str(reason))
    finally:
        for worker in workers:
            worker.kill()


class _NotOpened(Exception):
    """The case's tensors could not be made, for want of memory say."""


def _not_opened(reason: str) -> Result:
    """A case that was not raced; the next ones may be smaller."""
    return Result(None, None, None, False, [Runner(None, wrong=reason)])


def _slug(device: str) -> str:
    from moebench_kernels.tuned_tiles import device_slug

    slug: str = device_slug(device)
    return slug


def _made_with(device: dict[str, Any]) -> dict[str, str]:
    from moebench import __version__

    return {
        "device": device["device"],
        "device_family": device["family"],
        "triton": device["triton"],
        "source": device["source"],
        "moebench": __version__,
    }
