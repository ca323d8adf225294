"""The MoE layer of a config.json: the rules that families.csv names. No torch."""

from __future__ import annotations

from collections.abc import Callable

from moebench.catalogue.families import Family
from moebench.catalogue.spec import LayerSpec, RouterSpec
from moebench.catalogue.values import Values

GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_new": "geglu", "gelu_pytorch_tanh": "geglu"}
PLAIN = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu", "silu": "silu", "swish": "silu", "relu2": "relu2"}
CLAMP = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}  # clamped_swiglu has these, and no other

ROUTED_LIMIT = ("hy_v4", "hy_v4_vl_text")


def layer_of(family: Family, values: Values, hidden_size: int) -> LayerSpec:
    """The MoE layer a config.json describes, by the rules its family's row names.

    Raises:
        ValueError: an impossible value, or one that a LayerSpec cannot express.
    """
    experts = values.count(family.experts, least=2)
    picks = family.top_k.removeprefix("each ")
    top_k = values.same_count(picks) if picks != family.top_k else values.count(picks)
    if top_k > experts:
        raise values.fault(picks, top_k, f"at most the {experts} experts ({family.experts.split('|')[0]})")
    activation, limit = _activation(family, values)
    # Hy V4 clamps its routed experts only.
    unlimited = "swiglu" if limit is not None and family.model_type in ROUTED_LIMIT else None
    count, width, combine = _shared(family, values)
    return LayerSpec(
        hidden_size=hidden_size,
        expert_ffn_size=values.count(family.ffn),
        routed_experts=experts,
        top_k=top_k,
        activation=activation,
        activation_limit=limit,
        expert_bias=family.activation.split()[0].endswith("_biased"),
        router=_router(family, values, experts),
        shared_experts=count,
        shared_ffn_size=width,
        shared_combine=combine,
        shared_activation=unlimited if count else None,
    )


def _activation(family: Family, values: Values) -> tuple[str, float | None]:
    """The activation's name, and its limit where it has one of its own."""
    rule, _, key = family.activation.partition(" ")
    if rule == "limited":
        # No limit, or one of 0: both are how the makers' files leave it out.
        return ("limited_swiglu", values.number(key)) if values.raw(key) else ("swiglu", None)
    if rule.startswith("clamped"):
        for name, value in CLAMP.items():
            if values.number(name) != value:
                raise values.fault(name, values.raw(name), f"{value:g}")
        return "clamped_swiglu", None
    if rule == "swiglu":
        return "swiglu", None
    table = GATED if rule == "gated" else PLAIN
    name = values.text(key)
    if name not in table:
        raise values.fault(key, name, f"one of {', '.join(table)}")
    return table[name], None


def _shared(family: Family, values: Values) -> tuple[int, int, str]:
    rule, *keys = family.shared.split()
    biased = "use_bias" if family.model_type == "ernie4_5_moe" else "mlp_bias"
    if values.flag(biased):
        raise values.fault(biased, True, "false: biases in shared experts are not expressible here")
    if rule == "none":
        return 0, 0, "none"
    if rule in ("one", "gate"):
        width = values.optional_count(keys[0]) or 0
        combine = "sigmoid_gate" if rule == "gate" else "add"
        return (1, width, combine) if width else (0, 0, "none")
    count = values.optional_count(keys[0]) or 0
    if count and rule == "sum" and values.text("shared_expert_combination_strategy") != "sum":
        raise values.fault("shared_expert_combination_strategy", values.text("shared_expert_combination_strategy"),
                           "'sum'; an average is not expressible here")  # fmt: skip
    return (count, values.count(keys[1]), "add") if count else (0, 0, "none")


