"""Arm: one provider made ready for one problem, as calls over rotating draws. Lives in the worker."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moebench.answer import Answer
from moebench.bench import Bench, row_sums, sums_of, twin
from moebench.check import Verdict, judge
from moebench.point import DRAWS, DROPLESS, Problem, Variant
from moebench.providers.base import Provider
from moebench.providers.case import Case
from moebench.weights import Weights, make_weights
from moebench.workload import Draw, Inputs, make_inputs


class Arm:
    """A provider, its state, and its static input buffers.

    Attributes:
        case: what it was asked to do.
        timed: False where it only runs in an interpreter.
        checked_on: the shape it is checked on.
        first_call_ms: its very first call, with what it compiles and touches for the first time; null: not yet.
        layers, states: the weights and their copies that it rotates over, and the provider's state for each.
        rotation: how many calls make one rotation: call i runs draw i modulo 4 on copy i modulo the copies.
    """

    def __init__(self, provider: Provider, bench: Bench, variant: Variant, device: str) -> None:
        self.provider, self.variant, self.device = provider, variant, device
        self.timed = not provider.interpreted(device.partition(":")[0])
        if not self.timed:
            bench = twin(bench, variant.precision)
        problem = bench.problem
        self.case = make_case(problem, variant, device)
        self.backward = problem.direction == "forward_backward"
        self.checked_on = _shape(problem, interpreted=not self.timed)
        self.bench = bench
        _ = bench.row_sums  # taken before a provider sees the weights
        self.layers = [self._layer(0)]
        self.states = [provider.prepare(self.weights, self.case)]
        self.rotation = DRAWS
        self.first_call_ms: float | None = None
        self.buffers = [self._inputs(draw) for draw in bench.draws[:DRAWS]] if self.timed else []
        self.input_sums = [sums_of(buffer.tensors()) for buffer in self.buffers]
        self.scoped = [provider.scope_inputs(self.state, buffer) for buffer in self.buffers]

    @property
    def weights(self) -> Weights:
        """The layer's own weights, as the provider has them."""
        return self.layers[0]

    @property
    def state(self) -> Any:
        """The provider's state for them."""
        return self.states[0]

    def call(self, index: int) -> Any:
        """The next call of a rotation; forward_backward includes the backward pass."""
        return self.run(index % DRAWS, index % len(self.states))

    def run(self, draw: int, copy: int = 0) -> Any:
        """One call on a draw and a copy of the weights."""
        if self.backward:
            return self._forward_backward(self.buffers[draw], copy)[0]
        with torch.no_grad():
            return self.provider.run(self.states[copy], self.scoped[draw])

    def add_copies(self, copies: int) -> bool:
        """Make it ready on copies of the weights, `copies` in all, for calls to take turns; False where that fails."""
        try:
            layers = [self._layer(number) for number in range(1, copies)]
            states = [self.provider.prepare(layer, self.case) for layer in layers]
        except Exception:  # noqa: BLE001 - it is ready on the weights themselves, and is timed on those
            return False
        self.layers, self.states = self.layers[:1] + layers, self.states[:1] + states
        return True

    def _layer(self, number: int) -> Weights:
        weights = self.bench.copy(number)
        return weights.leaves() if self.backward else weights

    def check(self) -> Verdict:
        """Run once on other values, poison that output, refill the buffers, run again, and judge.

        The weights are every arm's: changing them is an error, and they are put right for the others.
        """
        verdict, changed = self._guarded_check()
        if changed:  # by another arm, it may be, while that one was prepared or timed: who does it again did it
            self.bench.tampered.add(changed)
            verdict, changed = self._guarded_check()
        return Verdict(None, None, None, f"changed the layer's {changed}") if changed else verdict

    def _guarded_check(self) -> tuple[Verdict, str | None]:
        """(the verdict, the weights found changed after it, which are right again), whatever the provider raises."""
        try:
            verdict = self._check()
        finally:
            changed = self.restore_weights()
        return verdict, changed

    def _check(self) -> Verdict:
        first, judged = self.bench.draws[0], self.bench.draws[-1]
        inputs = self._inputs(first)
        with torch.no_grad():
            scoped = self.provider.scope_inputs(self.state, inputs)
        begin = time.perf_counter()
        output, _ = self._execute(inputs, scoped)
        self._wait()
        if self.first_call_ms is None:
            self.first_call_ms = (time.perf_counter() - begin) * 1e3
        poison(output)
        inputs.refill(self._inputs(judged))
        with torch.no_grad():
            scoped = self.provider.scope_inputs(self.state, inputs)
        before = inputs.clone()
        output, grads = self._execute(inputs, scoped)
        changed = [name for name, value in before.tensors().items() if not torch.equal(value, getattr(inputs, name))]
        if changed:
            return Verdict(None, None, None, f"changed its input {changed[0]}")
        wanted = replace(self.variant, capacity_factor=DROPLESS)
        answer = Answer(inputs, self._inputs(judged, wanted).choice, output, grads, self.bench.known)
        verdict = judge(self.provider, self.state, self.case, self.bench.weights, answer)
        viewed = None if verdict.wrong else self._viewed(output, inputs, scoped)
        return replace(verdict, wrong=f"returned a view of its {viewed}") if viewed else verdict

    def routing_facts(self) -> dict[str, float | None]:
        """Means over the timed draws: kept rows, executed FLOPs, and the statistics of the routing."""
        routed = self.bench.routed(self.variant.capacity)
        facts: dict[str, list[float | None]] = {
            "kept": [float(draw.counts.sum()) for draw in routed],
            "executed_flops": [self.provider.executed_flops(self.case, draw.counts) for draw in routed],
        }
        found = [draw.statistics for draw in routed]
        facts |= {name: [each[name] for each in found] for name in found[0]}
        return {name: _mean(values) for name, values in facts.items()}

    def changed_input(self) -> str | None:
        """The first of the timed inputs that is not as it was made, or None."""
        for buffer, before in zip(self.buffers, self.input_sums, strict=True):
            if changed := _unequal(sums_of(buffer.tensors()), before):
                return changed[0]
        return None

    @contextmanager
    def other_values(self, index: int) -> Iterator[None]:
        """The check's values in the timed buffers of a draw; its own are put back."""
        buffer, before = self.buffers[index], self.buffers[index].clone()
        buffer.refill(self._inputs(self.bench.draws[-1]))
        try:
            yield
        finally:
            buffer.refill(before)

    def _viewed(self, output: Any, inputs: Inputs, scoped: Any) -> str | None:
        """What the output shares its memory with: an input or a weight by name, or None."""
        given = {_memory(value): "input" for value in tensors_in(scoped)}
        given |= {_memory(value): f"input {name}" for name, value in inputs.tensors().items()}
        given |= {_memory(value): f"layer's {name}" for name, value in self.weights.tensors().items()}
        shared = [given[_memory(value)] for value in tensors_in(output) if value.numel() and _memory(value) in given]
        return next(iter(shared), None)

    def restore_weights(self) -> str | None:
        """The first of the layer's weights that has changed, or None; all are then drawn anew."""
        held, problem = self.bench.held, self.bench.problem
        changed = [name for weights, before in held for name in _unequal(row_sums(weights), before)]
        if not changed:
            return None
        device = str(self.bench.weights.router.device)
        fresh = make_weights(problem.layer, self.variant.precision, device, problem.seed).tensors()
        for weights, _ in held:
            for name, value in weights.tensors().items():
                value.copy_(fresh[name])
        self.bench.known.clear()  # the oracle may have been asked about the changed ones
        return changed[0]

    def _inputs(self, draw: Draw, variant: Variant | None = None) -> Inputs:
        asked = variant or self.variant
        return make_inputs(draw, asked.capacity, asked.precision, self.device, backward=self.backward)

    def _execute(self, inputs: Inputs, scoped: Any) -> tuple[Any, dict[str, Tensor]]:
        if self.backward:
            return self._forward_backward(inputs)
        with torch.no_grad():
            return self.provider.run(self.state, scoped), {}

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def _forward_backward(self, inputs: Inputs, copy: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        assert inputs.upstream is not None
        leaves = {"x": inputs.x.detach().requires_grad_(), "weights": inputs.weights.detach().requires_grad_()}
        parameters = self.layers[copy].tensors()
        for parameter in parameters.values():
            parameter.grad = None
        output: Tensor = self.provider.run(self.states[copy], replace(inputs, **leaves))
        # Anything else goes to the check as it is, which says what is wrong with it.
        if isinstance(output, Tensor) and output.requires_grad and output.shape == inputs.upstream.shape:
            output.backward(inputs.upstream)
        every = {**leaves, **parameters}
        return output, {name: leaf.grad for name, leaf in every.items() if leaf.grad is not None}


def make_case(problem: Problem, variant: Variant, device: str) -> Case:
    """What a variant of a problem asks of a provider on a device."""
    return Case(
        layer=problem.layer,
        tokens=problem.tokens,
        direction=problem.direction,
        precision=variant.precision,
        capacity=variant.capacity,
        scope=variant.scope,
        device_kind=device.partition(":")[0],
    )


def _unequal(now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> list[str]:
    return [name for name, sums in before.items() if not torch.equal(sums, now[name])]


def poison(output: Any) -> None:
    """Overwrite an output: NaN, or 0 where it holds integers."""
    for value in output if isinstance(output, tuple) else (output,):
        if isinstance(value, Tensor):
            value.detach().fill_(float("nan") if value.is_floating_point() else 0)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a tensor, a tuple, a list, a dict or a dataclass of them, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    return [found for each in value for found in tensors_in(each)] if isinstance(value, list | tuple) else []


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _shape(problem: Problem, *, interpreted: bool) -> str:
    layer = problem.layer
    shape = f"T{problem.tokens} D{layer.hidden_size} F{layer.expert_ffn_size} E{layer.routed_experts} K{layer.top_k}"
    return f"{shape}, reduced twin in Triton's interpreter" if interpreted else shape


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
