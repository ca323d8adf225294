"""The nightly's cases: the points of a suite under names that last. No torch.

The suite file says what the cases are; the harness, asv (`nightly.py`) and pytest-benchmark
(`tests/benchmarks`) all take them from here.
"""

from __future__ import annotations

from typing import Literal

from moebench.axes import CUSTOM
from moebench.catalogue.spec import RouterSpec
from moebench.point import DROPLESS, Point, Problem, Variant
from moebench.suite import load_suite

DEFAULT_SUITE = "nightly"
USUAL_TRAFFIC = "uniform"


def cases(device_kind: Literal["cpu", "cuda"], source: str = DEFAULT_SUITE) -> dict[str, Point]:
    """Case id -> point, in the suite's order.

    Args:
        source: a shipped suite's name or a path to a .toml file.

    Raises:
        ValueError: two points of the suite have one name.
    """
    points = [point for block in load_suite([source]).blocks(device_kind) for point in block.points()]
    found = {case_id(point): point for point in points}
    if len(found) < len(points):
        raise ValueError(f"{source}: two points have one name; the {len(points)} points give {len(found)} names")
    return found


def case_id(point: Point) -> str:
    """`layer/D512-F256-E16-K2/T256/torch-grouped/fp32`, and then whatever is not as usual.

    It is a key of stored histories: what a point already says must never be said in another way.
    """
    problem, variant = point.problem, point.variant
    usual = [variant.scope, _layer(problem), f"T{problem.tokens}", variant.provider, variant.precision]
    return "/".join([*usual, *_unusual(problem, variant)])


def _layer(problem: Problem) -> str:
    layer = problem.layer
    shape = f"D{layer.hidden_size}-F{layer.expert_ffn_size}-E{layer.routed_experts}-K{layer.top_k}"
    return shape if problem.model == CUSTOM else f"{problem.model}-{shape}"


def _unusual(problem: Problem, variant: Variant) -> list[str]:
    layer, router = problem.layer, problem.layer.router
    said = {
        router.kind: router.kind != RouterSpec.kind or variant.scope == "gate",
        "training": router.training,
        f"groups-{router.groups}-{router.topk_groups}": router.groups > 1,
        f"slots-{router.slots}": router.slots > 1,
        layer.activation: layer.activation != "swiglu",
        f"shared-{layer.shared_experts}-{layer.shared_combine}": layer.shared_experts > 0,
        problem.traffic: problem.traffic != USUAL_TRAFFIC,
        problem.direction: problem.direction != "forward",
        f"seed-{problem.seed}": problem.seed != 0,
        f"capacity-{variant.capacity_factor}": variant.capacity_factor != DROPLESS,
        variant.capacity_rounding: variant.capacity_rounding != "ceil",
        variant.drop_order: variant.drop_order != "position",
        variant.layout: variant.layout != "single",
    }
    return [name for name, is_unusual in said.items() if is_unusual]
