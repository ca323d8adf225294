"""The nightly's cases under pytest-benchmark: `pytest tests/benchmarks --benchmark-only` (docs/nightly.md).

The table shows wall time, read with the device waited for at both ends. Device time, which has no
column there, stands in `extra_info` of the stored JSON with the timer's name. Nothing is timed whose
answer was not checked first.
"""

from __future__ import annotations

import itertools
from statistics import median
from typing import Any

import pytest
import torch
from moebench_suites.cases import cases
from torch.utils.benchmark import timer

from moebench.arm import Arm
from moebench.bench import Bench
from moebench.measure import latency
from moebench.point import Point
from moebench.providers.load import load
from moebench.weights import make_weights
from moebench.workload import make_draws

KIND = "cuda" if torch.cuda.is_available() else "cpu"
CASES = cases(KIND)
WARM_S = 1.0
DEVICE_SAMPLES = 20


def make_arm(point: Point, device: str) -> Arm:
    """The point's provider on its own weights and draws, as the worker makes it; skips what it refuses."""
    problem, variant = point.problem, point.variant
    weights = make_weights(problem.layer, variant.precision, device, problem.seed)
    arm = Arm(load(variant.provider), Bench(problem, weights, make_draws(problem, weights)), variant, device)
    reason = arm.provider.refuse(arm.case)
    if reason is not None:
        pytest.skip(f"{variant.provider}: {reason}")
    return arm


def device_times(arm: Arm) -> dict[str, Any]:
    """Medians on the device's clock and on the host's, of the harness's own timer, and its name."""
    chosen = latency.make_timer(KIND, arm.call, arm.rotation)
    samples = chosen.burst(arm.call, DEVICE_SAMPLES, 0)
    times = {"device_ms": median(samples.device_ms), "wall_ms": median(samples.wall_ms)}
    return {"timer": chosen.name, "timer_reason": chosen.why, **times}


@pytest.mark.benchmark(timer=timer)
@pytest.mark.parametrize("case", CASES)
def test_case(case: str, benchmark: Any) -> None:
    arm = make_arm(CASES[case], KIND)
    verdict = arm.check()
    assert verdict.wrong is None
    turns = itertools.cycle(range(arm.rotation))
    if benchmark.enabled:
        latency.warm(arm.call, arm.rotation, max_seconds=WARM_S, device_kind=KIND)
        benchmark.group = case.partition("/")[0]
        benchmark.extra_info |= {"threads": torch.get_num_threads(), "rel_error": verdict.rel_error}
        benchmark.extra_info |= device_times(arm)
    benchmark(lambda: arm.call(next(turns)))
