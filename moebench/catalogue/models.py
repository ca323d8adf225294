"""The published models (models.csv) as ModelSpecs. No torch.

The table's prose is mapped to names by the explicit tables below; what they do
not list is an error, never plain softmax.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType

from moebench.catalogue import published
from moebench.catalogue.names import nearest
from moebench.catalogue.spec import LayerSpec, ModelSpec, MoELayers, RouterSpec

LAYER_EXACT = ("layers", "hidden_size", "expert_ffn_size", "routed_experts", "top_k")
ALIASES = {"wizardlm-2-8x22b": "mixtral-8x22b", "deepseek-r1": "deepseek-v3"}

# models.csv `router` -> (kind, whether its logits have a bias).
ROUTER_KINDS = {
    "noisy top-k, two-level (k=2 at each level)": ("hierarchical_noisy_topk", False),
    "softmax; GShard top-2, second expert dispatched at random with probability 2*g2": ("gshard_top2", False),
    "softmax top-2 (GShard)": ("gshard_top2", False),
    "softmax top-2 (DeepSpeed)": ("gumbel_top2", False),
    "softmax top-2, all second experts kept": ("softmax_topk", False),
    'softmax top-2, second policy "all"; optional conditional MoE routing (CMR) gate': ("softmax_topk", False),
    "softmax; top-1 switch (gate value scales output)": ("switch_top1", False),
    # The released 32- and 64-expert configurations keep Tutel's linear gate, whose noise in training is V-MoE's; the
    # cosine ones are separate files.
    "softmax top-1, linear or cosine gate (Tutel)": ("noisy_softmax_topk", False),
    "noisy top-k (Gaussian noise std 1/E added to logits; softmax then top-k)": ("noisy_softmax_topk", False),
    # All three LLaMA-MoE models are of one released code, whose gate has two layers.
    "noisy top-k balanced gate": ("noisy_topk_tanh", False),
    "noisy top-k balanced gate (two-layer tanh gate network), softmax over the top-k": ("noisy_topk_tanh", False),
    "topk-then-softmax (equivalently softmax-then-topk renormalised)": ("topk_softmax", False),
    "topk-then-softmax (Mixtral style)": ("topk_softmax", False),
    "topk-then-softmax; router has a bias": ("topk_softmax", True),
    "softmax-then-topk": ("softmax_topk", False),
    "softmax-then-topk (router in fp32)": ("softmax_topk", False),
    "softmax-then-topk (ST-MoE)": ("softmax_topk", False),
    "softmax-then-topk, weights normalised by p=1 norm": ("softmax_topk", False),
    "softmax-then-topk; shared expert gated": ("softmax_topk", False),
    "softmax-then-topk; shared expert gated by sigmoid": ("softmax_topk", False),
    "softmax-then-topk; router logits soft-capped at 30": ("softcap_softmax_topk", False),
    "softmax; group-limited (device-limited) top-k, group score = max": ("group_limited", False),
    "softmax top-1; tokens over capacity are re-routed to random non-full experts (recycle routing)": (
        "recycle_top1",
        False,
    ),
    "sigmoid+bias": ("sigmoid_bias", False),
    "sigmoid+bias (bias only for selection)": ("sigmoid_bias", False),
    "sigmoid+bias (bias only for selection); node-limited, group score = sum of two best": ("sigmoid_bias", False),
    "sqrt-softplus+bias; first 3 layers hash-routed by token id": ("sqrt_softplus_bias", False),
    "top-1 on logits then sigmoid; weight multiplies the expert input": ("sigmoid_input", False),
    "logits standardised (lambda (z-mu)/sigma, lambda=1), softmax, top-2": ("logit_standardised", False),
    "SparseMixer-v2 top-2 (masked softmax per pick, jitter 0.01)": ("sparsemixer", False),
    "attention router: P = softmax(Q K^T) V over experts, top-2 of P": ("attention", False),
}
ACTIVATION_NAMES = {
    "swiglu": "swiglu",
    "geglu": "geglu",
    "relu": "relu",
    "gelu": "gelu",
    "clamped swiglu (limit 7, with +1 on the linear branch)": "clamped_swiglu",
    "clamped swiglu (limit 10)": "limited_swiglu",
}
ACTIVATION_LIMITS = {"clamped swiglu (limit 10)": 10.0}
# How the shared expert joins, for every row that has one.
SHARED_FORMS = {
    "grok-2": "scaled_residual",
    "arctic-480b": "parallel",
    "openmoe-8b": "residual",
    "openmoe-34b": "residual",
    "qwen1.5-moe-a2.7b": "sigmoid_gate",
    "qwen2-57b-a14b": "sigmoid_gate",
    "qwen3-next-80b-a3b": "sigmoid_gate",
    "deepseekmoe-16b": "add",
    "deepseekmoe-145b": "add",
    "deepseek-v2-lite": "add",
    "deepseek-v2": "add",
    "deepseek-v3": "add",
    "deepseek-r1": "add",
    "deepseek-v4-flash": "add",
    "deepseek-v4-pro": "add",
    "llama4-scout": "add",
    "llama4-maverick": "add",
    "kimi-k2": "add",
    "glm-4.5": "add",
    "glm-4.5-air": "add",
    "glm-5": "add",
    "hunyuan-large": "add",
}
# Rows whose experts carry biases, as their released code has them.
EXPERT_BIASES = (
    "gpt-oss-20b", "gpt-oss-120b", "nllb-moe-54b", "meta-moe-1.1t", "v-moe-b16", "v-moe-l16", "v-moe-h14",
    "swin-moe-s-64", "swin-moe-b-32", "moe-llava-phi2",
)  # fmt: skip
# The table leaves these open. Weights keep the softmax values: OpenMoE trains in flaxformer, whose token-choice
# router does not renormalise; Yuan's rule is a softmax over its picks anyway. Skywork's report leaves it open, and the
# port of its model in serving code divides by the sum.
NORMALISE_OPEN = {"openmoe-8b": False, "openmoe-34b": False, "skywork-moe-146b": True, "yuan2-m32": False}
# Scales the table does not give. NLLB masked a fifth of its experts' outputs in training; its inference multiplies all
# of them by the rest.
SCALES = {"nllb-moe-54b": 0.8}
# Swin-MoE: experts of 4 x the stage's width, in every second of 18 blocks of stage 3 and one block of stage 4.
SWIN_STAGES = {
    "swin-moe-s-64": (("stage3", 384, 9), ("stage4", 768, 1)),
    "swin-moe-b-32": (("stage3", 512, 9), ("stage4", 1024, 1)),
}
HASH_LAYERS = {"deepseek-v4-flash": 3, "deepseek-v4-pro": 3}


@cache
def models() -> Mapping[str, ModelSpec]:
    """Every row of models.csv by id, in the table's order, the undisclosed ones included."""
    return MappingProxyType({row["id"]: _model(row) for row in table()})


