"""Every router moebench knows: one row each, and where its code lives. No torch.

`make` and `rule` name functions in `moebench.routing`: hidden states -> Scores, and Scores -> Routing. Both are
imported when the router is first used, so this table can be listed without torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moebench.catalogue.spec import RouterSpec
    from moebench.point import Capacity


@dataclass(frozen=True)
class RouterInfo:
    """One router.

    Attributes:
        summary: the rule in a line, z being the logits.
        source: the paper or model it comes from.
        rule: "module:function" in `moebench.routing`, from Scores to a Routing.
        make: the same, from hidden states to Scores.
        balance: what keeps its experts evenly loaded.
        capacity: its own word on capacity; "" where the point's capacity rule applies.
        published: the capacity rule it was published with, where the point's applies.
        causal: "yes", "no", or "inference": whether a token's route ignores later tokens.
        form: the Routing it gives.
        weights: what a token's weights sum to: "1", "scale" (the router's scale), "free".
        imposable: whether chosen logits can be had by moving x (z = W x and nothing else).
        picks: the one top_k it is defined for; "all" is E; None: any.
        gate: further weights of its gate by name (`moebench.catalogue.gate` gives their shapes).
        side: what it looks at beside the hidden states.
        noise: whether training draws noise.
        defaults: parameters of RouterSpec where a suite only names the router.
    """

    summary: str
    source: str
    rule: str
    make: str = "scores:linear"
    balance: str = "auxiliary loss"
    capacity: str = ""
    published: str = ""
    causal: str = "yes"
    form: str = "TopK"
    weights: str = "free"
    imposable: bool = True
    picks: int | str | None = None
    gate: tuple[str, ...] = ()
    side: tuple[str, ...] = ()
    noise: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)


_RENORMALISED: dict[str, Any] = {"normalise": True}
_GROUPED: dict[str, Any] = {"groups": 4, "topk_groups": 2}
_NONE = "none"
_BIAS = "bias update (no auxiliary loss)"
_NOISY = "importance and load losses"

ROUTERS: dict[str, RouterInfo] = {
    # Token choice: scores of linear logits, then top-k.
    "softmax_topk": RouterInfo(
        "top-k of softmax(z); weights are the selected values, renormalised if asked", "OLMoE, Qwen, DBRX",
        "scored:softmax_topk",
    ),
    "topk_softmax": RouterInfo(
        "softmax over the k largest z", "Mixtral, arXiv 2401.04088; gpt-oss", "scored:topk_softmax", weights="scale"
    ),
    "dense_softmax": RouterInfo(
        "softmax(z) over all experts, all of them run", "Jacobs 1991; EvoMoE, DS-MoE", "scored:softmax_topk",
        balance=_NONE, weights="scale", picks="all",
    ),
    "switch_top1": RouterInfo(
        "top-1 of softmax(z); its value scales the output; in training x is jittered by U(0.99, 1.01)",
        "Switch, arXiv 2101.03961", "scored:softmax_topk", make="noisy:jittered", picks=1, noise=True,
        published="ceil(CF T/E), CF 1.25 in training, 2 in evaluation",
    ),
    "gshard_top2": RouterInfo(
        "top-2 of softmax(z), renormalised over the pair; in training the second is kept if 2 g2 > U(0,1)",
        "GShard, arXiv 2006.16668", "noisy:gshard_top2", weights="1", picks=2, noise=True,
        published="2T/E, first choices before second ones",
    ),
    "gumbel_top2": RouterInfo(
        "first of softmax(z), second of z + Gumbel noise in training; the two softmax values renormalised",
        "DeepSpeed-MoE, arXiv 2201.05596", "noisy:gumbel_top2", weights="1", picks=2, noise=True,
    ),
    "noisy_topk": RouterInfo(
        "softmax over the k largest of z + noise * softplus(x W_noise); no noise in inference",
        "Shazeer 2017, arXiv 1701.06538", "noisy:noisy_topk", balance=_NOISY, weights="scale", gate=("noise",),
        noise=True,
    ),
    "noisy_topk_tanh": RouterInfo(
        "as noisy_topk, with z = W2 tanh(W1 x)", "LLaMA-MoE, arXiv 2406.16554", "noisy:noisy_topk",
        make="projected:tanh_network", balance=_NOISY, weights="scale", imposable=False, gate=("mix", "noise"),
        noise=True,
    ),
    "noisy_softmax_topk": RouterInfo(
        "top-k of softmax(z + N(0, 1/E^2)); no noise in inference", "V-MoE, arXiv 2106.05974",
        "noisy:noisy_softmax_topk", balance=f"{_NOISY}, 0.005 each", noise=True,
        published="ceil(CF kT/E) rounded up to 4, CF 1.05; batch priority",
    ),
    "batch_mask": RouterInfo(
        "in training each expert keeps its kT/E highest softmax(z) of the batch, renormalised by token; "
        "in inference those over a learned threshold", "Shazeer 2017, arXiv 1701.06538, appendix F",
        "expert_choice:batch_mask", balance="by construction in training",
        capacity="kT/E, rounded to nearest, in training",
        causal="inference", form="Ragged", weights="1", gate=("thresholds",),
    ),
    "sigmoid_topk": RouterInfo(
        "top-k of sigmoid(z); weights are the selected values, renormalised if asked", "LFM2, Cohere2",
        "scored:sigmoid_topk", defaults=_RENORMALISED,
    ),
    "sigmoid_bias": RouterInfo(
        "top-k of sigmoid(z) + b, within the best groups (sum of their two best); weights without b",
        "DeepSeek-V3, arXiv 2412.19437", "scored:sigmoid_bias", balance=_BIAS, gate=("selection_bias",),
        defaults=_RENORMALISED,
    ),
    "sqrt_softplus_bias": RouterInfo(
        "top-k of sqrt(softplus(z)) + b; weights without b", "DeepSeek-V4", "scored:sqrt_softplus_bias",
        balance=_BIAS, gate=("selection_bias",), defaults=_RENORMALISED,
    ),
    "sigmoid_logit_bias": RouterInfo(
        "top-k of z + b; weights sigmoid(z) without b", "Kolibri 1", "scored:sigmoid_logit_bias", balance=_BIAS,
        gate=("selection_bias",), defaults=_RENORMALISED,
    ),
    "softmax_bias": RouterInfo(
        "top-k of softmax(z) + b; weights without b, renormalised", "ERNIE 4.5", "scored:softmax_bias",
        balance=_BIAS, gate=("selection_bias",), defaults=_RENORMALISED,
    ),
    "softmax_bias_zero": RouterInfo(
        "top-k of softmax(z) + b over the experts and further zero experts, which return their input",
        "LongCat-Flash, arXiv 2509.01322", "scored:softmax_bias", balance=_BIAS, gate=("selection_bias",),
    ),
    "group_limited": RouterInfo(
        "softmax(z); top-k inside the best groups (group score: max)", "DeepSeek-V2, arXiv 2405.04434",
        "scored:group_limited", balance="expert, device and communication losses", defaults=_GROUPED,
    ),
    "group_limited_sum2": RouterInfo(
        "softmax(z); top-k inside the best groups (group score: sum of its two best)", "Mistral 4",
        "scored:group_limited_sum2", defaults=_GROUPED,
    ),
    "sigmoid_input": RouterInfo(
        "top-1 of z; sigmoid(z) multiplies the expert's input", "Llama 4", "scored:sigmoid_input",
        balance="unpublished", picks=1,
    ),
    "logit_standardised": RouterInfo(
        "softmax((z - mean) / std); top-k", "Skywork-MoE, arXiv 2406.06563", "scored:logit_standardised",
        balance="auxiliary loss, adaptive by layer",
    ),
    "softcap_softmax_topk": RouterInfo(
        "top-k of softmax(30 tanh(z / 30))", "Grok-2", "scored:softcap_softmax_topk", balance="not known"
    ),
    "recycle_top1": RouterInfo(
        "softmax top-1; tokens over capacity go to random experts with room", "Hunyuan-Large, arXiv 2411.02265",
        "scored:softmax_topk", picks=1, published="drop order 'reroute'",
    ),
    "sparsemixer": RouterInfo(
        "per pick a softmax over the logits near the largest (1 - z/max <= 2 jitter); sampled in training",
        "Phi-3.5-MoE (SparseMixer-v2), arXiv 2409.12136", "noisy:sparsemixer", picks=2, noise=True,
    ),
    "locality_bias": RouterInfo(
        "top-k of z + 1 for the experts of the token's own node; weights softmax(z)",
        "after LocMoE, arXiv 2401.13920, which trains it in by a loss", "context:locality_bias",
        balance="auxiliary and locality losses",
        imposable=False, side=("domains",), defaults={"groups": 4},
    ),
    # Token choice: other gates.
    "cosine": RouterInfo(
        "z = cos(Px, w) min(exp(tau), 100); top-k of softmax", "Swin-MoE (Tutel), arXiv 2206.03382",
        "scored:softmax_topk", make="projected:cosine", imposable=False, gate=("project", "temperature"),
    ),
    "attention": RouterInfo(
        "P = softmax(q k^T) v over the experts; softmax over the k largest P", "Yuan 2.0-M32, arXiv 2405.17976",
        "scored:topk_softmax", make="projected:attention", balance=_NONE, weights="scale", imposable=False,
        gate=("key", "value"),
    ),
    "hierarchical_noisy_topk": RouterInfo(
        "top groups by noisy softmax, then top experts inside each; weights are products",
        "Shazeer 2017, arXiv 1701.06538",
        "two_level:hierarchical", make="two_level:two_level_scores",
        balance="importance and load losses on each level", imposable=False,
        gate=("noise", "groups", "group_noise"), weights="scale", noise=True, defaults=_GROUPED,
    ),
    "gumbel_straight_through": RouterInfo(
        "argmax(z + Gumbel noise) forward, softmax((z + g) / tau) backward; argmax(z) in inference",
        "Gumbel-softmax, arXiv 1611.01144; arXiv 1611.00712", "noisy:gumbel_straight_through", weights="1", picks=1,
        noise=True,
    ),
    "mixer": RouterInfo(
        "top-1 of a linear gate on a context vector, not on x", "MixER, arXiv 2502.05335", "context:mixer",
        make="context:context_logits", balance=_NONE, weights="1", imposable=False, picks=1, side=("context",),
    ),
    # Not learned.
    "frozen_random": RouterInfo(
        "top-k of softmax(z) with a W that is never trained", "the control of the surveys", "scored:softmax_topk",
        make="fixed:frozen", balance=_NONE, defaults=_RENORMALISED,
    ),
    "hash": RouterInfo(
        "experts = table[token id], weights 1/k; random balanced table", "Hash Layers, arXiv 2106.04426",
        "fixed:hashed", make="scores:without_logits",
        balance="by the table, over the vocabulary", weights="1", imposable=False, gate=("table",),
        side=("token_ids",),
    ),
    "hash_sqrt_softplus": RouterInfo(
        "experts = table[token id]; weights sqrt(softplus(z)) of those, renormalised", "DeepSeek-V4, first layers",
        "fixed:hashed_sqrt_softplus", balance="by the table, over the vocabulary", imposable=False, gate=("table",),
        side=("token_ids",), defaults=_RENORMALISED,
    ),
    "domain_random": RouterInfo(
        "the token's domain names a group of experts, a fixed random map of token ids the expert inside it",
        "PanGu-Sigma RRE, arXiv 2303.10845", "fixed:domain_random", make="scores:without_logits",
        balance="by the map, inside a domain",
        weights="1", imposable=False, picks=1, gate=("table",), side=("token_ids", "domains"),
        defaults={"groups": 4},
    ),
    # Expert choice and assignment.
    "expert_choice": RouterInfo(
        "softmax(z) over experts; each expert takes its kT/E best tokens", "Expert choice, arXiv 2202.09368",
        "expert_choice:expert_choice", balance="by construction",
        capacity="kT/E, rounded to nearest; tokens may get none",
        causal="no", form="Ragged",
    ),
    "expert_choice_mesh": RouterInfo(
        "softmax(z) over tokens; each expert takes its kT/E best; divided by the experts that hit the token",
        "Mesh TensorFlow", "expert_choice:expert_choice_mesh", balance="by construction",
        capacity="kT/E, rounded to nearest; tokens may get none", causal="no", form="Ragged",
    ),
    "base": RouterInfo(
        "in training the assignment with the largest sum of z, T/E tokens an expert; greedy top-1 in inference; "
        "weight sigmoid(z)", "BASE layers, arXiv 2103.16716", "assignment:base", balance="by construction in training",
        capacity="T/E, rounded up or down, in training", causal="inference", picks=1,
    ),
    "sinkhorn": RouterInfo(
        "in training top-k of Sinkhorn-normalised exp(z), top-k of z in inference; weights sigmoid(z) (k = 1) or "
        "softmax(z)", "S-BASE, arXiv 2202.01169; Megatron-LM", "assignment:sinkhorn",
        balance="by Sinkhorn in training", causal="inference",
    ),
    # Fully differentiable.
    "soft_moe": RouterInfo(
        "unit-norm x and slot vectors; dispatch softmax over tokens, combine softmax over slots",
        "Soft MoE, arXiv 2308.00951",
        "mixing:soft_moe", make="mixing:normalised", balance="by construction", capacity="a fixed number of slots",
        causal="no", form="Mix", weights="1", imposable=False, gate=("slot_scale",),
    ),
}  # fmt: skip


def router_info(kind: str) -> RouterInfo:
    """The row of a router's name; of a user's `path/to/file.py:function` what every such function is.

    Raises:
        ValueError: no such router.
    """
    if is_file(kind):
        return RouterInfo("a user's function of the logits", kind, kind, balance="not known", causal="not known")
    if kind not in ROUTERS:
        raise ValueError(f"router {kind!r} is not known; `moebench list routers` shows all")
    return ROUTERS[kind]


def is_file(kind: str) -> bool:
    """Whether it reads as `path/to/file.py:function`."""
    path, _, function = kind.rpartition(":")
    return path.endswith(".py") and function.isidentifier()


def imposable(spec: RouterSpec) -> bool:
    """Whether chosen logits can be had by moving x: not where its noise in training depends on x too."""
    info = router_info(spec.kind)
    depends = info.make != "scores:linear" or "noise" in info.gate
    return info.imposable and not (spec.training and info.noise and depends)


def is_causal(spec: RouterSpec, capacity: Capacity) -> bool:
    """Whether later tokens can change no token's experts: neither by its router, nor by who is dropped. At a fixed T.

    First come by position is the one order in which a later token takes nobody's slot (the number of slots grows with
    T in any order). False for a user's function, of which nobody knows.
    """
    causal = router_info(spec.kind).causal
    alone = causal == "yes" or (causal == "inference" and not spec.training)
    dropless = capacity.factor == "dropless" or float(capacity.factor) == 0
    return alone and (dropless or capacity.order == "position")


def needed_picks(kind: str, routed_experts: int) -> int | None:
    """The one top_k the router is defined for, or None."""
    picks = router_info(kind).picks
    return routed_experts if picks == "all" else None if picks is None else int(picks)
