"""The worker's end of the pipes to its parent. What user code starts gets neither of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait
from typing import Any, NoReturn


class Link:
    """Requests come in on stdin, answers go out on stdout; after this, both names are of no use to the parent.

    A file's `input()` finds nothing to read, its prints go to stderr. Children close both pipes, so that the parent
    sees the worker's death at once, whatever the file has started.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._requests = os.fdopen(os.dup(0))
        self._replies = os.fdopen(os.dup(1), "w")
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._requests.close()
        self._replies.close()

    def request(self) -> dict[str, Any]:
        """The one request."""
        asked: dict[str, Any] = json.loads(self._requests.readline())
        return asked

    def say(self, message: dict[str, Any]) -> None:
        """One line to the parent."""
        if os.getpid() != self._owner:
            os._exit(0)  # a file forked, and its child came back here
        self._replies.write(json.dumps(message) + "\n")
        self._replies.flush()

    def fileno(self) -> int:
        """What becomes readable when the parent has closed the pipe, or died."""
        return self._requests.fileno()

    @contextlib.contextmanager
    def ends_with_parent(self) -> Iterator[None]:
        """While a file runs, which may do so for ever: the parent's death is noticed by a thread."""
        stopped, stop = os.pipe()

        def watch() -> None:
            if self.fileno() in wait([self.fileno(), stopped]):
                end_group()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            os.write(stop, b".")
            thread.join()
            os.close(stop)
            os.close(stopped)


def end_group() -> NoReturn:
    """The end of this process and of all that a file has started, as far as it stayed in our group."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
