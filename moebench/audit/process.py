"""The worker from the parent's side: started, listened to, ended with all that it has started. No torch, no triton."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from typing import IO, Any

from moebench.failures import RunError

CLOSING_S = 10.0  # for a worker that needs milliseconds


class Worker:
    """One worker and one request. Whatever happens to either, `close` leaves no process and no file behind."""

    def __init__(self, request: dict[str, Any], load_timeout_s: float) -> None:
        self._load_timeout_s = load_timeout_s
        self._loading = ""
        self._compiling = False
        self._groups: dict[int, int] = {}  # number of a build -> process group that compiles it
        self._scratch = tempfile.TemporaryDirectory(prefix="moebench-audit-", ignore_cleanup_errors=True)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the rest
        # Interpreted kernels do not compile; the caller's process may well be interpreting.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        # A session of its own: Ctrl-C reaches the parent alone, which then ends the worker.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moebench.audit.worker"], env=environment, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
        )  # fmt: skip
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(json.dumps(request | {"scratch": self._scratch.name}).encode() + b"\n")
            self._stdin.flush()

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def messages(self) -> Iterator[dict[str, Any]]:
        """What it says of the builds, until all is said.

        Raises:
            ValueError: a file is bad, or ended the worker, or did not end; one line a fault.
            RunError: triton is missing, or the worker died.
        """
        for line in self._lines():
            message: dict[str, Any] = json.loads(line)
            if "wrong" in message:
                raise ValueError("\n".join(message["wrong"]))
            if "unavailable" in message:
                raise RunError(message["unavailable"])
            if "loading" in message or "loaded" in message:
                self._loading = message.get("loading", "")
            elif "compiling" in message:
                self._groups[message["compiling"]] = message["group"]
            else:
                self._compiling = True
                self._groups.pop(message.get("number", -1), None)
                yield message
        ended = _obituary(self._code(), self._said)
        if self._loading:
            raise ValueError(f"{self._loading}: running it ended the process with {ended}")
        if self._process.returncode:
            raise RunError(f"the audit's worker ended with {ended}")

    def _lines(self) -> Iterator[bytes]:
        """Whole lines; one that is cut by the worker's death is dropped. A file has its time, then it is a fault."""
        text, began = b"", time.monotonic()
        while True:
            left = max(0.0, began + self._load_timeout_s - time.monotonic()) if self._loading else None
            if not wait([self._stdout.fileno()], timeout=left):
                raise ValueError(f"{self._loading}: did not finish running within {self._load_timeout_s:g} s")
            more = os.read(self._stdout.fileno(), 1 << 16)
            if not more:
                return
            *lines, text = (text + more).split(b"\n")
            began = time.monotonic()
            yield from lines

    def _code(self) -> int:
        """Of a worker that says no more; one that has closed its pipe and lives on is killed."""
        try:
            return self._process.wait(timeout=CLOSING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def close(self) -> None:
        """End it: by closing its pipe while it compiles, by force before: a file that runs does not listen."""
        with contextlib.suppress(OSError):
            self._stdin.close()
        if self._compiling:
            self._code()
        for group in (self._process.pid, *self._groups.values()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        self._process.wait()
        self._stdout.close()
        self._said.close()
        self._scratch.cleanup()


def _obituary(code: int, said: IO[bytes]) -> str:
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    said.seek(0)
    lines = [line.strip() for line in said.read().decode(errors="replace").splitlines() if line.strip()]
    return how + (f" ({lines[-1][:300]})" if lines else "")
