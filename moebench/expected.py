"""What a layer is expected to answer: the oracles put together for any form of routing. float64.

Where `oracle_gate` does not know a router, its own reference decides, in float64: the tests hold that against
independent loops and against transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moebench import oracle, oracle_gate
from moebench.catalogue.routers import is_causal
from moebench.catalogue.spec import LayerSpec
from moebench.point import Capacity
from moebench.routing.forms import Routing, top_k_routing
from moebench.routing.route import decide, make_scores
from moebench.routing.scores import Side
from moebench.weights import Weights
from moebench.workload import Choice, choice_of


def layer_answer(layer: LayerSpec, weights: Weights, x: Tensor, side: Side, dense_x: Tensor | None = None) -> Tensor:
    """The whole dropless layer on all tokens: float64 [T, D] -> float64 [T, D]."""
    choice = choice_of(routing(layer, weights, x, side))
    routed = routed_sum(layer, weights, x, choice, torch.arange(len(x), device=x.device))
    return oracle.joined(layer, weights, x, routed, dense_x)


def routing(layer: LayerSpec, weights: Weights, x: Tensor, side: Side) -> Routing:
    """The layer's own choice, dropless, of hidden states float64 [n, D]."""
    if oracle_gate.covers(layer):
        return top_k_routing(*oracle_gate.gate(layer, weights, x), layer.choices)
    gate = {name: value.double() if value.is_floating_point() else value for name, value in weights.whole_gate.items()}
    return decide(layer, make_scores(layer, x, gate, side))


def coupled(layer: LayerSpec) -> bool:
    """Whether a token's route depends on the other tokens."""
    return not is_causal(layer.router, Capacity())


def on_input(layer: LayerSpec) -> bool:
    """Whether the weight multiplies the expert's input."""
    return layer.router.kind == "sigmoid_input"


def routed_sum(layer: LayerSpec, weights: Weights, x: Tensor, choice: Choice, pick: Tensor) -> Tensor:
    """The experts' sum of the picked tokens under a routing of all: x float64 [T, D], pick int64 [n] -> [n, D]."""
    if choice.combine is not None or choice.token is not None:
        rows = rows_of(x, choice)
        out = oracle.experts(layer, weights, rows.x, rows.expert.unsqueeze(1), rows.weight.unsqueeze(1))
        return rows.back(out, len(x))[pick]
    return oracle.experts(layer, weights, x[pick], choice.ids[pick], choice.weights[pick], on_input=on_input(layer))


@dataclass(frozen=True)
class Rows:
    """A routing of any form as rows that experts compute, R of them.

    Attributes:
        x: [R, D], before any weight.
        expert: int64 [R], -1 for none.
        weight: [R].
        token: int64 [R], or None for a Mix.
        combine: [T, R] of a Mix.
    """

    x: Tensor
    expert: Tensor
    weight: Tensor
    token: Tensor | None
    combine: Tensor | None

    def back(self, out: Tensor, tokens: int) -> Tensor:
        """Weighted answers of the rows [R, D] -> [T, D]."""
        if self.combine is not None:
            return self.combine @ out
        assert self.token is not None
        return torch.zeros(tokens, out.shape[1], dtype=out.dtype, device=out.device).index_add(0, self.token, out)

    def upstream(self, of_tokens: Tensor) -> Tensor:
        """The gradient of y [T, D] -> that of each row's weighted answer [R, D]."""
        if self.combine is not None:
            return self.combine.T @ of_tokens
        assert self.token is not None
        return of_tokens[self.token]


def rows_of(x: Tensor, choice: Choice) -> Rows:
    """x [T, D] under a routing of its T tokens."""
    expert, weight = choice.ids.flatten(), choice.weights.flatten().to(x.dtype)
    if choice.dispatch is not None and choice.combine is not None:
        return Rows(choice.dispatch.to(x.dtype).T @ x, expert, weight, None, choice.combine.to(x.dtype))
    token = choice.token
    if token is None:
        token = torch.arange(len(x), device=x.device).repeat_interleave(choice.ids.shape[1])
    return Rows(x[token], expert, weight, token, None)


def aligned(found: Choice, wanted: Tensor, kept: Tensor) -> Choice:
    """The oracle's weights in the order of the harness's own picks.

    Args:
        found: the oracle's choice of n tokens, [n, K].
        wanted: int64 [n, K], the harness's picks before any dropping, -1 for none.
        kept: int64 [n, K], what each pick became: itself, -1, or another expert it was re-routed to.

    Returns:
        ids `kept`; weights 0 for a pick that the oracle did not make.
    """
    same = wanted.unsqueeze(2) == found.ids.unsqueeze(1)
    place = same.int().argmax(dim=2)
    weights = found.weights.gather(1, place) * (same.any(dim=2) & (wanted >= 0))
    return replace(found, ids=kept, weights=weights)
