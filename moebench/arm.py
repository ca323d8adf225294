"""Arm: one provider made ready for one problem, as calls over rotating draws. Lives in the worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moebench.answer import Answer
from moebench.catalogue.spec import LayerSpec
from moebench.check import Verdict, judge
from moebench.expected import coupled
from moebench.point import DRAWS, DROPLESS, Problem, Variant
from moebench.providers.base import Provider
from moebench.providers.case import Case
from moebench.routing.build import with_capacity
from moebench.routing.forms import TopK
from moebench.routing.logits import impose_logits
from moebench.routing.scores import Side
from moebench.routing.statistics import statistics
from moebench.weights import Weights, make_weights, seed_of
from moebench.workload import Draw, Inputs, can_impose, make_draws, make_inputs

TWIN_TOKENS, TWIN_WIDTH, TWIN_FFN = 16, 64, 32


@dataclass(frozen=True)
class Bench:
    """What the arms of one precision share: the problem's weights, and its draws (the last one is the check's)."""

    problem: Problem
    weights: Weights
    draws: tuple[Draw, ...]
    known: dict[tuple[Any, ...], Any] = field(default_factory=dict)  # the oracle's answers so far
    tampered: set[str] = field(default_factory=set)  # weights that some arm changed while the arms were timed

    @cached_property
    def row_sums(self) -> dict[str, Tensor]:
        """The weights' row sums before any arm has run."""
        return row_sums(self.weights)


class Arm:
    """A provider, its state, and its static input buffers.

    Attributes:
        case: what it was asked to do.
        timed: False where it only runs in an interpreter.
        checked_on: the shape it is checked on.
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
        self.weights = bench.weights.leaves() if self.backward else bench.weights
        self.state = provider.prepare(self.weights, self.case)
        self.buffers = [self._inputs(draw) for draw in bench.draws[:DRAWS]] if self.timed else []
        self.input_sums = [sums_of(buffer.tensors()) for buffer in self.buffers]
        self.scoped = [provider.scope_inputs(self.state, buffer) for buffer in self.buffers]

    def call(self, index: int) -> Any:
        """One call on a draw; forward_backward includes the backward pass."""
        if self.backward:
            return self._forward_backward(self.buffers[index])[0]
        with torch.no_grad():
            return self.provider.run(self.state, self.scoped[index])

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
        output, _ = self._execute(inputs, scoped)
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
        draws = [with_capacity(draw.routing, self.variant.capacity) for draw in self.bench.draws[:DRAWS]]
        kept = [draw.counts()[: self.case.layer.routed_experts] for draw in draws]
        facts: dict[str, list[float | None]] = {
            "kept": [float(counts.sum()) for counts in kept],
            "executed_flops": [self.provider.executed_flops(self.case, counts) for counts in kept],
        }
        found = [statistics(draw) for draw in draws]
        facts |= {name: [each[name] for each in found] for name in found[0]}
        return {name: _mean(values) for name, values in facts.items()}

    def changed_input(self) -> str | None:
        """The first of the timed inputs that is not as it was made, or None."""
        for buffer, before in zip(self.buffers, self.input_sums, strict=True):
            now = sums_of(buffer.tensors())
            for name, sums in before.items():
                if not torch.equal(sums, now[name]):
                    return name
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
        weights, problem = self.bench.weights, self.bench.problem
        now = row_sums(weights)
        changed = [name for name, sums in self.bench.row_sums.items() if not torch.equal(sums, now[name])]
        if not changed:
            return None
        fresh = make_weights(problem.layer, self.variant.precision, str(weights.router.device), problem.seed).tensors()
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

    def _forward_backward(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        assert inputs.upstream is not None
        leaves = {"x": inputs.x.detach().requires_grad_(), "weights": inputs.weights.detach().requires_grad_()}
        parameters = self.weights.tensors()
        for parameter in parameters.values():
            parameter.grad = None
        output: Tensor = self.provider.run(self.state, replace(inputs, **leaves))
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


def twin(bench: Bench, precision: str) -> Bench:
    """What an interpreter can run: a reduced layer with the same E, K and router, and the first tokens' routing."""
    layer, problem = bench.problem.layer, bench.problem
    # Twice as wide as E: near a square router the imposed hidden states grow beyond what bfloat16 keeps apart.
    width = max(TWIN_WIDTH, -(-layer.routed_experts // 8) * 16) if can_impose(layer) else TWIN_WIDTH
    small = replace(
        layer,
        hidden_size=min(layer.hidden_size, width),
        expert_ffn_size=min(layer.expert_ffn_size, TWIN_FFN),
        shared_ffn_size=min(layer.shared_ffn_size, TWIN_FFN),
    )
    tokens = min(problem.tokens, TWIN_TOKENS)
    reduced = replace(problem, layer=small, tokens=tokens)
    weights = make_weights(small, precision, "cpu", problem.seed)
    # What says which experts are chosen, and does not depend on the widths, stays the full layer's.
    full = {name: value.cpu() for name, value in bench.weights.gate.items()}
    kept = {name: value for name, value in full.items() if value.shape == weights.gate[name].shape}
    weights = replace(weights, gate=weights.gate | kept)
    if can_impose(small) and all(isinstance(draw.routing, TopK) for draw in bench.draws) and not coupled(layer):
        draws = tuple(_twin_draw(draw, small, weights, tokens, index) for index, draw in enumerate(bench.draws))
    else:  # its choices are its own: of these hidden states, or of all tokens together
        draws = make_draws(reduced, weights)
    return Bench(reduced, weights, draws)


def _twin_draw(draw: Draw, small: LayerSpec, weights: Weights, tokens: int, index: int) -> Draw:
    """The first tokens of a draw, with smaller hidden states that make the same choices."""
    generator = torch.Generator().manual_seed(seed_of("twin", index))
    x = torch.randn(tokens, small.hidden_size, generator=generator)
    upstream = torch.randn(tokens, small.hidden_size, generator=generator)
    dense_x = None if draw.dense_x is None else torch.randn(x.shape, generator=generator)
    full = draw.routing
    assert isinstance(full, TopK)
    ids, gates = full.wanted_ids[:tokens], full.wanted_weights[:tokens]
    logits = None if full.logits is None else full.logits[:tokens]
    if logits is not None:
        gate = {name: value.float() for name, value in weights.whole_gate.items()}
        x = impose_logits(x, gate["router"], logits - gate.get("logit_bias", torch.zeros(()))).float()
    routing = TopK(ids, gates, ids, gates, logits, full.routed_experts, full.on_input)
    side = Side(**{name: value[:tokens] for name, value in draw.side.tensors().items()})
    return Draw(x, routing, upstream, side, dense_x)


def row_sums(weights: Weights) -> dict[str, Tensor]:
    """`sums_of` a layer's weights."""
    return sums_of(weights.tensors())


def sums_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """float32 sums over the last dimension, by name: equal to the last bit while nobody writes to the tensors."""
    return {name: _countable(value).sum(-1, dtype=torch.float32) for name, value in tensors.items()}


def _countable(value: Tensor) -> Tensor:
    """What torch can sum: fp8 as the integers that its bits are."""
    return value.detach().view(torch.uint8) if value.dtype == torch.float8_e4m3fn else value.detach()


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
