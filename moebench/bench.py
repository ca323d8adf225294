"""Bench: what the arms of one precision share, and the twin that an interpreter can run. Lives in the worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moebench.catalogue.spec import LayerSpec
from moebench.expected import coupled
from moebench.point import DRAWS, Capacity, Problem
from moebench.routing.build import with_capacity
from moebench.routing.forms import Routing, TopK
from moebench.routing.logits import impose_logits
from moebench.routing.scores import Side
from moebench.routing.statistics import statistics
from moebench.weights import Weights, make_weights, seed_of
from moebench.workload import Draw, can_impose, make_draws

TWIN_TOKENS, TWIN_WIDTH, TWIN_FFN = 16, 64, 32


class Routed(NamedTuple):
    """A timed draw's routing under a capacity rule, the rows each expert keeps, and its statistics."""

    routing: Routing
    counts: Tensor
    statistics: dict[str, float | None]


@dataclass(frozen=True)
class Bench:
    """What the arms of one precision share: the problem's weights, and its draws (the last one is the check's)."""

    problem: Problem
    weights: Weights
    draws: tuple[Draw, ...]
    known: dict[tuple[Any, ...], Any] = field(default_factory=dict)  # the oracle's answers so far
    tampered: set[str] = field(default_factory=set)  # weights that some arm changed while the arms were timed
    copies: list[Weights] = field(default_factory=list)  # the same weights again, to rotate over
    copied_sums: list[dict[str, Tensor]] = field(default_factory=list)
    routings: dict[Capacity, list[Routed]] = field(default_factory=dict)

    @cached_property
    def row_sums(self) -> dict[str, Tensor]:
        """The weights' row sums before any arm has run."""
        return row_sums(self.weights)

    @property
    def held(self) -> list[tuple[Weights, dict[str, Tensor]]]:
        """The weights and every copy of them, each with its row sums when nobody had run on it."""
        return [(self.weights, self.row_sums), *zip(self.copies, self.copied_sums, strict=True)]

    def routed(self, capacity: Capacity) -> list[Routed]:
        """The timed draws under a capacity rule; once for all arms, as 32k tokens take a second a draw."""
        if capacity not in self.routings:
            kept = [with_capacity(draw.routing, capacity) for draw in self.draws[:DRAWS]]
            experts = self.problem.layer.routed_experts
            self.routings[capacity] = [Routed(each, each.counts()[:experts], statistics(each)) for each in kept]
        return self.routings[capacity]

    def copy(self, number: int) -> Weights:
        """Copy `number`, which all arms share; 0 is the weights themselves."""
        while len(self.copies) < number:
            self.copies.append(self.weights.copy())
            self.copied_sums.append(row_sums(self.copies[-1]))
        return self.copies[number - 1] if number else self.weights


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
