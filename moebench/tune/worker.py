"""The tuner's worker: holds the tensors of one case and runs its candidates. `python -m moebench.tune.worker`.

Answers one JSON line for each on stdin, as moebench.worker does; the parent names the culprit when it dies.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moebench.measure import latency
from moebench.measure.device import device_name
from moebench.measure.errors import NO_ERROR, errors_of, tolerance, verdict
from moebench.measure.faults import device_is_lost
from moebench.point import DRAWS
from moebench.tune.case import Case
from moebench.tune.product import Product, product_of
from moebench.worker import serve_pipe

CHECKED_DRAWS = (0, 1)  # two, so that an answer left over from one is wrong for the other


class Worker:
    """One case at a time."""

    def __init__(self) -> None:
        self.kind = "cuda" if torch.cuda.is_available() else "cpu"
        self.calls: dict[int, latency.Call] = {}
        self.timers: dict[int, latency.Timer] = {}
        self.product: Product | None = None
        self.answers: list[tuple[int, Tensor, Tensor]] = []

    def hello(self) -> dict[str, Any]:
        """The device and its family of tiles."""
        import triton

        from moebench.providers.base import source_digest
        from moebench_kernels.grouped_gemm import launch_grouped_gemm
        from moebench_kernels.ragged_gemm import launch_ragged_tiles
        from moebench_kernels.tiles import device_family
        from moebench_kernels.tuned_tiles import shared_limit

        return {
            "device": device_name(self.kind),
            "device_kind": self.kind,
            "family": device_family(torch.device(self.kind)),
            "triton": triton.__version__,
            "source": source_digest(launch_grouped_gemm) + source_digest(launch_ragged_tiles),
            "shared_limit": shared_limit(torch.device(self.kind)),
        }

    def open(self, case: dict[str, Any], seed: int) -> dict[str, Any]:
        """The case's tensors, and the right answer to some of its draws."""
        self.close()
        product = self.product = product_of(Case(**case), self.kind, seed)
        self.answers = [(draw, *product.answer(draw)) for draw in CHECKED_DRAWS]
        return {"block_m": product.plans[0].block_m}

    def candidate(self, index: int, config: dict[str, Any]) -> dict[str, Any]:
        """Compile and run one tile; says what is wrong with its answers."""
        assert self.product is not None
        product, tile = self.product, self.product.config_class(**config)

        def call(draw: int) -> Tensor:
            return product.launch(tile, draw)

        def timed(draw: int) -> None:
            call(draw)  # the answer is let go: the graphs of all tiles then share the memory of one

        try:
            wrong = self._wrong(product, call)
        except Exception as error:
            if device_is_lost():  # the tiles after it would all look wrong: the race goes on in a new worker
                raise
            wrong = " ".join(str(error).split())[:200] or type(error).__name__
        if wrong is not None:
            return {"wrong": wrong}
        latency.warm(timed, DRAWS, max_seconds=0.5, device_kind=self.kind)
        self.calls[index] = timed
        self.timers[index] = latency.make_timer(self.kind, timed, DRAWS)
        return {"wrong": None, "timer": self.timers[index].name}

    def _wrong(self, product: Product, call: Callable[[int], Tensor]) -> str | None:
        for draw, numbers, expected in self.answers:
            product.poison()
            found = call(draw)[numbers]
            if not torch.equal(found, call(draw)[numbers]) and not found.isnan().any():
                return "two calls give different answers"
            wrong = verdict(errors_of(found, expected), tolerance(product.case.dtype, NO_ERROR))
            if wrong is not None:
                return wrong
        return None

    def burst(self, index: int, count: int, start: int) -> dict[str, Any]:
        """Some samples, in milliseconds of the device."""
        return {"samples_ms": self.timers[index].burst(self.calls[index], count, start).device_ms}

    def close(self) -> dict[str, Any]:
        """Let go of the case."""
        self.calls, self.timers = {}, {}
        self.product, self.answers = None, []
        if self.kind == "cuda":
            torch.cuda.empty_cache()
        return {}


if __name__ == "__main__":
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, which reads it once
    serve_pipe(Worker())
