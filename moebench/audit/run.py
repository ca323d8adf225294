"""An audit from the parent's side: starts the worker, follows it, judges what comes back. No torch, no triton."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from moebench.audit.limits import LIMITS
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
        load_timeout_s: of running the files, all together.
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
    for name in request.files:
        if not Path(name).expanduser().is_file():
            raise ValueError(f"{name}: no such file")
    found = Audit([], {})
    rows: dict[int, Row] = {}
    listed: list[Row] = []
    with _worker(request) as messages:
        for message in messages:
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


@contextlib.contextmanager
def _worker(request: Request) -> Iterator[Iterator[dict[str, Any]]]:
    # Interpreted kernels do not compile; the caller's process may well be interpreting.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryFile("w+") as said:
        # A session of its own: Ctrl-C reaches the parent alone, whose closing of the pipe ends the worker.
        process = subprocess.Popen(
            [sys.executable, "-m", "moebench.audit.worker"], env=environment, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
        )  # fmt: skip
        try:
            yield _messages(process, request, said)
        finally:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def _messages(process: subprocess.Popen[str], request: Request, said: IO[str]) -> Iterator[dict[str, Any]]:
    assert process.stdin is not None
    assert process.stdout is not None
    files = [str(Path(name).expanduser()) for name in request.files]
    asked = asdict(request) | {"files": files, "jobs": request.jobs or _cpus()}
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
    loading = ""
    for line in process.stdout:
        if not line.endswith("\n"):
            break  # cut by its death
        message: dict[str, Any] = json.loads(line)
        if "wrong" in message:
            raise ValueError("\n".join(message["wrong"]))
        if "unavailable" in message:
            raise RunError(message["unavailable"])
        loading = "" if "listed" in message else message.get("loading", loading)
        yield message
    code = process.wait()
    if loading and code == -signal.SIGALRM:
        raise ValueError(f"{loading}: did not finish running within {request.load_timeout_s:g} s")
    if loading:
        raise ValueError(f"{loading}: running it ended the process with {_obituary(code, said)}")
    if code:
        raise RunError(f"the audit's worker ended with {_obituary(code, said)}")


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _obituary(code: int, said: IO[str]) -> str:
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    said.seek(0)
    lines = [line.strip() for line in said.read().splitlines() if line.strip()]
    return how + (f" ({lines[-1][:300]})" if lines else "")
