"""A worker of straw: answers the worker's messages at once, without torch, and faults on cue.

`Crew` hands out stand-ins for `Remote` inside a test; `stand_in.py serve` is the worker's
process, and `stand_in.py run ...` is `moebench ...` with such a worker. That the answers
have the real worker's shape is tested.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# (provider or "", message) -> what happens instead: keys of the reply, an exception, or a function that gives either.
Cue = dict[str, Any] | BaseException | Callable[[], Any]
Cues = dict[tuple[str, str], Cue]


class Asked(NamedTuple):
    """One message."""

    do: str
    about: str
    arguments: dict[str, Any]
    deadline_s: float


class Answers:
    """The replies of a worker for which everything goes well.

    Args:
        latency_ms: of every call.
    """

    def __init__(self, latency_ms: float = 1.0) -> None:
        self.latency_ms = latency_ms

    def hello(self, device_kind: str) -> dict[str, Any]:
        return {
            "device_kind": "cpu", "device": "Straw", "machine": {}, "versions": {"torch": "none"},
            "cache_bytes": 1 << 20, "available_bytes": 1 << 34,
        }  # fmt: skip

    def hold(self, **wanted: Any) -> dict[str, Any]:
        return {"threads": wanted["threads"] or 2, "cores": [0, 1], "modes": "tf32=off"}

    def provider(self, name: str) -> dict[str, Any]:
        path = name.rpartition(":")[0]
        if not path:
            return {"version": "straw 1", "hash": hashlib.sha256(name.encode()).hexdigest()[:16]}
        if not Path(path).is_file():
            return {"unavailable": f"{name}: there is no file {path!r}"}
        return {"version": "user", "hash": hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}

    def ceilings(self, precisions: list[str], seconds: float) -> dict[str, Any]:
        return {
            "gemm_tflops": dict.fromkeys(precisions, 0.1), "copy_gbs": 10.0, "read_gbs": 12.0,
            "spread": {}, "seconds": seconds, "bytes": 1 << 20, "reasons": {},
        }  # fmt: skip

    def open(self, problem: dict[str, Any], precisions: list[str]) -> dict[str, Any]:
        return {}

    def arm(self, index: int, variant: dict[str, Any]) -> dict[str, Any]:
        return {
            "timed": True, "prepare_ms": 1.0, "checked_on": "T4 D16 F8 E4 K2", "kept": 8.0, "active_experts": 4.0,
            "drop_rate": 0.0, "load_max_over_mean": 1.0, "executed_flops": 6144.0, "load_cv": 0.0, "load_entropy": 1.0,
            "load_gini": 0.0, "collapsed_experts": 0.0, "active_over_uniform": 1.0, "unrouted_tokens": 0.0,
            "most_experts_per_token": 2.0, "balance_loss": 1.0,
        }  # fmt: skip

    def yardstick(self, index: int, name: str, precision: str, flops: float) -> dict[str, Any]:
        return {"timed": True, "flops": flops if name == "gemm" else 0.0, "moved_bytes": 1e6}

    def check(self, index: int) -> dict[str, Any]:
        return {"rel_error": 1e-7, "max_error": 1e-7, "fidelity_error": 1e-7, "wrong": None}

    def warm(self, index: int, max_seconds: float, timer: str, cache: str) -> dict[str, Any]:
        return {
            "first_call_ms": 2.0, "estimate_ms": self.latency_ms, "settled": True, "calls": 9,
            "timer": "straw", "why": "", "rotation": 4, "cache": "cold",
        }  # fmt: skip

    def memory(self, index: int) -> dict[str, Any]:
        return {"peak_memory_bytes": 1 << 20, "reason": None, "resolution_bytes": 4096}

    def burst(self, index: int, count: int, start: int) -> dict[str, Any]:
        return {"device_ms": [self.latency_ms] * count, "wall_ms": [self.latency_ms] * count}

    def recheck(self, index: int, latency_ms: float) -> dict[str, Any]:
        return {"wrong": None, "flags": []}

    def idle(self, window_s: float, cool_down_s: float) -> dict[str, Any]:
        return {
            "source": "straw", "joules": 60.0, "seconds": 1.0, "calls": 0, "ticked": True, "period_s": 0.01,
            "max_watts": 1000.0, "wrap_missed": False, "jumped": False, "beside": {"watts": {}},
        }  # fmt: skip

    def energy(self, index: int, window_s: float, cool_down_s: float) -> dict[str, Any]:
        return {**self.idle(window_s, cool_down_s), "joules": 300.0, "calls": 100}

    def state_begin(self) -> dict[str, Any]:
        return {}

    def state_end(self) -> dict[str, Any]:
        return {"state": {}, "flags": [], "arms": []}

    def drop(self, index: int) -> dict[str, Any]:
        return {}


class StandIn:
    """One worker of a crew; notes what it is asked."""

    def __init__(self, cues: Cues, answers: Answers) -> None:
        self.cues, self.answers = cues, answers
        self.asked: list[Asked] = []
        self.ended = False
        self._names: dict[int, str] = {}

    def ask(self, do: str, *, deadline_s: float, **arguments: Any) -> dict[str, Any]:
        assert not self.ended, f"{do} was asked of a worker that is gone"
        about = self._about(do, arguments)
        self.asked.append(Asked(do, about, arguments, deadline_s))
        reply: dict[str, Any] = getattr(self.answers, do)(**arguments)
        cue = self.cues.get((about, do), {})
        cue = cue() if callable(cue) else cue
        if isinstance(cue, BaseException):
            self.ended = True
            raise cue
        return cue if "status" in cue else {**reply, **cue}

    def kill(self) -> None:
        self.ended = True

    def messages(self, do: str) -> list[Asked]:
        """Those of one kind."""
        return [asked for asked in self.asked if asked.do == do]

    def _about(self, do: str, arguments: dict[str, Any]) -> str:
        if do in ("provider", "yardstick"):
            name = arguments["name"]
        elif do == "arm":
            name = arguments["variant"]["provider"]
        else:
            return self._names.get(arguments.get("index", -1), "")
        if "index" in arguments:
            self._names[arguments["index"]] = name
        return str(name)


@dataclass
class Crew:
    """Stand-ins, one after the other; the n-th takes n milliseconds for every call."""

    cues: Cues = field(default_factory=dict)
    workers: list[StandIn] = field(default_factory=list)

    def start(self, *_: object) -> StandIn:
        """The next worker."""
        self.workers.append(StandIn(self.cues, Answers(latency_ms=1.0 + len(self.workers))))
        return self.workers[-1]

    def asked(self, do: str) -> list[Asked]:
        """Messages of one kind to any of them."""
        return [asked for worker in self.workers for asked in worker.messages(do)]


def pause(here: str) -> None:
    """Where STAND_IN_PAUSE names this place, touch STAND_IN_MARK and hang until it has a file with `.on` beside it.

    Only once, since the mark stays.
    """
    mark = Path(os.environ.get("STAND_IN_MARK", os.devnull))
    if here == os.environ.get("STAND_IN_PAUSE") and not mark.exists():
        mark.touch()
        while not mark.with_suffix(".on").exists():
            time.sleep(0.02)


def serve() -> None:
    """The worker's process; it ends with its parent, as the real one does."""
    answers, requests = Answers(), iter(sys.stdin)
    waiting: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(requests, waiting), daemon=True).start()
    while True:
        request = json.loads(waiting.get())
        pause(request["do"])
        print(json.dumps(getattr(answers, request.pop("do"))(**request)), flush=True)


def _read(requests: Iterator[str], waiting: queue.Queue[str]) -> None:
    for line in requests:
        waiting.put(line)
    os._exit(0)


def run() -> None:
    """`moebench ...`, with this file in place of the worker; it can also pause where files are written."""
    from moebench import run as product
    from moebench.cli import main

    sync, syncs, write_results = os.fsync, itertools.count(1), product.write_results

    def paused_sync(descriptor: int) -> None:
        if next(syncs) == 2:  # the manifest was the first, the first block is the second
            pause("fsync")
        sync(descriptor)

    def paused_results(*arguments: Any) -> None:
        pause("results")
        write_results(*arguments)

    os.fsync, product.write_results = paused_sync, paused_results
    sys.executable = os.environ["STAND_IN_PYTHON"]  # a script that starts `stand_in.py serve`
    main()


if __name__ == "__main__":
    {"serve": serve, "run": run}[sys.argv.pop(1)]()