def _router(family: Family, values: Values, experts: int) -> RouterSpec:
    groups = values.optional_count("n_group|num_expert_group", 1) or 1
    topk_groups = values.optional_count("topk_group", 1) or 1
    if groups > 1 and (experts % groups or topk_groups > groups):
        raise values.fault("n_group", groups, f"a divisor of {experts} experts and at least topk_group {topk_groups}")
    rule, _, special = family.router.partition(" ")
    kind = _SPECIAL[special](values, groups) if rule == "by" else rule
    grouped = kind in ("sigmoid_bias", "group_limited", "group_limited_sum2")
    return RouterSpec(
        kind=kind,
        normalise=_normalise(family, values, kind),
        scale=_scale(family, values),
        groups=groups if grouped else 1,
        topk_groups=topk_groups if grouped else 1,
        logit_bias=family.activation == "clamped_biased" or _router_bias(family, values),
        zero_experts=(values.optional_count("zero_expert_num") or 0) if kind == "softmax_bias_zero" else 0,
    )


def _router_bias(family: Family, values: Values) -> bool:
    # LongCat's code makes the bias of this name and never adds it.
    return family.model_type != "longcat_flash" and values.flag("router_bias")


def _scale(family: Family, values: Values) -> float:
    rule, _, masked = family.scale.partition(" ")
    if rule != "kept":
        return 1.0 if not rule or values.raw(rule) is None else values.number(rule)
    # NLLB masks this share of the experts' outputs in training; its inference multiplies all of them by the rest.
    share = values.number(masked) if values.raw(masked) else 0.0
    if share >= 1:
        raise values.fault(masked, share, "a number under 1")
    return 1.0 - share


def _normalise(family: Family, values: Values, kind: str) -> bool:
    rule, _, key = family.normalise.partition(" ")
    if kind == "topk_softmax" or rule in ("yes", "no"):
        return kind == "topk_softmax" or rule == "yes"
    if rule != "p_norm":
        return values.flag(family.normalise)
    if values.raw(key) is not None and values.number(key) != 1.0:
        raise values.fault(key, values.raw(key), "1 or null")
    return values.raw(key) is not None


def _deepseek_v2(values: Values, groups: int) -> str:
    method = values.text("topk_method")
    if method not in ("greedy", "group_limited_greedy"):
        raise values.fault("topk_method", method, "'greedy' or 'group_limited_greedy'")
    return "softmax_topk" if method == "greedy" or groups == 1 else "group_limited"


def _mistral4(values: Values, groups: int) -> str:
    return "softmax_topk" if groups == 1 else "group_limited_sum2"


def _lfm2(values: Values, groups: int) -> str:
    return "sigmoid_bias" if values.flag("use_expert_bias") else "sigmoid_topk"


def _cohere2(values: Values, groups: int) -> str:
    function = values.text("expert_selection_fn")
    if function not in ("softmax", "sigmoid"):
        raise values.fault("expert_selection_fn", function, "'softmax' or 'sigmoid'")
    return "topk_softmax" if function == "softmax" else "sigmoid_topk"


def _laguna(values: Values, groups: int) -> str:
    if values.flag("moe_apply_router_weight_on_input"):
        raise values.fault("moe_apply_router_weight_on_input", True, "false")
    if values.raw("moe_router_logit_softcapping"):
        raise values.fault("moe_router_logit_softcapping", values.raw("moe_router_logit_softcapping"), "0")
    return "sigmoid_bias"


def _nllb(values: Values, groups: int) -> str:
    policy = values.text("second_expert_policy")
    if policy not in ("all", "random", "sampling"):
        raise values.fault("second_expert_policy", policy, "'all', 'random' or 'sampling'")
    return {"all": "softmax_topk", "random": "gshard_top2", "sampling": "gumbel_top2"}[policy]


def _deepseek_v4(values: Values, groups: int) -> str:
    scores = values.raw("scoring_func") or "sqrtsoftplus"
    if scores != "sqrtsoftplus":
        raise values.fault("scoring_func", scores, "'sqrtsoftplus'")
    return "sqrt_softplus_bias"


_SPECIAL: dict[str, Callable[[Values, int], str]] = {
    "deepseek_v2": _deepseek_v2,
    "deepseek_v4": _deepseek_v4,
    "mistral4": _mistral4,
    "lfm2": _lfm2,
    "cohere2": _cohere2,
    "laguna": _laguna,
    "nllb": _nllb,
}
