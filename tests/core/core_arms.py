"""Small layers, and what turns one into an arm that can be checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moebench.arm import Arm
from moebench.bench import Bench
from moebench.catalogue.spec import LayerSpec, RouterSpec
from moebench.check import Verdict
from moebench.point import Problem, Variant
from moebench.providers.load import load
from moebench.weights import make_weights
from moebench.workload import make_draws

NUMBER = r"[0-9.]+(e[+-]\d+)?"
OFF = rf"relative error {NUMBER} against the float64 oracle"
USER_KERNELS = Path(__file__).parent / "user_kernels.py"


def layer_of(experts: int = 8, top_k: int = 2, *, hidden: int = 32, ffn: int = 16, **more: Any) -> LayerSpec:
    """A layer small enough for thousands of checks; rows are multiples of 16 bytes, as grouped_mm wants them."""
    if more.get("activation") == "limited_swiglu":
        more.setdefault("activation_limit", 0.5)
    return LayerSpec(hidden, ffn, experts, top_k, **more)


def shared(combine: str = "add", **more: Any) -> LayerSpec:
    """The same with two shared experts."""
    return layer_of(shared_experts=2, shared_ffn_size=8, shared_combine=combine, **more)


def router(kind: str, **more: Any) -> RouterSpec:
    """A RouterSpec by its kind."""
    return RouterSpec(kind=kind, **more)


def bench_of(
    layer: LayerSpec, tokens: int = 37, *, precision: str = "fp32", traffic: str = "uniform",
    direction: str = "forward", seed: int = 0,
) -> Bench:  # fmt: skip
    """Weights and draws of a problem, as the worker makes them."""
    problem = Problem("custom", layer, tokens, traffic, direction, seed=seed)
    weights = make_weights(layer, precision, "cpu", seed)
    return Bench(problem, weights, make_draws(problem, weights))


def arm_of(
    provider: Any, bench: Bench, *, precision: str = "fp32", scope: str = "experts", capacity: Any = "dropless",
    rounding: str = "ceil", order: str = "position",
) -> Arm:  # fmt: skip
    """The provider (or its name) on the bench."""
    found = load(provider) if isinstance(provider, str) else provider
    return Arm(found, bench, Variant(found.name, precision, capacity, rounding, order, scope=scope), "cpu")


def verdict_of(
    provider: Any, layer: LayerSpec, tokens: int = 37, *, precision: str = "fp32", scope: str = "experts",
    capacity: Any = "dropless", rounding: str = "ceil", order: str = "position", **problem: Any,
) -> Verdict:  # fmt: skip
    """Check a provider on a problem; it must not refuse it."""
    arm = arm_of(provider, bench_of(layer, tokens, precision=precision, **problem), precision=precision, scope=scope,
                 capacity=capacity, rounding=rounding, order=order)  # fmt: skip
    reason = arm.provider.refuse(arm.case)
    assert reason is None, reason
    return arm.check()


def user_kernel(function: str) -> str:
    """The provider name of a function in user_kernels.py."""
    return f"{USER_KERNELS}:{function}"


def assert_says(pattern: str, text: str | None) -> None:
    """The reason is one line and holds the pattern."""
    assert text is not None
    assert re.search(pattern, text), text
    assert "\n" not in text