@cache
def table() -> tuple[Mapping[str, str], ...]:
    """The rows of models.csv as text."""
    text = files("moebench.catalogue").joinpath("models.csv").read_text(encoding="utf-8")
    return tuple(MappingProxyType(row) for row in csv.DictReader(text.splitlines()))


def model(name: str) -> ModelSpec:
    """The model called `name`.

    Raises:
        ValueError: no such model; the nearest names are given.
    """
    try:
        return models()[name]
    except KeyError:
        raise ValueError(f"unknown model {name!r}{nearest(name, models())}; `list models` shows all") from None


def resolve_layer(name: str) -> tuple[ModelSpec, MoELayers]:
    """The MoE layer called `name`: "id", or "id:kind" where a model has several kinds.

    Raises:
        ValueError: unknown model or kind, several kinds and none named, or a model not known to the layer.
    """
    identity, _, kind = name.partition(":")
    spec = model(identity)
    if spec.unavailable:
        raise ValueError(f"model {identity!r} has no layer to run: {spec.unavailable}")
    kinds = {layers.name: layers for layers in spec.layers}
    if kind in kinds:
        return spec, kinds[kind]
    if len(kinds) == 1:
        raise ValueError(f"model {identity!r} has one kind of MoE layer; write {identity!r}, not {name!r}")
    several = ", ".join(f"{identity}:{each}" for each in kinds)
    if kind:
        raise ValueError(f"model {identity!r} has no layer kind {kind!r}{nearest(kind, kinds)}; it has {several}")
    raise ValueError(f"model {identity!r} has several kinds of MoE layer; name one of {several}")


