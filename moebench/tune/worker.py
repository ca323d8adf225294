"""The tuner's worker: holds the tensors of one case and runs its candidates. `python -m moebench.tune.worker`.

Answers one JSON line for each on stdin, as moebench.worker does; the parent names the culprit when it dies.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from moebench.measure import latency
from moebench.measure.device import device_name
from moebench.measure.errors import NO_ERROR, errors_of, tolerance, verdict
from moebench.point import DRAWS
from moebench.routing.patterns import choose_experts
from moebench.traffic import parse_traffic
from moebench.tune.case import DTYPES, Case
from moebench.worker import serve_pipe

CHECKED_ROWS = 4096  # of the answer, compared in float64 on the host


class Worker:
    """One case at a time."""

    def __init__(self) -> None:
        self.kind = "cuda" if torch.cuda.is_available() else "cpu"
        self.calls: dict[int, latency.Call] = {}
        self.timers: dict[int, latency.Timer] = {}

    def hello(self) -> dict[str, Any]:
        """The device and its family of tiles."""
        import triton

        from moebench.providers.base import source_digest
        from moebench_kernels.grouped_gemm import launch_grouped_gemm
        from moebench_kernels.tiles import device_family

        return {
            "device": device_name(self.kind),
            "device_kind": self.kind,
            "family": device_family(torch.device(self.kind)),
            "triton": triton.__version__,
            "source": source_digest(launch_grouped_gemm),
        }

    def open(self, case: dict[str, Any], seed: int) -> dict[str, Any]:
        """Weights once, rows and routing in rotating draws, and the right answer to the first of them."""
        from moebench_kernels import routing_plan
        from moebench_kernels.activation import activate_torch
        from moebench_kernels.grouped_gemm import grouped_gemm_torch
        from moebench_kernels.permute import permute_torch

        self.close()
        self.case = made = Case(**case)
        generator = torch.Generator().manual_seed(seed)
        dtype = getattr(torch, DTYPES[made.dtype])
        shape = (made.experts, made.k, made.n) if made.transpose else (made.experts, made.maps * made.n, made.k)
        device_generator = torch.Generator(self.kind).manual_seed(seed)
        self.weights = torch.randn(shape, generator=device_generator, device=self.kind, dtype=dtype) * made.k**-0.5
        height = made.tokens if made.gather else made.rows
        traffic = parse_traffic("uniform")
        ids = [choose_experts(traffic, made.tokens, made.top_k, made.experts, generator) for _ in range(DRAWS)]
        self.plans = [routing_plan(each.to(self.kind), made.experts) for each in ids]
        self.rows = [
            torch.randn(height, made.k, generator=device_generator, device=self.kind, dtype=dtype) for _ in ids
        ]
        plan = self.plans[0]
        rows = permute_torch(self.rows[0], plan) if made.gather else self.rows[0]
        exact = grouped_gemm_torch(rows.float(), self.weights.float(), plan, transpose=made.transpose)
        answer = activate_torch(exact, made.activation) if made.activation else exact
        self.expected = answer[:CHECKED_ROWS].double().cpu()
        return {"block_m": plan.block_m}

    def candidate(self, index: int, config: dict[str, Any]) -> dict[str, Any]:
        """Compile and run one tile; says what is wrong with its answer, or how long a warm call takes."""
        from moebench_kernels.grouped_gemm import launch_grouped_gemm
        from moebench_kernels.tiles import GemmConfig

        made, tile = self.case, GemmConfig(**config)

        def call(draw: int) -> Tensor:
            out: Tensor = launch_grouped_gemm(
                self.rows[draw], self.weights, self.plans[draw],
                gather=made.gather, transpose=made.transpose, activation=made.activation, config=tile,
            )[0]  # fmt: skip
            return out

        try:
            found = call(0)[:CHECKED_ROWS].clone()
            again = call(0)[:CHECKED_ROWS]
        except Exception as error:  # noqa: BLE001 - whatever a tile raises costs only that tile
            return {"wrong": " ".join(str(error).split())[:200] or type(error).__name__}
        if not torch.equal(found, again):
            return {"wrong": "two calls give different answers"}
        wrong = verdict(errors_of(found, self.expected), tolerance(made.dtype, NO_ERROR))
        if wrong is not None:
            return {"wrong": wrong}
        latency.warm(call, DRAWS, max_seconds=0.5, device_kind=self.kind)
        self.calls[index] = call
        self.timers[index] = latency.make_timer(self.kind, call, DRAWS)
        return {"wrong": None, "timer": self.timers[index].name}

    def burst(self, index: int, count: int, start: int) -> dict[str, Any]:
        """Some samples, in milliseconds of the device."""
        return {"samples_ms": self.timers[index].burst(self.calls[index], count, start).device_ms}

    def close(self) -> dict[str, Any]:
        """Let go of the case."""
        self.calls, self.timers = {}, {}
        self.weights = self.expected = None
        self.rows = self.plans = []
        if self.kind == "cuda":
            torch.cuda.empty_cache()
        return {}


if __name__ == "__main__":
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, which reads it once
    serve_pipe(Worker())
