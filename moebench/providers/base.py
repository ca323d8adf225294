"""The provider contract: prepare(weights) -> state, run(state, inputs) -> output.

Most providers are one function of the experts; `ExpertsProvider` gives such a
function the scopes `experts` and `layer`. `StagedProvider` is for those that can
be taken apart: its six stages also run, and are timed, alone.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moebench.catalogue.spec import ACTIVATIONS
from moebench.point import PLAIN_PRECISIONS, STAGES
from moebench.providers.case import Case
from moebench.providers.layer_parts import ExpertsFn, experts_sum, join_shared, reference_gate, tensors_of
from moebench.routing.build import with_capacity
from moebench.routing.forms import FORMS, Routing
from moebench.routing.scores import Side
from moebench.weights import Weights
from moebench.workload import Inputs, choice_of


class Provider(Protocol):
    """What the worker needs of a provider."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    def fingerprint(self) -> str:
        """Digest of whatever its answer and speed depend on; `--resume` requires the same."""

    def refuse(self, case: Case) -> str | None:
        """Why it cannot do the case, or None."""

    def interpreted(self, device_kind: str) -> bool:
        """Whether it only runs in an interpreter here: then it is verified on a reduced twin, never timed."""

    def prepare(self, weights: Weights, case: Case) -> Any:
        """Everything that is done once per layer, outside the timing."""

    def scope_inputs(self, state: Any, inputs: Inputs) -> Any:
        """What `run` takes for the case's scope; static buffers, made outside the timing."""

    def run(self, state: Any, inputs: Any) -> Any:
        """One call. Autograd must be able to follow it where `refuse` allows forward_backward."""

    def executed_flops(self, case: Case, counts: Tensor) -> float | None:
        """FLOPs really executed forward, padding included, given kept assignments per expert [E]."""


@dataclass(frozen=True)
class State:
    """Weights as a provider wants them, and the case they are for."""

    weights: Weights
    case: Case
    experts: ExpertsFn


@dataclass(frozen=True)
class ExpertsProvider:
    """A provider made of one function.

    Attributes:
        name: as suites call it.
        experts: f(x [T, D], ids [T, K], weights [T, K], w_gate_up, w_down, *, activation, slots) -> y [T, D], with
            b_gate_up and b_down too where `biases`; ids are -1 and weights 0 where dropped; `slots` is the capacity
            C or None.
        version: of the library behind it.
        limits: further reasons to refuse a case.
        flops_executed: as `executed_flops`; the default counts kept assignments only.
        accepts_drops: whether ids may be -1.
        plain: whether `experts` takes the five tensors only (a user's kernel).
        activations: those it computes.
        precisions: those it takes; in the quantised ones w_gate_up and w_down are QuantisedWeights.
        forms: the routings it takes.
        biases: whether `experts` takes b_gate_up and b_down.
    """

    name: str
    experts: Callable[..., Any]
    version: str = f"torch {torch.__version__}"
    limits: Callable[[Case], str | None] = lambda case: None
    flops_executed: Callable[[Case, Tensor], float | None] | None = None
    accepts_drops: bool = True
    plain: bool = False
    activations: tuple[str, ...] = ACTIVATIONS
    precisions: tuple[str, ...] = PLAIN_PRECISIONS
    forms: tuple[str, ...] = FORMS
    biases: bool = False

    def fingerprint(self) -> str:
        return source_digest(self.experts, self.version)

    def interpreted(self, device_kind: str) -> bool:
        return False

    def refuse(self, case: Case) -> str | None:
        if case.scope in STAGES:
            return f"{self.name} is one function of the experts and has no stage {case.scope!r} of its own"
        if case.form not in self.forms:
            return f"{self.name} takes routings of the form {', '.join(self.forms)}, not {case.form}"
        if case.layer.activation not in self.activations:
            return f"{self.name} does not compute activation {case.layer.activation!r}"
        if case.layer.expert_bias and not self.biases:
            return f"{self.name} does not take biases in the experts"
        if case.precision not in self.precisions:
            return f"{self.name} takes precisions {', '.join(self.precisions)}, not {case.precision}"
        if case.drops and not self.accepts_drops:
            return f"{self.name} does not accept dropped assignments (set accepts_drops = True on the function)"
        return self.limits(case)

    def prepare(self, weights: Weights, case: Case) -> State:
        return State(weights, case, self.bind(case))

    def bind(self, case: Case) -> ExpertsFn:
        """The experts function for the case, of the five tensors and, where there are some, the biases."""
        if self.plain:
            return self.experts
        return partial(self.experts, activation=case.activation, slots=case.slots)

    def scope_inputs(self, state: State, inputs: Inputs) -> Any:
        return inputs

    def run(self, state: State, inputs: Inputs) -> Tensor:
        weights, case = state.weights, state.case
        if case.scope == "experts":
            return experts_sum(state.experts, inputs.choice, inputs.x, weights, case)
        routing = self.gate(inputs.x, weights.whole_gate, case, inputs.side)
        choice = choice_of(with_capacity(routing, case.capacity))
        y = experts_sum(state.experts, choice, inputs.x, weights, case)
        return join_shared(y, inputs.x, weights, case, inputs.dense_x)

    def gate(self, x: Tensor, gate: Mapping[str, Tensor], case: Case, side: Side) -> Routing:
        """x [T, D] and the gate's weights by name -> the dropless routing."""
        return reference_gate(x, gate, case, side)

    def executed_flops(self, case: Case, counts: Tensor) -> float | None:
        if self.plain:
            return None  # a stranger's kernel does not say what it pads
        rows = float(counts.sum()) if self.flops_executed is None else self.flops_executed(case, counts)
        return None if rows is None else rows * 2 * case.layer.expert_params()


