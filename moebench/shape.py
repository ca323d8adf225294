"""From the layer axes of a suite to a LayerSpec: a model or a plain shape, and what overrides it. No torch.

Granularity m splits each expert into m: E*m experts of width F/m, K*m picks a
token, so that total and active parameters stay (DeepSeekMoE, arXiv 2401.06066).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from moebench.axes import CUSTOM, ROUTER_MODES
from moebench.catalogue.models import resolve_layer
from moebench.catalogue.routers import needed_picks, router_info
from moebench.catalogue.spec import LayerSpec, RouterSpec

PLAIN = ("hidden_size", "expert_ffn_size")
NEEDED_BY_PLAIN = ("hidden_size", "expert_ffn_size", "experts", "top_k")
DEFAULT_LIMIT = 10.0  # DeepSeek-V4's
# Routers whose groups limit what a token may choose; elsewhere groups are nodes or domains.
LIMITED = ("sigmoid_bias", "sqrt_softplus_bias", "softmax_bias", "group_limited", "group_limited_sum2",
           "hierarchical_noisy_topk")  # fmt: skip
PLACED = ("locality_bias", "domain_random")  # whose groups say where an expert is, not what may be chosen

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
    kind = axes.get("router") or (base.router.kind if base else RouterSpec.kind)
    router = _router(kind, base)
    layer = {
        "model": model,
        "hidden_size": base.hidden_size if base else axes["hidden_size"],
        "expert_ffn_size": ffn // split,
        "activation": axes.get("activation") or (base.activation if base else LayerSpec.activation),
        "experts": experts * split,
        "top_k": top_k * split,
        "granularity": split,
        "router": kind,
        "router_mode": axes.get("router_mode", ROUTER_MODES[router.training]),
        "groups": axes.get("groups", router.groups),
        "topk_groups": axes.get("topk_groups", min(router.topk_groups, axes.get("groups", router.groups))),
    }
    layer |= {"slots": axes.get("slots", router.slots), **_shared(axes, base, ffn)}
    if ffn % split:
        return f"granularity {split} does not divide expert_ffn_size {ffn}"
    return impossible(layer) or layer


def _shared(axes: Mapping[str, Any], base: LayerSpec | None, ffn: int) -> Layer:
    """The always-on experts: the preset's, or where only their form is named one as wide as a routed expert."""
    combine = axes.get("shared_combine") or (base.shared_combine if base else "none")
    own = base is not None and base.shared_experts > 0
    count = axes.get("shared_experts", base.shared_experts if base and own else int(combine != "none"))
    width = axes.get("shared_ffn_size", base.shared_ffn_size if base and own else ffn if count else 0)
    if "shared_combine" in axes and combine == "none":
        count = width = 0
    if count and combine == "none":
        combine = "add"
    return {"shared_combine": combine, "shared_experts": count, "shared_ffn_size": width}


def impossible(layer: Layer) -> str | None:
    """Why E experts and K picks cannot go together under the router, or None."""
    E, K, kind, groups = layer["experts"], layer["top_k"], layer["router"], layer["groups"]
    if K > E:
        return f"top_k {K} is more than {E} experts"
    shared = (layer["shared_experts"] > 0, layer["shared_ffn_size"] > 0, layer["shared_combine"] != "none")
    if len(set(shared)) > 1:
        return "shared_experts and shared_ffn_size are 0 where shared_combine is 'none', and only there"
    if layer["slots"] > 1 and kind != "soft_moe":
        return f"router {kind!r} has no slots"
    fixed = needed_picks(kind, E)
    if fixed is not None and fixed != K:
        return f"router {kind!r} picks {fixed}, not {K}"
    if layer["topk_groups"] > groups:
        return f"topk_groups {layer['topk_groups']} is more than {groups} groups"
    if groups == 1:
        return None
    if kind not in (*LIMITED, *PLACED):
        return f"router {kind!r} has no groups"
    if E % groups:
        return f"{E} experts do not fall into {groups} groups"
    if kind == "hierarchical_noisy_topk" and K % layer["topk_groups"]:
        return f"router {kind!r} picks as many of each of its {layer['topk_groups']} groups, and {K} does not divide"
    if kind in PLACED:
        return None
    reach = layer["topk_groups"] * E // groups
    return f"top_k {K} is more than the {reach} experts in {layer['topk_groups']} groups" if reach < K else None


def build(layer: Layer) -> tuple[str, LayerSpec]:
    """(label, LayerSpec); the label is "id", "id*" where the layer is not the preset's, or "custom".

    Another router than the preset's comes with its default parameters.
    """
    model = layer["model"]
    base = None if model == CUSTOM else preset(model)
    router = replace(
        _router(layer["router"], base),
        training=layer["router_mode"] == "training",
        groups=layer["groups"],
        topk_groups=layer["topk_groups"],
        slots=layer["slots"],
    )
    activation = layer["activation"]
    shape = {
        "activation": activation,
        "activation_limit": _limit(activation, base),
        "expert_ffn_size": layer["expert_ffn_size"],
        "routed_experts": layer["experts"],
        "top_k": layer["top_k"],
        "router": router,
        "shared_combine": layer["shared_combine"],
        "shared_experts": layer["shared_experts"],
        "shared_ffn_size": layer["shared_ffn_size"],
    }
    if (
        base is not None
        and base.shared_activation is not None
        and (activation != base.activation or not layer["shared_experts"])
    ):
        shape["shared_activation"] = None
    if base is None:
        return CUSTOM, LayerSpec(layer["hidden_size"], **shape)
    spec = replace(base, **shape)
    # Training is how a layer is used, not another layer.
    same = replace(spec, router=replace(router, training=base.router.training)) == base
    return (model if same else f"{model}*"), spec


def _router(kind: str, base: LayerSpec | None) -> RouterSpec:
    """The preset's own router, or another with its default parameters."""
    if base is not None and base.router.kind == kind:
        return base.router
    return RouterSpec(kind, **router_info(kind).defaults)


def _limit(activation: str, base: LayerSpec | None) -> float | None:
    if activation != "limited_swiglu":
        return None
    return base.activation_limit if base and base.activation_limit else DEFAULT_LIMIT


@cache
def preset(model: str) -> LayerSpec:
    """The layer of a published model."""
    return resolve_layer(model)[1].layer
