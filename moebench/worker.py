"""The worker: the process that holds the tensors and runs the arms. `python -m moebench.worker`.

It answers one JSON line on its original stdout for each JSON line on stdin;
whatever providers print goes to stderr. It knows one block at a time. When the
parent goes away it ends at once, in the middle of whatever it runs.
"""

from __future__ import annotations

import faulthandler
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TextIO

import torch

from moebench.arm import Arm, make_case
from moebench.bench import Bench
from moebench.measure import ceilings, device, latency, memory, modes
from moebench.measure.energy_meters import Meters, open_meters
from moebench.measure.faults import breaks_device, device_is_lost, give_back_memory, lacks_memory
from moebench.point import QUANTISED_PRECISIONS, Problem, Variant, base_precision, problem_from_json
from moebench.providers.load import Unavailable, load
from moebench.recheck import recheck
from moebench.rotation import take_turns
from moebench.weights import Key, Weights, needed_bytes, weights_beside
from moebench.workload import Draw, make_draws
from moebench.yardsticks import Shelf, Yardstick


class Worker:
    """The arms of the block that is open; weights and yardsticks, which outlive it where the next one has the same."""

    def __init__(self) -> None:
        self.device = "cpu"
        self.weights: dict[Key, Weights] = {}
        self.yardsticks = Shelf()
        self.benches: dict[str, Bench] = {}
        self.problem: Problem | None = None
        self.arms: dict[int, Arm | Yardstick] = {}
        self.timers: dict[int, latency.Timer] = {}
        self.probe: device.StateProbe | None = None
        self.held: modes.Modes | None = None
        self.meters: Meters | None = None
        memory.pin_allocator()

    @property
    def kind(self) -> str:
        """cpu or cuda."""
        return self.device.partition(":")[0]

    def hello(self, device_kind: str) -> dict[str, Any]:
        """Choose the device ("auto": cuda where there is one); say what this machine is."""
        if device_kind == "cuda" and not torch.cuda.is_available():
            raise Unavailable("no CUDA device is available to PyTorch here")
        self.device = "cuda" if device_kind != "cpu" and torch.cuda.is_available() else "cpu"
        if self.kind == "cpu":
            os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it once
        return {
            "device_kind": self.kind,
            "device": device.device_name(self.kind),
            "machine": device.machine_facts(self.kind),
            "versions": device.versions(),
            "cache_bytes": device.llc_bytes(self.kind),
            "available_bytes": memory.available_bytes(self.kind),
        }

    def provider(self, name: str) -> dict[str, Any]:
        """Version and fingerprint of a provider, or why it is unavailable."""
        try:
            found = load(name)
        except Unavailable as error:
            return {"unavailable": str(error)}
        return {"version": found.version, "hash": found.fingerprint()}

    def ceilings(self, precisions: list[str], seconds: float) -> dict[str, Any]:
        """Measured ceilings of this machine."""
        return ceilings.measure_ceilings(self.device, precisions, seconds_per_probe=seconds)

    def hold(self, **wanted: Any) -> dict[str, Any]:
        """Set the suite's modes (`moebench.suite_file.Modes`) for good and say what they are."""
        self.held = modes.wanted_modes(**wanted)
        modes.apply_modes(self.held)
        return {"threads": self.held.threads, "cores": list(self.held.cores), "modes": self.held.text()}

    def open(self, problem: dict[str, Any], precisions: list[str]) -> dict[str, Any]:
        """Build a problem's weights and draws; weights of the same layer are kept from the block before."""
        self.close()
        self.problem = made = problem_from_json(problem)
        wanted = {precision: (made.layer, precision, made.seed) for precision in precisions}
        self.weights = {key: value for key, value in self.weights.items() if key in wanted.values()}
        self._require_memory(made, [p for p, key in wanted.items() if key not in self.weights])
        drawn: dict[str, tuple[Draw, ...]] = {}  # by base precision: all that is quantised has the same inputs
        for precision, key in wanted.items():
            if key not in self.weights:
                self.weights[key] = weights_beside(self.weights, key, self.device)
            weights, base = self.weights[key], base_precision(precision)
            drawn[base] = drawn.get(base) or make_draws(made, weights)
            self.benches[precision] = Bench(made, weights, drawn[base])
        return {}

    def arm(self, index: int, variant: dict[str, Any]) -> dict[str, Any]:
        """Make one provider ready; says whether it can, how long that took, and the routing as it sees it."""
        assert self.problem is not None
        made = Variant(**variant)
        provider = load(made.provider)
        reason = provider.refuse(make_case(self.problem, made, self.device))
        if reason is not None:
            return {"not_applicable": reason}
        begin = time.perf_counter()
        arm = Arm(provider, self.benches[made.precision], made, self.device)
        self._synchronize()
        self.arms[index] = arm
        prepare_ms = (time.perf_counter() - begin) * 1e3
        return {"timed": arm.timed, "prepare_ms": prepare_ms, "checked_on": arm.checked_on, **arm.routing_facts()}

    def yardstick(self, index: int, name: str, precision: str, flops: float) -> dict[str, Any]:
        """Make one yardstick ready; says where the device lacks its precision."""
        if precision in QUANTISED_PRECISIONS and (lacks := _lacks(precision, self.device)):
            return {"not_applicable": lacks}
        cache_bytes = device.llc_bytes(self.kind) or 0
        made = self.yardsticks.get(name, precision, self.device, flops, cache_bytes)
        self.arms[index] = made
        return {"timed": True, "flops": made.flops, "moved_bytes": made.moved_bytes}

    def check(self, index: int) -> dict[str, Any]:
        """Errors of an arm against the oracle; "wrong" says why it did not pass, or is null."""
        arm = self.arms[index]
        if isinstance(arm, Yardstick):
            errors, wrong = arm.check()
            return {"rel_error": errors.rel, "max_error": errors.max, "fidelity_error": None, "wrong": wrong}
        verdict = arm.check()
        self._synchronize()
        return vars(verdict)

    def warm(self, index: int, max_seconds: float, timer: str, cache: str) -> dict[str, Any]:
        """Choose what rotates, warm up and choose the timer; "cache" says whether what rotates is cold."""
        arm, cold_bytes = self.arms[index], latency.COLD_CACHES * (device.llc_bytes(self.kind) or 0)
        rotating_bytes = take_turns(arm, cache, cold_bytes, memory.available_bytes(self.kind))
        warmth = latency.warm(arm.call, arm.rotation, max_seconds=max_seconds, device_kind=self.kind)
        chosen = latency.make_timer(self.kind, arm.call, arm.rotation, timer)
        self.timers[index] = chosen
        reached = ("cold" if rotating_bytes >= cold_bytes else "hot") if cold_bytes else None
        facts = {"timer": chosen.name, "why": chosen.why, "rotation": arm.rotation, "cache": reached}
        first = arm.first_call_ms if isinstance(arm, Arm) else None  # the check may have run it before
        return warmth._asdict() | facts | ({} if first is None else {"first_call_ms": first})

    def memory(self, index: int) -> dict[str, Any]:
        """Peak memory of a solo pass."""
        arm = self.arms[index]
        for layer in arm.layers if isinstance(arm, Arm) else ():
            for value in layer.tensors().values():
                value.grad = None  # the call's answer too: that of the call before is not to count as resident
        peak, reason = memory.peak_memory(lambda: arm.call(0), self.kind)
        return {"peak_memory_bytes": peak, "reason": reason, "resolution_bytes": memory.resolution_bytes(self.kind)}

    def burst(self, index: int, count: int, start: int) -> dict[str, Any]:
        """Some samples, milliseconds per call."""
        samples = self.timers[index].burst(self.arms[index].call, count, start)
        if self.probe is not None:
            self.probe.sample(index)
        return {"device_ms": samples.device_ms, "wall_ms": samples.wall_ms}

    def recheck(self, index: int, latency_ms: float) -> dict[str, Any]:
        """Whether what was timed was the work that was checked; flags, and "wrong" where it was not."""
        arm = self.arms[index]
        assert isinstance(arm, Arm)
        return recheck(arm, self.timers[index], latency_ms, self.kind)._asdict()

    def idle(self, window_s: float, cool_down_s: float) -> dict[str, Any]:
        """One energy window in which nothing runs, or why there is no number."""
        self.meters = self.meters or open_meters(self.kind)
        return self.meters.window(None, window_s, cool_down_s)

    def energy(self, index: int, window_s: float, cool_down_s: float) -> dict[str, Any]:
        """One energy window of back-to-back calls, or why there is no number."""
        self.meters = self.meters or open_meters(self.kind)
        timer, call = self.timers[index], self.arms[index].call
        advance = partial(latency.run_for, timer, call, device_kind=self.kind)
        return self.meters.window(advance, window_s, cool_down_s)

    def state_begin(self) -> dict[str, Any]:
        """Start watching the machine's state."""
        self.probe = device.StateProbe(self.kind)
        self.probe.begin()
        return {}

    def state_end(self) -> dict[str, Any]:
        """What the machine did meanwhile, and the flags that follow; of a GPU also after each arm's own bursts."""
        probe, self.probe = self.probe, None
        assert probe is not None
        state = probe.end()
        arms = [
            {"index": index, "state": own, "flags": device.throttled(own)} for index, own in probe.arm_states().items()
        ]
        return {"state": state, "flags": device.contended(state), "arms": arms}

    def drop(self, index: int) -> dict[str, Any]:
        """Forget an arm, and give its memory back."""
        self.arms.pop(index, None)
        self.timers.pop(index, None)
        give_back_memory()
        return {}

    def close(self) -> dict[str, Any]:
        """Forget the block, but not the weights."""
        self.arms.clear()
        self.timers.clear()
        self.benches.clear()
        give_back_memory()
        return {}

    def _require_memory(self, problem: Problem, precisions: list[str]) -> None:
        needed = needed_bytes(problem.layer, precisions, self.weights)
        if needed > memory.available_bytes(self.kind):
            self.yardsticks.clear()
            give_back_memory()
        left = memory.available_bytes(self.kind)
        if needed > left:
            raise MemoryError(f"the layer's weights need {needed / 1e9:.3g} GB and {left / 1e9:.3g} GB are available")

    def _synchronize(self) -> None:
        if self.kind == "cuda":
            torch.cuda.synchronize()


