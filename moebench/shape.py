"""From the layer axes of a suite to a LayerSpec: a model or a plain shape, and what overrides it. No torch.

Granularity m splits each expert into m: E*m experts of width F/m, K*m picks a
token, so that total and active parameters stay (DeepSeekMoE, arXiv 2401.06066).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from moebench.axes import CUSTOM
from moebench.catalogue.models import resolve_layer
from moebench.catalogue.spec import LayerSpec, RouterSpec

PLAIN = ("hidden_size", "expert_ffn_size")
NEEDED_BY_PLAIN = ("hidden_size", "expert_ffn_size", "experts", "top_k")
# Rules that are defined for one number of picks only.
FIXED_TOP_K = {"switch_top1": 1, "recycle_top1": 1, "sigmoid_input": 1, "gshard_top2": 2}

Layer = dict[str, Any]


def effective(axes: Mapping[str, Any]) -> Layer | str:
    """The layer axes with every value filled in, overrides and granularity applied; or why there is no such layer.

    Kept apart from `build`, since a large grid asks for many more shapes than it keeps.
    """
    model = axes.get("model", CUSTOM)
    base = None if model == CUSTOM else preset(model)
    split = axes.get("granularity", 1)
    experts = axes.get("experts") or base.routed_experts  # type: ignore[union-attr]  # a plain shape names its experts
    top_k = axes.get("top_k") or base.top_k  # type: ignore[union-attr]
    ffn = base.expert_ffn_size if base else axes["expert_ffn_size"]
    layer = {
        "model": model,
        "hidden_size": base.hidden_size if base else axes["hidden_size"],
        "expert_ffn_size": ffn // split,
        "activation": axes.get("activation") or (base.activation if base else LayerSpec.activation),
        "experts": experts * split,
        "top_k": top_k * split,
        "granularity": split,
        "router": axes.get("router") or (base.router.kind if base else RouterSpec.kind),
    }
    if ffn % split:
        return f"granularity {split} does not divide expert_ffn_size {ffn}"
    return impossible(layer, base.router if base else None) or layer


def impossible(layer: Layer, router: RouterSpec | None) -> str | None:
    """Why E experts and K picks cannot go together under the router, or None."""
    E, K, kind = layer["experts"], layer["top_k"], layer["router"]
    if K > E:
        return f"top_k {K} is more than {E} experts"
    fixed = FIXED_TOP_K.get(kind, K)
    if fixed != K:
        return f"router {kind!r} picks {fixed}, not {K}"
    if router is None or router.kind != kind or router.groups == 1:
        return None
    if E % router.groups:
        return f"{E} experts do not fall into the {router.groups} groups of {layer['model']}"
    reach = router.topk_groups * E // router.groups
    return f"top_k {K} is more than the {reach} experts in {router.topk_groups} groups" if reach < K else None


def build(layer: Layer) -> tuple[str, LayerSpec]:
    """(label, LayerSpec); the label is "id", "id*" where the layer is not the preset's, or "custom".

    Another router than the preset's comes with its default parameters.
    """
    shape = {
        "activation": layer["activation"],
        "expert_ffn_size": layer["expert_ffn_size"],
        "routed_experts": layer["experts"],
        "top_k": layer["top_k"],
    }
    model, kind = layer["model"], layer["router"]
    if model == CUSTOM:
        router = RouterSpec(kind=kind)
        return CUSTOM, LayerSpec(layer["hidden_size"], router=router, **shape)
    base = preset(model)
    router = base.router if base.router.kind == kind else RouterSpec(kind=kind)
    spec = replace(base, router=router, **shape)
    return (model if spec == base else f"{model}*"), spec


@cache
def preset(model: str) -> LayerSpec:
    """The layer of a published model."""
    return resolve_layer(model)[1].layer
