"""One draw of a problem's routing: by a traffic pattern, by the layer's own router, or by a trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moebench.catalogue.gate import VOCABULARY
from moebench.catalogue.routers import imposable, is_causal, router_info
from moebench.catalogue.spec import LayerSpec
from moebench.point import Capacity
from moebench.routing.capacity import apply_capacity, capacity_slots
from moebench.routing.forms import Routing, TopK, top_k_routing
from moebench.routing.logits import ORDERED, impose, steady
from moebench.routing.patterns import choose_experts
from moebench.routing.route import make_scores, route
from moebench.routing.scores import Scores, Side
from moebench.traffic import Traffic

SHAKE, ROUNDS = 1e-4, 8
LOGIT_SHAKE = 0.005  # about what rounding a hidden state to bfloat16 moves a logit


@dataclass(frozen=True)
class Demand:
    """What one draw asks of a router.

    Attributes:
        layer, traffic: of the problem.
        x: float32 [T, D], before any choice is imposed on it.
        gate: the gate's weights by name, float32.
        side: what else the router looks at.
        movable: whether x will be moved to the logits of the routing.
        seed: of everything random in this draw.
        trace_seed: where a trace's windows start, the same for all draws.
        draw: which of the rotating draws it is; a trace gives each another window.
    """

    layer: LayerSpec
    traffic: Traffic
    x: Tensor
    gate: Mapping[str, Tensor]
    side: Side
    movable: bool
    seed: int
    trace_seed: int = 0
    draw: int = 0


def route_problem(demand: Demand) -> Routing:
    """Dropless routing of T tokens. Its logits, where it has some, are those that x is to be moved to.

    Raises:
        ValueError: the traffic cannot be had with this layer, or a trace does not fit it; one line.
    """
    layer, traffic = demand.layer, demand.traffic
    if traffic.pattern == "router" or "token_ids" in router_info(layer.router.kind).side:
        routing = route(layer, make_scores(layer, demand.x, demand.gate, demand.side))
        return _settled(demand, routing.logits) if demand.movable and routing.logits is not None else routing
    ids, weights = _chosen(demand)
    if not imposable(layer.router):
        return top_k_routing(ids, weights, layer.routed_experts)
    return _settled(demand, _imposed(demand, ids))


def robust(layer: LayerSpec, x: Tensor, gate: Mapping[str, Tensor], side: Side, generator: torch.Generator) -> Tensor:
    """Hidden states of which no token's choice hangs on a rounding; those that do are drawn anew, up to ROUNDS times.

    For routers that x cannot be moved for and that look at each token alone: a choice stands if it is the same for x
    and for x shaken by SHAKE, a hundred times what float32 rounds.
    """
    for _ in range(ROUNDS):
        shaken = x + SHAKE * torch.randn(x.shape, generator=generator)
        found = [route(layer, make_scores(layer, each, gate, side)) for each in (x, shaken)]
        first, second = (routing.ids.sort(dim=1).values for routing in found if isinstance(routing, TopK))
        loose = (first != second).any(dim=1)
        if not bool(loose.any()):
            break
        x = x.clone()
        x[loose] = torch.randn(int(loose.sum()), x.shape[1], generator=generator)
    return x


def _chosen(demand: Demand) -> tuple[Tensor, Tensor]:
    """The traffic's ids [T, K], and weights for a router that cannot be made to choose them."""
    layer, tokens = demand.layer, len(demand.x)
    if demand.traffic.pattern == "trace":
        from moebench.routing.replay import replay

        path, at = str(Path(str(demand.traffic.path)).expanduser()), demand.traffic.trace_layer
        experts = layer.choices
        return replay(path, at, tokens, demand.draw, demand.trace_seed, layer.top_k, experts)
    generator = torch.Generator().manual_seed(demand.seed)
    choices = layer.choices
    grouped = (layer.router.groups, layer.router.topk_groups) if imposable(layer.router) else (1, 1)
    ids = choose_experts(demand.traffic, tokens, layer.top_k, choices, generator, *grouped)
    return ids, torch.softmax(torch.randn(ids.shape, generator=generator), dim=-1) * layer.router.scale


def _imposed(demand: Demand, ids: Tensor) -> Tensor:
    try:
        return impose(demand.layer, ids, demand.gate.get("selection_bias"), _generator(demand))
    except ValueError as error:  # a trace that reaches more groups than the layer may
        raise NotImplementedError(str(error)) from None


def _settled(demand: Demand, logits: Tensor) -> Routing:
    """The routing of these logits once every choice has its margin."""
    scores = _scores(demand, logits)

    def decided(z: Tensor) -> Routing:
        return route(demand.layer, replace(scores, logits=z))

    settled = steady(logits, decided)
    routing = decided(settled)
    if not isinstance(routing, TopK) or not is_causal(demand.layer.router, Capacity()):
        return routing
    # A token whose groups or picks still hang on a rounding gets logits that were made for the same picks.
    shaken = decided(settled + LOGIT_SHAKE * torch.randn(settled.shape, generator=_generator(demand)))
    assert isinstance(shaken, TopK)
    same = routing.ids == shaken.ids
    if demand.layer.top_k > ORDERED:
        same = routing.ids.sort(dim=1).values == shaken.ids.sort(dim=1).values
    loose = ~same.all(dim=1) & (routing.ids >= 0).all(dim=1)
    if bool(loose.any()):
        settled = settled.clone()
        settled[loose] = _imposed(demand, routing.ids[loose])
    return decided(settled)


def _generator(demand: Demand) -> torch.Generator:
    return torch.Generator().manual_seed(demand.seed)


def _scores(demand: Demand, logits: Tensor) -> Scores:
    """The router's scores with other logits: its biases and noise are its own."""
    return replace(make_scores(demand.layer, demand.x, demand.gate, demand.side), logits=logits)


def token_ids(traffic: Traffic, tokens: int, generator: torch.Generator) -> Tensor:
    """int64 [T] below VOCABULARY: the traffic of a router that looks at token ids is that of the ids themselves.

    `zipf:ALPHA` gives the r-th most frequent id a share ~ r^-ALPHA, as Zipf's law has it for words; else all are alike.
    """
    alpha = traffic.alpha or 0.0
    share = torch.arange(1, VOCABULARY + 1, dtype=torch.float64).pow(-alpha)
    frequent_first = torch.randperm(VOCABULARY, generator=generator)
    return frequent_first[torch.multinomial(share, tokens, replacement=True, generator=generator)]


def with_capacity(routing: Routing, capacity: Capacity) -> Routing:
    """The same routing under a capacity rule; Ragged and Mix have their own and stay as they are."""
    if not isinstance(routing, TopK):
        return routing
    tokens, top_k = routing.wanted_ids.shape
    slots = capacity_slots(capacity, tokens, top_k, routing.routed_experts)
    ids, weights = apply_capacity(
        routing.wanted_ids, routing.wanted_weights, slots, routing.routed_experts, capacity.order
    )
    return replace(routing, ids=ids, weights=weights)