def _lacks(precision: str, device: str) -> str | None:
    from moebench_kernels import supported  # not before `hello` has said how triton is to run

    reason: str | None = supported(precision, device)
    return reason


def status_of(error: BaseException) -> str:
    """The record status an exception stands for."""
    if lacks_memory(error):
        return "out_of_memory"
    if isinstance(error, Unavailable):
        return "unavailable"
    return "not_applicable" if isinstance(error, NotImplementedError) else "failed"


def changes(worker: object) -> dict[str, Any]:
    """Which modes the last message changed, after they have been put back: {"changed_modes": [names]}, or {}."""
    held = getattr(worker, "held", None)
    found = modes.put_back(held) if held is not None else []
    return {"changed_modes": found} if found else {}


def answer(handler: Callable[..., dict[str, Any]], request: dict[str, Any]) -> dict[str, Any]:
    """What the handler says, or the status and reason of what it raised; "fatal": nothing runs here any more."""
    try:
        return handler(**request)
    except Exception as error:  # noqa: BLE001 - whatever a provider raises costs its own point only
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        return {"status": status_of(error), "reason": reason, "fatal": breaks_device(error) or device_is_lost()}


def serve(worker: object, requests: queue.Queue[str | None], replies: TextIO) -> None:
    """Answer requests, each by the worker's method of that name, until there are no more."""
    while (line := requests.get()) is not None:
        request = json.loads(line)
        handler: Callable[..., dict[str, Any]] = getattr(worker, request.pop("do"))
        reply = answer(handler, request)
        if "status" in reply and not reply.get("fatal"):  # not while the exception lives, whose frames hold tensors
            getattr(worker, "drop", lambda index: None)(request.get("index", -1))
        replies.write(json.dumps(reply | changes(worker)) + "\n")
        replies.flush()


def _read_requests(requests: queue.Queue[str | None]) -> None:
    for line in sys.stdin:
        requests.put(line)
    # The parent closed the pipe, or died: nobody waits for what is being computed, nor for what this process started.
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def serve_pipe(worker: object) -> None:
    """Serve on stdin and stdout."""
    faulthandler.enable()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a provider's prints must not look like replies
    requests: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    serve(worker, requests, replies)


if __name__ == "__main__":
    serve_pipe(Worker())
