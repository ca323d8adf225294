"""From logits to ids and weights: one function a rule. Logits are float32 [T, E]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moebench.catalogue.routers import ROUTERS
from moebench.catalogue.spec import LayerSpec, RouterSpec


def route(layer: LayerSpec, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's own router.

    Args:
        logits: [T, E], any float dtype; computed in float32 as the models do.

    Returns:
        ids int64 [T, K] in order of selection, weights float32 [T, K].

    Raises:
        NotImplementedError: the router is not built; it is named, never replaced.
    """
    spec = layer.router
    refuse_unbuilt(spec)
    return _RULES[spec.kind](logits.float(), layer.top_k, spec)


def refuse_unbuilt(spec: RouterSpec) -> None:
    """Raise NotImplementedError naming what of the router is not built."""
    if spec.kind not in _RULES:
        rule = ROUTERS[spec.kind].rule if spec.kind in ROUTERS else "unknown"
        raise NotImplementedError(f"router {spec.kind!r} is not built yet ({rule})")
    if spec.groups > 1:
        raise NotImplementedError(f"router {spec.kind!r} with {spec.groups} groups is not built yet")
    if spec.logit_bias:
        raise NotImplementedError(f"router {spec.kind!r} with a bias on its logits is not built yet")


def _softmax_topk(logits: Tensor, top_k: int, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    weights, ids = torch.softmax(logits, dim=-1).topk(top_k, dim=-1)
    if spec.normalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return ids, weights * spec.scale


def _topk_softmax(logits: Tensor, top_k: int, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    chosen, ids = logits.topk(top_k, dim=-1)
    return ids, torch.softmax(chosen, dim=-1) * spec.scale


_RULES: dict[str, Callable[[Tensor, int, RouterSpec], tuple[Tensor, Tensor]]] = {
    "softmax_topk": _softmax_topk,
    "topk_softmax": _topk_softmax,
    "switch_top1": _softmax_topk,  # Switch is softmax -> top-1 without renormalisation
}
BUILT = tuple(_RULES)
