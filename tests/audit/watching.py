"""Processes seen from outside, and waiting for what they do."""

import signal
import time
from pathlib import Path


def stat(pid):
    """State and parent of a process; one that waits only to be reaped, or is no more, is "X"."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return "X", 0
    return state.replace("Z", "X"), int(parent)


def gone(pid):
    """Whether a process is no more, or waits only to be reaped."""
    return stat(pid)[0] == "X"


def within(seconds, condition):
    """Whether a condition comes true in so many seconds."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def heed_ctrl_c() -> None:
    """In a child: a test run that a shell started in the background ignores SIGINT, and so would the child."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