def _model(row: Mapping[str, str]) -> ModelSpec:
    exact = all(row[column] for column in LAYER_EXACT)
    layers = _layers(row) if exact else ()
    counted = published.parts(row, layers) if exact else None
    return ModelSpec(
        id=row["id"],
        title=row["name"],
        year=int(row["year"]) if row["year"] else None,
        layers=layers,
        computed_total=counted.total if counted else None,
        computed_active=counted.active if counted and row["id"] not in published.NO_ACTIVE else None,
        published_total=_billions(row["total_params_B"]),
        published_active=_billions(row["active_params_B"]),
        alias_of=ALIASES.get(row["id"]),
        unavailable=None if exact else _unavailable(row),
        uncounted=_uncounted(row["id"]),
        source=row["source"],
        notes=row["notes"],
    )


def _billions(text: str) -> float | None:
    return float(text) * 1e9 if text else None


def _uncounted(identity: str) -> str | None:
    if identity in published.LEFT_OUT:
        return f"not counted: {published.LEFT_OUT[identity]}"
    return published.UNCOUNTED.get(identity)


def _unavailable(row: Mapping[str, str]) -> str:
    unknown = [column for column in LAYER_EXACT if not row[column]]
    reason = f"{row['status']}; not known: {', '.join(unknown)}"
    return f"{reason}. {row['notes']}" if row["notes"] else reason


def _layers(row: Mapping[str, str]) -> tuple[MoELayers, ...]:
    if row["id"] in SWIN_STAGES:
        stages = SWIN_STAGES[row["id"]]
        return tuple(
            MoELayers(name, _layer(row, _router(row), hidden_size=width, expert_ffn_size=4 * width), count)
            for name, width, count in stages
        )
    layer = _layer(row, _router(row))
    count = int(row["moe_layers"])
    if row["id"] in HASH_LAYERS:
        hashed = _layer(row, RouterSpec("hash_sqrt_softplus", normalise=True, scale=layer.router.scale))
        first = HASH_LAYERS[row["id"]]
        return (MoELayers("hash", hashed, first), MoELayers("learned", layer, count - first))
    return (MoELayers("", layer, count),)


def _layer(
    row: Mapping[str, str], router: RouterSpec, hidden_size: int | None = None, expert_ffn_size: int | None = None
) -> LayerSpec:
    shared_experts = int(row["shared_experts"] or 0)
    return LayerSpec(
        hidden_size=hidden_size or int(row["hidden_size"]),
        expert_ffn_size=expert_ffn_size or int(row["expert_ffn_size"]),
        routed_experts=int(row["routed_experts"]),
        top_k=int(row["top_k"]),
        activation=ACTIVATION_NAMES[row["expert_activation"]],
        activation_limit=ACTIVATION_LIMITS.get(row["expert_activation"]),
        expert_bias=row["id"] in EXPERT_BIASES,
        router=router,
        shared_experts=shared_experts,
        shared_ffn_size=int(row["shared_expert_ffn_size"] or 0),
        shared_combine=SHARED_FORMS[row["id"]] if shared_experts else "none",
    )


def _router(row: Mapping[str, str]) -> RouterSpec:
    kind, logit_bias = ROUTER_KINDS[row["router"]]
    normalise = {"y": True, "n": False}.get(row["normalise_topk"])
    if normalise is None and row["id"] not in NORMALISE_OPEN:
        raise KeyError(f"models.csv: {row['id']} does not say whether its weights are normalised")
    return RouterSpec(
        kind=kind,
        normalise=NORMALISE_OPEN[row["id"]] if normalise is None else normalise,
        scale=float(row["routed_scaling_factor"] or SCALES.get(row["id"], 1.0)),
        groups=int(row["routing_groups"] or 1),
        topk_groups=int(row["topk_groups"] or 1),
        logit_bias=logit_bias,
    )
