"""One draw of a problem's routing."""

from __future__ import annotations

import torch
from torch import Tensor

from moebench.catalogue.spec import LayerSpec
from moebench.routing.capacity import apply_capacity, capacity_slots
from moebench.routing.logits import impose_choice, widen_margin
from moebench.routing.patterns import choose_experts
from moebench.routing.routers import refuse_unbuilt, route
from moebench.routing.topk import TopK
from moebench.traffic import Traffic


def route_problem(layer: LayerSpec, traffic: Traffic, logits: Tensor | None, tokens: int, seed: int) -> TopK:
    """Dropless routing of T tokens.

    Args:
        logits: the layer's own logits of random hidden states, float32 [T, E], for traffic `router`; else None.
        seed: of everything random here.

    Raises:
        NotImplementedError: traffic `router` where the layer's router is not built.
    """
    generator = torch.Generator().manual_seed(seed)
    if traffic.pattern == "router":
        assert logits is not None
        ids, _ = route(layer, logits)
        return _from_logits(layer, widen_margin(logits, ids))
    ids = choose_experts(traffic, tokens, layer.top_k, layer.routed_experts, generator)
    try:
        refuse_unbuilt(layer.router)
    except NotImplementedError:
        # The experts alone do not need the router: ids and weights are given to them.
        weights = torch.softmax(torch.randn(ids.shape, generator=generator), dim=-1) * layer.router.scale
        return TopK(ids, weights, ids, weights, None, layer.routed_experts)
    return _from_logits(layer, impose_choice(ids, layer.routed_experts, generator))


def with_capacity(routing: TopK, capacity_factor: float | str) -> TopK:
    """The same routing under a capacity rule."""
    tokens, top_k = routing.wanted_ids.shape
    slots = capacity_slots(capacity_factor, tokens, top_k, routing.routed_experts)
    ids, weights = apply_capacity(routing.wanted_ids, routing.wanted_weights, slots, routing.routed_experts)
    return TopK(ids, weights, routing.wanted_ids, routing.wanted_weights, routing.logits, routing.routed_experts)


def _from_logits(layer: LayerSpec, logits: Tensor) -> TopK:
    ids, weights = route(layer, logits)
    return TopK(ids, weights, ids, weights, logits, layer.routed_experts)
