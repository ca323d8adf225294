"""Workload: the inputs of a problem, in rotating static buffers: hidden states and a routing that agree."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from moebench.catalogue.gate import CONTEXT_WIDTH, WELL_CONDITIONED
from moebench.catalogue.routers import imposable, is_causal, router_info
from moebench.catalogue.spec import LayerSpec
from moebench.point import DRAWS, Capacity, Problem, base_precision
from moebench.routing.build import Demand, robust, route_problem, token_ids, with_capacity
from moebench.routing.forms import Mix, Ragged, Routing
from moebench.routing.logits import impose_logits
from moebench.routing.route import side_width
from moebench.routing.scores import NO_SIDE, Side
from moebench.traffic import Traffic, parse_traffic
from moebench.weights import DTYPES, Weights, normal, seed_of

MOVED_TOKENS = 4096  # moved to their logits at a time


@dataclass(frozen=True)
class Choice:
    """A routing as experts take it: rows, the expert of each, and how the rows become tokens again.

    Attributes:
        ids: int64 [T, K] of a TopK, -1 where dropped; [N, 1] of a Ragged; [S, 1] of a Mix.
        weights: float32, like ids; 0 where dropped, 1 for a Mix.
        token: int64 [N] of a Ragged, the token of each row; else None.
        dispatch, combine: float32 [T, S] of a Mix; else None.
    """

    ids: Tensor
    weights: Tensor
    token: Tensor | None = None
    dispatch: Tensor | None = None
    combine: Tensor | None = None


def choice_of(routing: Routing) -> Choice:
    """A routing of any form as experts take it."""
    if isinstance(routing, Ragged):
        return Choice(routing.expert.unsqueeze(1), routing.weight.unsqueeze(1), token=routing.token)
    if isinstance(routing, Mix):
        ids = routing.slot_expert.unsqueeze(1)
        ones = torch.ones(ids.shape, dtype=routing.dispatch.dtype, device=ids.device)
        return Choice(ids, ones, dispatch=routing.dispatch, combine=routing.combine)
    return Choice(routing.ids, routing.weights)


@dataclass
class Inputs:
    """One draw. The buffers are static; the harness refills them in place.

    Attributes:
        x: [T, D].
        ids, weights, token, dispatch, combine: the routing, as in `Choice`.
        upstream: [T, D], the gradient of the output, or None for forward.
        dense_x: [T, D], what the dense FFN of a `parallel` shared form takes instead of x.
        token_ids, domains, context, noise: what else the router looks at, as in `Side`.
    """

    x: Tensor
    ids: Tensor
    weights: Tensor
    upstream: Tensor | None = None
    token: Tensor | None = None
    dispatch: Tensor | None = None
    combine: Tensor | None = None
    dense_x: Tensor | None = None
    token_ids: Tensor | None = None
    domains: Tensor | None = None
    context: Tensor | None = None
    noise: Tensor | None = None

    @property
    def choice(self) -> Choice:
        """The routing that is given."""
        return Choice(**{each.name: getattr(self, each.name) for each in fields(Choice)})

    @property
    def side(self) -> Side:
        """What else the router looks at."""
        return Side(**{each.name: getattr(self, each.name) for each in fields(Side)})

    def tensors(self) -> dict[str, Tensor]:
        """Those that exist, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def refill(self, other: Inputs) -> None:
        """Copy another draw's values into these buffers."""
        for name, value in self.tensors().items():
            value.copy_(getattr(other, name))

    def clone(self) -> Inputs:
        """The same values in buffers of their own."""
        return Inputs(**{name: value.clone() for name, value in self.tensors().items()})


@dataclass(frozen=True)
class Draw:
    """One draw of a problem before any capacity rule.

    Hidden states lie where the weights do: each arm copies them several times, which from the host takes seconds.

    Attributes:
        x: [T, D] in the weights' dtype.
        routing: dropless, on the CPU.
        upstream: [T, D] likewise, or None for forward.
        side: what else the router looks at, on the CPU.
        dense_x: [T, D] likewise, or None.
    """

    x: Tensor
    routing: Routing
    upstream: Tensor | None = None
    side: Side = NO_SIDE
    dense_x: Tensor | None = None


def make_draws(problem: Problem, weights: Weights) -> tuple[Draw, ...]:
    """The draws that rotate and the check's own; routings of any number of rows are padded to the largest of them."""
    draws = [make_draw(problem, weights, index) for index in range(DRAWS + 1)]
    rows = [len(draw.routing.token) for draw in draws if isinstance(draw.routing, Ragged)]
    return tuple(replace(draw, routing=_padded(draw.routing, max(rows, default=0))) for draw in draws)