@dataclass(frozen=True)
class Stages:
    """An experts function taken apart.

    Attributes:
        gate: (x, the gate's weights, case, side) -> the dropless routing.
        plan: (ids, case) -> plan, of the provider's own type.
        permute: (x, plan) -> rows [R, D]; R may contain padding.
        up_projection: (rows, w_gate_up, plan, activation, bias=None) -> [R, F].
        down_projection: (hidden, w_down, plan, bias=None) -> [R, D].
        combine: (rows, weights, plan) -> y [T, D].
        row_map: plan -> int64 [R], the flat assignment t*K+k of each row, -1 for padding.
        row_experts: plan -> int64 [R], the expert of each row (anything where padding).
    """

    gate: Callable[..., Routing]
    plan: Callable[..., Any]
    permute: Callable[..., Tensor]
    up_projection: Callable[..., Tensor]
    down_projection: Callable[..., Tensor]
    combine: Callable[..., Tensor]
    row_map: Callable[[Any], Tensor]
    row_experts: Callable[[Any], Tensor]

    def experts(self, inputs: Inputs, weights: Weights, case: Case) -> Tensor:
        """All stages from the plan on."""
        plan = self.plan(inputs.ids, case)
        # No name holds what lies between the stages for longer than it is needed: peak memory is measured.
        hidden = self.up_projection(
            self.permute(inputs.x, plan), weights.w_gate_up, plan, case.activation, weights.b_gate_up
        )
        rows = self.down_projection(hidden, weights.w_down, plan, weights.b_down)
        del hidden
        return self.combine(rows, inputs.weights, plan)


@dataclass(frozen=True)
class StageInputs:
    """What a stage alone takes: the inputs, and what the stages before it made of them."""

    inputs: Inputs
    plan: Any = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class StagedProvider(ExpertsProvider):
    """A provider whose stages run alone too; `experts` is not used."""

    stages: Stages | None = None
    interpreted_on: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        return source_digest(self.steps.plan, self.version)

    @property
    def steps(self) -> Stages:
        """The stages, which a staged provider always has."""
        assert self.stages is not None
        return self.stages

    def interpreted(self, device_kind: str) -> bool:
        return device_kind in self.interpreted_on

    def refuse(self, case: Case) -> str | None:
        if case.scope in STAGES and case.direction != "forward":
            return "stages are measured forward only"
        apart = case.form == "TopK" and case.layer.router.kind != "sigmoid_input" and not case.layer.router.zero_experts
        if case.scope in STAGES and case.scope != "gate" and not apart:
            return f"router {case.layer.router.kind!r} is taken apart into scopes gate, experts and layer only"
        staged = replace(case, scope="experts") if case.scope in STAGES else case
        return super().refuse(staged)

    def bind(self, case: Case) -> ExpertsFn:
        def experts(x: Tensor, ids: Tensor, gates: Tensor, w_gate_up: Tensor, w_down: Tensor, **biases: Any) -> Tensor:
            return self.steps.experts(Inputs(x, ids, gates), Weights(x, w_gate_up, w_down, **biases), case)

        return experts

    def gate(self, x: Tensor, gate: Mapping[str, Tensor], case: Case, side: Side) -> Routing:
        return self.steps.gate(x, gate, case, side)

    def scope_inputs(self, state: State, inputs: Inputs) -> Any:
        scope, stages, weights = state.case.scope, self.steps, state.weights
        if scope not in STAGES:
            return inputs
        if scope in ("gate", "plan"):
            return StageInputs(inputs)
        plan = stages.plan(inputs.ids, state.case)
        if scope == "permute":
            return StageInputs(inputs, plan)
        rows = stages.permute(inputs.x, plan)
        if scope in ("down_projection", "combine"):
            rows = stages.up_projection(rows, weights.w_gate_up, plan, state.case.activation, weights.b_gate_up)
        if scope == "combine":
            rows = stages.down_projection(rows, weights.w_down, plan, weights.b_down)
        return StageInputs(inputs, plan, rows)

    def run(self, state: State, inputs: Any) -> Any:
        case, stages, weights = state.case, self.steps, state.weights
        if case.scope not in STAGES:
            return super().run(state, inputs)
        given: StageInputs = inputs
        match case.scope:
            case "gate":
                return tensors_of(stages.gate(given.inputs.x, weights.whole_gate, case, given.inputs.side))
            case "plan":
                return stages.plan(given.inputs.ids, case)
            case "permute":
                return stages.permute(given.inputs.x, given.plan)
            case "up_projection":
                return stages.up_projection(
                    given.rows, weights.w_gate_up, given.plan, case.activation, weights.b_gate_up
                )
            case "down_projection":
                return stages.down_projection(given.rows, weights.w_down, given.plan, weights.b_down)
        return stages.combine(given.rows, given.inputs.weights, given.plan)


def source_digest(function: Callable[..., Any], *more: str) -> str:
    """16 hex digits of the source file that defines a function, and of further text."""
    source = _source_file(function)
    text = Path(source).read_bytes() if source else b""
    return hashlib.sha256(text + "\0".join(more).encode()).hexdigest()[:16]


def _source_file(function: Any) -> str | None:
    """Of a function, a partial of one, or a callable object; None for what has no Python source."""
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    try:
        return inspect.getsourcefile(function if inspect.isroutine(function) else type(function))
    except TypeError:
        return None
