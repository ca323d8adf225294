"""Point and Block: what is to be measured. No torch.

Problem = LayerSpec x Traffic x direction; Variant = provider x precision x
capacity rule x layout x scope; Point = Problem x Variant; Block = the points of
one Problem, built and sampled together. Ratios exist only inside a block.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from moebench.catalogue.spec import LayerSpec, RouterSpec

SCHEMA_VERSION = 3

DROPLESS = "dropless"
DIRECTIONS = ("forward", "forward_backward")
STAGES = ("gate", "plan", "permute", "up_projection", "down_projection", "combine")
SCOPES = ("layer", "experts", *STAGES)
PLAIN_PRECISIONS = ("fp32", "bf16", "fp16")
QUANTISED_PRECISIONS = ("fp8:row", "fp8:128", "int8", "w4a16:128")  # of the experts' matrices; all else is bf16
PRECISIONS = PLAIN_PRECISIONS + QUANTISED_PRECISIONS
LAYOUTS = ("single",)
ROUNDINGS = ("ceil", "gshard", "mesh", "lingvo", "v-moe", "tutel")  # of a capacity; see moebench.routing.capacity
DROP_ORDERS = ("position", "choice", "probability", "batch_priority", "reroute")  # who keeps an expert's slots
PHASES = ("prefill", "decode", "train", "")
YARDSTICKS = ("copy", "read", "gemm")
DRAWS = 4  # input and routing draws that rotate, the same for every arm


@dataclass(frozen=True)
class Problem:
    """A layer under traffic, in one direction.

    Attributes:
        model: preset id, or "custom" for plain numbers or a changed preset's "id*".
        layer: the layer itself.
        tokens: T.
        traffic: pattern in its canonical spelling ("balanced", "zipf:1.2", ...).
        direction: one of `DIRECTIONS`.
        phase: a label only: prefill, decode, train or "".
        seed: of weights, inputs and routing.
    """

    model: str
    layer: LayerSpec
    tokens: int
    traffic: str = "balanced"
    direction: str = "forward"
    phase: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Capacity:
    """How many assignments an expert takes, and which.

    Attributes:
        factor: a positive number (with rounding "tutel" any number), or "dropless".
        rounding: one of `ROUNDINGS`, from the factor to C slots.
        order: one of `DROP_ORDERS`.
    """

    factor: float | str = DROPLESS
    rounding: str = "ceil"
    order: str = "position"


@dataclass(frozen=True)
class Variant:
    """One way to compute a Problem.

    Attributes:
        provider: name, or "path/to/file.py:function".
        precision: one of `PRECISIONS`.
        capacity_factor, capacity_rounding, drop_order: as in `Capacity`.
        layout: one of `LAYOUTS`.
        scope: one of `SCOPES`.
    """

    provider: str
    precision: str = "fp32"
    capacity_factor: float | str = DROPLESS
    capacity_rounding: str = "ceil"
    drop_order: str = "position"
    layout: str = "single"
    scope: str = "layer"

    @property
    def capacity(self) -> Capacity:
        """The capacity rule."""
        return Capacity(self.capacity_factor, self.capacity_rounding, self.drop_order)


@dataclass(frozen=True)
class Point:
    """One cell of a suite: a Problem computed by a Variant."""

    problem: Problem
    variant: Variant


@dataclass(frozen=True)
class Block:
    """The points of one problem, in the order the suite names them."""

    problem: Problem
    variants: tuple[Variant, ...]

    def points(self) -> list[Point]:
        """One Point for each variant."""
        return [Point(self.problem, variant) for variant in self.variants]

    @cached_property
    def block_id(self) -> str:
        """Its `digest`."""
        return digest(self)

    def point_ids(self) -> list[str]:
        """The `digest` of each of its points; the problem, which they share, is spelled once."""
        problem = _canonical(asdict(self.problem))
        texts = (_canonical(asdict(variant)) for variant in self.variants)
        return [_hashed(f'{{"problem":{problem},"variant":{variant}}}') for variant in texts]


def problem_name(problem: Problem) -> str:
    """A problem in a few words; the router where it is not a preset's own, nor the one a plain shape has unasked."""
    kind = problem.layer.router.kind
    unasked = kind == RouterSpec.kind or not (problem.model == "custom" or problem.model.endswith("*"))
    router = "" if unasked else f" {kind}"
    return f"{problem.model}{router} T={problem.tokens} {problem.traffic} {problem.direction}"


def base_precision(precision: str) -> str:
    """What inputs, outputs, router and shared experts are in: bf16 where only the experts' matrices are quantised."""
    return "bf16" if precision in QUANTISED_PRECISIONS else precision


def digest(value: object) -> str:
    """16 hex digits of a dataclass's (or plain value's) canonical JSON and the schema version."""
    plain = asdict(value) if hasattr(value, "__dataclass_fields__") else value  # type: ignore[call-overload]
    return _hashed(_canonical(plain))


def _canonical(plain: object) -> str:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _hashed(canonical: str) -> str:
    return hashlib.sha256(f"[{SCHEMA_VERSION},{canonical}]".encode()).hexdigest()[:16]


def problem_from_json(plain: dict[str, Any]) -> Problem:
    """The Problem whose `asdict` this is."""
    layer = dict(plain["layer"])
    layer["router"] = RouterSpec(**layer["router"])
    return Problem(**{**plain, "layer": LayerSpec(**layer)})
