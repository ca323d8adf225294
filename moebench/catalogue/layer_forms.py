"""Mixtures of experts that are no router over a bank of FFNs: what each is, its sizes and its work. No torch.

A LayerSpec means to them what it can: D, F, E and K are read as each entry of `LAYER_FORMS` says. A form that has one
FFN in place of the bank gives it the width K*F, as the yardstick dense-ffn does. The router's kind, scale and
normalisation are not looked at: every form brings its own gate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd, isqrt

from moebench.catalogue.spec import LayerSpec, ffn_params

DEPTH_SHARE = 0.125  # of the tokens that Mixture-of-Depths computes: the best of its paper
KEY_WIDTH = 128  # of PEER's queries, two halves of which meet the sub-keys
PEER_HEADS = 8
SUB_TOKENS = 4  # heads of MH-MoE, a token is split into so many
LORA_RANK, LORA_ALPHA = 4, 32  # as LoRAMoE's code sets them
HYPER_WIDTH, HYPER_EXPERT = 128, 64  # of HyperMoE's code: embeddings and hypernetwork, generated expert
PEER_ACTIVATIONS = ("relu", "gelu", "silu")

Work = tuple[float, float]


def depth_tokens(tokens: int) -> int:
    """C, the tokens that Mixture-of-Depths computes in training: round(0.125 T), halves to even, at least 1."""
    return max(1, round(DEPTH_SHARE * tokens))


def attention_heads(layer: LayerSpec) -> int:
    """Heads of MoH: the routed ones are E, the shared ones come on top."""
    return layer.shared_experts + layer.routed_experts


def peer_sizes(layer: LayerSpec) -> tuple[int, int, int, int]:
    """(heads h, experts k of each head, sub-keys sqrt(N), width d of half a query); N = E and h * k = K."""
    heads = gcd(layer.top_k, PEER_HEADS)
    half = max(1, min(KEY_WIDTH, layer.hidden_size) // 2)
    return heads, layer.top_k // heads, isqrt(layer.routed_experts), half


def hyper_sizes(layer: LayerSpec) -> tuple[int, int]:
    """(H, b): widths of HyperMoE's hypernetwork and of the expert it generates; never more than D."""
    return min(HYPER_WIDTH, layer.hidden_size), min(HYPER_EXPERT, layer.hidden_size)


