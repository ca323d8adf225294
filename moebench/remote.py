"""The parent's end of a worker: one message at a time, each with a deadline. No torch.

The message in flight names the culprit when the worker dies or hangs.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebench.failures import RunError

CLOSED_PIPE_S = 2.0

Reply = dict[str, Any]


class WorkerLost(Exception):
    """The worker died or was killed for missing its deadline.

    Attributes:
        status: crashed, timeout or out_of_memory.
        reason: one line.
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Remote:
    """A worker process, `python -m` of a module that answers as moebench.worker does.

    Raises:
        RunError: the system starts no process.
    """

    def __init__(self, log: Path, environment: Mapping[str, str], module: str = "moebench.worker") -> None:
        self.log = log
        self._oom_kills = _oom_kills()
        with log.open("ab") as stderr:
            self._log_start = stderr.tell()
            # A session of its own: Ctrl-C reaches the parent alone, and a kill reaches what the worker started.
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", module],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    env={**os.environ, **environment},
                    text=True,
                    errors="replace",
                    start_new_session=True,
                )
            except OSError as error:
                raise RunError(f"the worker cannot be started: {sys.executable}: {error.strerror}") from None
        self._replies: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._pump, daemon=True).start()
        threading.Thread(target=self._reap, daemon=True).start()

    def ask(self, do: str, *, deadline_s: float, **arguments: Any) -> Reply:
        """Send one message and wait for its reply.

        Raises:
            WorkerLost: it died, or did not answer within `deadline_s` and was killed.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._replies.get(timeout=deadline_s)
        except queue.Empty:
            self.kill()
            raise WorkerLost("timeout", f"{do}: no answer within {deadline_s:.0f} s") from None
        except OSError:
            line = ""
        if not line.endswith("\n"):  # the end of the pipe, or a reply that death has cut
            raise self._obituary(do)
        return self._read(do, line)

    def _read(self, do: str, line: str) -> Reply:
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):  # who writes into the worker's pipes can no longer be told from the worker
            self.kill()
            raise WorkerLost("crashed", f"{do}: the worker's reply cannot be read, so it was ended")
        return reply

    def kill(self) -> None:
        """End the worker and whatever it started, now."""
        self._kill_group()
        self._process.wait()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _reap(self) -> None:
        self._process.wait()
        self._kill_group()  # what it started may hold the pipe open, which would hide its death

    def _pump(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._replies.put(line)
        self._replies.put("")  # end of the pipe: it died

    def _obituary(self, do: str) -> WorkerLost:
        with contextlib.suppress(subprocess.TimeoutExpired):  # a provider may close the pipe and live on
            self._process.wait(timeout=CLOSED_PIPE_S)
        self.kill()
        code = self._process.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if code == -signal.SIGKILL and _oom_kills() > self._oom_kills:
            return WorkerLost("out_of_memory", f"{do}: the kernel killed the worker for memory")
        last = self._last_words()
        return WorkerLost("crashed", f"{do}: the worker ended with {how}" + (f" ({last})" if last else ""))

    def _last_words(self) -> str:
        with self.log.open("rb") as file:
            file.seek(max(self._log_start, file.seek(0, os.SEEK_END) - 4096))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
        fatal = [line for line in lines if line.startswith("Fatal Python error")]
        return next(iter(fatal), "")[:200]


def _oom_kills() -> int:
    """How often the kernel's out-of-memory killer struck, in this cgroup or on this machine; 0 where unknown."""
    for path in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        with contextlib.suppress(OSError):
            for line in Path(path).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0