def _padded(routing: Routing, rows: int) -> Routing:
    """Static buffers hold one number of rows: what is missing goes to no expert."""
    if not isinstance(routing, Ragged) or len(routing.token) == rows:
        return routing
    left = (rows - len(routing.token),)
    return replace(
        routing,
        token=torch.cat([routing.token, routing.token.new_full(left, routing.tokens - 1)]),
        expert=torch.cat([routing.expert, routing.expert.new_full(left, -1)]),
        weight=torch.cat([routing.weight, routing.weight.new_zeros(left)]),
    )


def make_draw(problem: Problem, weights: Weights, index: int) -> Draw:
    """Hidden states and routing that agree with each other.

    Args:
        weights: of the layer, in the precision they will be used in.
        index: 0..DRAWS-1 are timed; DRAWS is the check's own.

    Raises:
        ValueError: the traffic cannot be had with this layer.
    """
    layer, traffic = problem.layer, parse_traffic(problem.traffic)
    generator = torch.Generator().manual_seed(seed_of(problem.seed, "inputs", index))
    shape = (problem.tokens, layer.hidden_size)
    x = normal(shape, generator)
    side = _draw_side(layer, traffic, problem.tokens, generator)
    dense_x = normal(shape, generator) if layer.shared_combine == "parallel" else None
    upstream = normal(shape, generator) if problem.direction == "forward_backward" else None
    gate = {name: _on_host(value) for name, value in weights.whole_gate.items()}
    if _loose(layer):
        x = robust(layer, x, gate, side, generator)
    seed = seed_of(problem.seed, "routing", index)
    movable = can_impose(layer)
    routing = route_problem(Demand(layer, traffic, x, gate, side, movable, seed, problem.seed, index))
    like = weights.router
    if movable and routing.logits is not None:
        x = _moved(x, like, routing.logits - gate.get("logit_bias", torch.zeros(())))
    upstream, dense_x = (None if value is None else value.to(like) for value in (upstream, dense_x))
    return Draw(x.to(like), routing, upstream, side, dense_x)


def _moved(x: Tensor, router: Tensor, logits: Tensor) -> Tensor:
    """x where the router gives these logits, on its device and in its dtype.

    Some tokens at a time: in float64 all of them are gigabytes, and a minute of a host's time.
    """
    device, parts = router.device, zip(x.split(MOVED_TOKENS), logits.split(MOVED_TOKENS), strict=True)
    return torch.cat([impose_logits(some.to(device), router, z.to(device)).to(router.dtype) for some, z in parts])


def _loose(layer: LayerSpec) -> bool:
    """Whether near ties of the router's choice can be drawn again, and not settled by moving x."""
    info = router_info(layer.router.kind)
    alone = is_causal(layer.router, Capacity())
    return alone and info.form == "TopK" and not can_impose(layer) and not info.side


def _draw_side(layer: LayerSpec, traffic: Traffic, tokens: int, generator: torch.Generator) -> Side:
    wants, columns = router_info(layer.router.kind).side, side_width(layer)
    return Side(
        token_ids=token_ids(traffic, tokens, generator) if "token_ids" in wants else None,
        domains=torch.randint(layer.router.groups, (tokens,), generator=generator) if "domains" in wants else None,
        context=torch.randn(tokens, CONTEXT_WIDTH, generator=generator) if "context" in wants else None,
        noise=torch.rand(tokens, columns, generator=generator) if columns else None,
    )


def _on_host(value: Tensor) -> Tensor:
    value = value.detach().cpu()
    return value.float() if value.is_floating_point() else value


def can_impose(layer: LayerSpec) -> bool:
    """Whether hidden states can be moved so that the layer's router makes chosen choices."""
    choices = layer.choices
    return imposable(layer.router) and choices <= WELL_CONDITIONED * layer.hidden_size


def make_inputs(draw: Draw, capacity: Capacity, precision: str, device: str, *, backward: bool) -> Inputs:
    """The draw as a variant sees it, in memory of its own: rounded to its precision, under its capacity rule."""
    # Copied even where nothing has to be converted: the check overwrites its inputs, and a provider may.
    dtype = DTYPES[base_precision(precision)]
    choice, side = choice_of(with_capacity(draw.routing, capacity)), draw.side
    given = {name: value.to(device, copy=True) for name, value in vars(choice).items() if value is not None}
    given |= {name: value.to(device, copy=True) for name, value in side.tensors().items()}
    return Inputs(
        x=draw.x.to(device, dtype, copy=True),
        upstream=_copied(draw.upstream, device, dtype) if backward else None,
        dense_x=_copied(draw.dense_x, device, dtype),
        **given,
    )


def _copied(value: Tensor | None, device: str, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(device, dtype, copy=True)