def width_classes(layer: LayerSpec) -> tuple[tuple[int, int], ...]:
    """(experts, width) of each class of the heterogeneous MoE: half of them F/2, half 3F/2, a middle one F; sum E*F."""
    E, F = layer.routed_experts, layer.expert_ffn_size
    classes = ((E // 2, F // 2), (E % 2, F), (E // 2, 2 * F - F // 2))
    return tuple((count, width) for count, width in classes if count)


def lora_maps(layer: LayerSpec) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the frozen FFN's linear maps, by name."""
    D, width = layer.hidden_size, layer.top_k * layer.expert_ffn_size
    return ({"gate": (D, width)} if layer.gated else {}) | {"up": (D, width), "down": (width, D)}


def form_fault(name: str, layer: LayerSpec) -> str | None:
    """Why the form `name` cannot be had with this layer, or None."""
    D, E = layer.hidden_size, layer.routed_experts
    if layer.expert_bias:
        return f"{name} has no biases in its experts"
    if name != "moh" and layer.shared_experts:
        return f"{name} has no shared experts; the layer has {layer.shared_experts}"
    if name == "moh":
        heads = attention_heads(layer)
        if D % heads:
            return f"moh needs a hidden_size that its {heads} heads divide, and {D} is not"
        if layer.shared_combine not in ("none", "add"):
            return f"moh mixes its shared heads itself; shared_combine {layer.shared_combine!r} is not for it"
    if name == "peer":
        return _peer_fault(layer)
    if name == "multi-head-moe" and D % SUB_TOKENS:
        return f"multi-head-moe splits a token into {SUB_TOKENS}, which hidden_size {D} does not allow"
    if name == "hetero-moe" and (E < 2 or layer.expert_ffn_size < 2):
        return "hetero-moe needs at least two experts, and an expert_ffn_size of at least 2 to be halved"
    return None


def form_work(name: str, layer: LayerSpec, tokens: int) -> Work:
    """(FLOPs of one forward call, weights read) of a form; a multiply-add is two FLOPs.

    Weights of routed experts are counted as uniform routing would hit them, and Mixture-of-Depths in inference as if an
    eighth of the tokens passed its predictor.

    Raises:
        KeyError: there is no such form.
    """
    return LAYER_FORMS[name].work(layer, tokens)


def _peer_fault(layer: LayerSpec) -> str | None:
    heads, each, keys, _ = peer_sizes(layer)
    if keys * keys != layer.routed_experts:
        return f"peer needs a square number of experts; {layer.routed_experts} is none"
    if layer.expert_ffn_size != 1:
        return f"peer's experts are single neurons: expert_ffn_size must be 1, not {layer.expert_ffn_size}"
    if layer.activation not in PEER_ACTIVATIONS:
        return f"peer's experts have one input map; activation must be one of {', '.join(PEER_ACTIVATIONS)}"
    if each > keys:
        return f"peer takes top_k {layer.top_k} by {heads} heads of {each}, more than its {keys} sub-keys"
    if layer.hidden_size < 2:
        return "peer halves its queries: hidden_size must be at least 2"
    return None


def _hit(experts: float, picks: int, draws: int) -> float:
    """Experts that `draws` uniform choices of `picks` experts hit."""
    return experts * (1.0 - (1.0 - picks / experts) ** draws)


def _smear(layer: LayerSpec, tokens: int) -> Work:
    D, E, P = layer.hidden_size, layer.routed_experts, layer.expert_params()
    return 2.0 * D * E + 2.0 * E * P + 2.0 * tokens * P, float(E * P + E * D)


def _depths(layer: LayerSpec, tokens: int) -> Work:
    D, P = layer.hidden_size, layer.top_k * layer.expert_params()
    training = layer.router.training
    computed = depth_tokens(tokens) if training else DEPTH_SHARE * tokens
    gates = tokens * D if training else (tokens + computed) * D
    return 2.0 * gates + 2.0 * computed * P, float(P + D if training else P + 2 * D + 1)


def _moh(layer: LayerSpec, tokens: int) -> Work:
    return moh_work(layer, tokens, layer.top_k + layer.shared_experts)


def moh_work(layer: LayerSpec, tokens: int, active: int) -> Work:
    """Work of MoH where a token's query, attention and output are computed for `active` heads; keys, values for all."""
    D, heads, shared = layer.hidden_size, attention_heads(layer), layer.shared_experts
    width = active * (D // heads)
    gates = D * (layer.routed_experts + (shared + 2 if shared else 0))
    pairs = tokens * (tokens + 1) / 2
    return 2.0 * tokens * (gates + 2 * D * D + 2 * D * width) + 4.0 * pairs * width, float(gates + 4 * D * D)


def _peer(layer: LayerSpec, tokens: int) -> Work:
    D, (heads, _, keys, half) = layer.hidden_size, peer_sizes(layer)
    query = 2 * heads * half * D
    scores = 2 * heads * half * keys
    experts = _hit(layer.routed_experts, layer.top_k, tokens)
    return 2.0 * tokens * (query + scores + 2 * layer.top_k * D), query + 2 * keys * half + experts * 2 * D


def _bank(layer: LayerSpec, tokens: int, params: float) -> Work:
    """Work of a gate [E, D] and a bank of E experts that have so many parameters on average."""
    gate = layer.routed_experts * layer.hidden_size
    return 2.0 * tokens * (gate + layer.top_k * params), gate + params * _hit(layer.routed_experts, layer.top_k, tokens)


def _hyper(layer: LayerSpec, tokens: int) -> Work:
    """The generated matrices are applied without being built: x meets all H of their terms."""
    D, K, (H, b) = layer.hidden_size, layer.top_k, hyper_sizes(layer)
    flops, weights = _bank(layer, tokens, layer.expert_params())
    trunk, generator = 3 * H * H, 2 * H * b * D
    mixing = 2 * H * b
    flops += 2.0 * tokens * (trunk + generator + mixing) + tokens * K * H
    return flops, weights + layer.routed_experts * H + trunk + H + generator


def _multihead(layer: LayerSpec, tokens: int) -> Work:
    D, E, K, part = layer.hidden_size, layer.routed_experts, layer.top_k, layer.hidden_size // SUB_TOKENS
    expert = ffn_params(part, layer.expert_ffn_size, gated=layer.gated)
    subs = tokens * SUB_TOKENS
    return 2.0 * tokens * 2 * D * D + 2.0 * subs * (E * part + K * expert), (
        2 * D * D + E * part + expert * _hit(E, K, subs)
    )


def _lora(layer: LayerSpec, tokens: int) -> Work:
    E, r = layer.routed_experts, LORA_RANK
    weights = sum(n * o + E * n + E * r * (n + o) for n, o in lora_maps(layer).values())
    return 2.0 * tokens * weights, float(weights)


def _hetero(layer: LayerSpec, tokens: int) -> Work:
    return _bank(layer, tokens, layer.expert_params())  # the mean width is F


@dataclass(frozen=True)
class LayerFormInfo:
    """One form.

    Attributes:
        summary: the layer in a line.
        source: the paper it comes from.
        causal: "yes", "no", or "inference": whether a token's output ignores later tokens.
        work: (layer, tokens) -> (FLOPs, weights read).
    """

    summary: str
    source: str
    causal: str
    work: Callable[[LayerSpec, int], Work]


LAYER_FORMS: dict[str, LayerFormInfo] = {
    "smear": LayerFormInfo(
        "SMEAR: E experts merged into one FFN by the softmax of the mean token", "arXiv 2306.03745", "no", _smear
    ),
    "mixture-of-depths": LayerFormInfo(
        "an eighth of the tokens pass an FFN of width K*F, the others go on unchanged", "arXiv 2404.02258", "inference",
        _depths,
    ),
    "moh": LayerFormInfo(
        "MoH: attention of E routed heads, K a token, and the shared experts as shared heads", "arXiv 2410.11842",
        "yes", _moh,
    ),
    "peer": LayerFormInfo(
        "PEER: K of E single neurons, found by product keys", "arXiv 2407.04153", "yes", _peer
    ),
    "hyper-moe": LayerFormInfo(
        "HyperMoE: a small expert more, generated from the embeddings of the experts not chosen", "arXiv 2402.12656",
        "yes", _hyper,
    ),
    "multi-head-moe": LayerFormInfo(
        f"MH-MoE: a token split into {SUB_TOKENS}, each part routed, and merged again", "arXiv 2404.15045", "yes",
        _multihead,
    ),
    "lora-moe": LayerFormInfo(
        "LoRAMoE: a frozen FFN of width K*F, E low-rank experts on each of its maps", "arXiv 2312.09979", "yes", _lora
    ),
    "hetero-moe": LayerFormInfo(
        "HMoE: experts of widths F/2 and 3F/2", "arXiv 2408.10681", "yes", _hetero
    ),
}  # fmt: skip
