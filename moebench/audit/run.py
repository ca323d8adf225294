"""An audit from the parent's side: starts the worker, follows it, judges what comes back. No torch, no triton."""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from moebench.audit.limits import LIMITS
from moebench.audit.process import Worker
from moebench.audit.rows import Row, make_row
from moebench.failures import RunError

TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Request:
    """What to audit.

    Attributes:
        files: kernel files; none means those of moebench_kernels that declare builds.
        targets: only these; none means all.
        kernels: only builds or kernels whose name holds one of these (or matches, with * ? [).
        all: every build; else one of each kernel and target: the first of those that expect most.
        jobs: compiles at a time; 0 is one a CPU.
        timeout_s: of one compile.
        load_timeout_s: of running one file.
    """

    files: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    all: bool = False
    jobs: int = 0
    timeout_s: float = TIMEOUT_S
    load_timeout_s: float = TIMEOUT_S


@dataclass
class Audit:
    """The rows, in the order of the files, and the versions that compiled them."""

    rows: list[Row]
    versions: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether no row has a fault."""
        return all(row["verdict"] == "ok" for row in self.rows)


class Watcher:
    """What a caller may want to know meanwhile."""

    def listed(self, count: int) -> None:
        """So many builds will be looked at."""

    def row(self, row: Row) -> None:
        """One is done."""


def audit(request: Request, watcher: Watcher | None = None) -> Audit:
    """Compile and judge.

    Raises:
        ValueError: bad words or a bad file, one line a fault.
        RunError: triton is missing, or the worker died.
    """
    watcher = watcher or Watcher()
    for target in request.targets:
        if target not in LIMITS:
            raise ValueError(f"unknown target {target!r} (allowed: {', '.join(LIMITS)})")
    files = [os.path.expanduser(name) for name in request.files]
    if faults := [fault for name in files if (fault := _fault_of(name))]:
        raise ValueError("\n".join(faults))
    asked = asdict(request) | {"files": files, "jobs": request.jobs or _cpus()}
    # The kernels that ship are no file of the user's: a short limit for compiles must not end their import.
    worker = Worker(asked, request.load_timeout_s if files else TIMEOUT_S)
    found = Audit([], {})
    rows: dict[int, Row] = {}
    listed: list[Row] = []
    with contextlib.closing(worker):
        for message in worker.messages():
            if "listed" in message:
                listed, found.versions = message["listed"], message["versions"]
                watcher.listed(len(listed))
            elif "number" in message:
                row = rows[message["number"]] = make_row(listed[message["number"]], message)
                watcher.row(row)
    found.rows = [rows[number] for number in sorted(rows)]
    if not listed or len(rows) < len(listed):
        raise RunError("the audit's worker ended before its work did")
    return found


def _fault_of(name: str) -> str | None:
    """Why a name is no file to audit."""
    path = Path(name)
    try:
        if not path.exists():
            return f"{name}: no such file"
        if not path.is_file():
            return f"{name}: is {'a folder' if path.is_dir() else 'a device or pipe'}, not a file (allowed: a .py file)"
    except OSError as error:
        return f"{name}: cannot be read: {error.strerror or error}"
    return None if path.suffix == ".py" else f"{name}: is not a .py file (allowed: a Python file, named *.py)"


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
