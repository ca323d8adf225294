"""Route: from hidden states to Scores to a Routing, by the functions that the catalogue's table names for a router."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor

from moebench.catalogue.routers import is_file, needed_picks, router_info
from moebench.catalogue.spec import LayerSpec
from moebench.routing.fixed import check_lookup
from moebench.routing.forms import Routing, TopK, top_k_routing
from moebench.routing.scores import Scores, Side, wide
from moebench.user_file import function_in_file, one_line

BOUND = 1e30  # logits beyond count as this; squares and differences of larger ones would overflow float32


def make_scores(layer: LayerSpec, x: Tensor, gate: Mapping[str, Tensor], side: Side | None = None) -> Scores:
    """What the layer's router looks at.

    Args:
        x: [T, D].
        gate: its weights by name, as `moebench.catalogue.gate.gate_shapes` says.
        side: token ids, domains, context, noise, where the router needs them.
    """
    scores: Scores = _function(router_info(layer.router.kind).make)(layer.router, x, gate, side or Side())
    return scores


def decide(layer: LayerSpec, scores: Scores) -> Routing:
    """The layer's own router, unchecked: what is timed."""
    kind = layer.router.kind
    if is_file(kind):
        return _users(kind, scores.logits, layer.top_k)
    routing: Routing = _function(router_info(kind).rule)(scores, layer.router, layer.top_k)
    return routing


def _users(kind: str, logits: Tensor, top_k: int) -> Routing:
    """A user's function f(logits [T, E], top_k) -> ids int64 [T, K], weights [T, K]."""
    try:
        found = function_in_file(kind)(logits, top_k)
    except (Exception, SystemExit) as error:
        raise ValueError(f"router {kind}: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(found, tuple) or len(found) != 2 or not all(isinstance(value, Tensor) for value in found):
        raise ValueError(f"router {kind}: returned a {type(found).__name__}; expected two tensors, ids and weights")
    ids, weights = found
    wanted = [len(logits), top_k]
    if [*ids.shape] != wanted or [*weights.shape] != wanted:
        raise ValueError(f"router {kind}: returned shapes {[*ids.shape]} and {[*weights.shape]}, not {wanted}")
    if ids.is_floating_point() or not weights.is_floating_point():
        raise ValueError(
            f"router {kind}: returned {ids.dtype} ids and {weights.dtype} weights; not integers and floats"
        )
    return top_k_routing(ids.long(), weights, logits.shape[1], logits)


def _check_users(layer: LayerSpec, routing: Routing) -> None:
    """What the experts rely on, of a function that nobody has tested."""
    assert isinstance(routing, TopK)
    kind, E, ids = layer.router.kind, layer.routed_experts, routing.ids
    if bool(((ids < 0) | (ids >= E)).any()):
        raise ValueError(f"router {kind}: an id is not among 0 to {E - 1}")
    if bool((ids.sort(dim=1).values.diff(dim=1) == 0).any()):
        raise ValueError(f"router {kind}: a token has an expert twice")
    if not bool((routing.weights.isfinite() & (routing.weights >= 0)).all()):
        raise ValueError(f"router {kind}: a weight is negative, infinite or NaN")


def route(layer: LayerSpec, scores: Scores | Tensor) -> Routing:
    """The layer's own router, its input checked first (which waits for a GPU).

    Args:
        scores: or logits alone, [T, E], any float dtype; decided on in float32 or float64.

    Raises:
        ValueError: NaN, a wrong shape, or parameters that do not fit each other; one line.
    """
    given = Scores(scores) if isinstance(scores, Tensor) else scores
    _check(layer, given)
    logits = wide(given.logits).clamp(-BOUND, BOUND)
    if not is_file(layer.router.kind):
        return decide(layer, replace(given, logits=logits))
    # A user's function may mask its logits in place: these are still needed.
    routing = replace(decide(layer, replace(given, logits=logits.clone())), logits=logits)
    _check_users(layer, routing)
    return routing


def _check(layer: LayerSpec, scores: Scores) -> None:
    kind, spec, E = layer.router.kind, layer.router, layer.choices
    info = router_info(kind)
    columns = E * spec.slots if info.form == "Mix" else E
    if scores.logits.dim() != 2 or scores.logits.shape[1] != columns:
        raise ValueError(f"router {kind!r}: logits of shape {list(scores.logits.shape)}; expected [T, {columns}]")
    if not scores.logits.is_floating_point():
        raise ValueError(f"router {kind!r}: logits are {scores.logits.dtype}; expected a float dtype")
    broken = int(scores.logits.isnan().any(dim=1).sum())
    if broken:
        raise ValueError(f"router {kind!r}: the logits of {broken} of {len(scores.logits)} tokens hold NaN")
    if info.side:
        check_lookup(scores, spec, layer.top_k)
    picks = needed_picks(kind, E)
    if picks is not None and layer.top_k != picks:
        raise ValueError(f"router {kind!r} picks {picks}, not {layer.top_k}")
    if E % spec.groups or not 1 <= spec.topk_groups <= spec.groups:
        chosen = f"{spec.topk_groups} of {spec.groups} groups"
        raise ValueError(f"router {kind!r}: {chosen} do not fit {E} experts; groups divide them, and are enough")
    if info.noise and spec.training and scores.side.noise is None:
        raise ValueError(f"router {kind!r} draws noise in training, and none was given")


def side_width(layer: LayerSpec) -> int:
    """Columns of noise the router takes in training; 0 for none."""
    if not (layer.router.training and router_info(layer.router.kind).noise):
        return 0
    from moebench.routing.noisy import noise_width

    return noise_width(layer.router, layer.routed_experts, layer.hidden_size)


@cache
def _function(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(f"moebench.routing.{module}"), name)
    return found
