"""HyperMoE (Zhao et al., arXiv 2402.12656): what was not chosen speaks through a hypernetwork.

    y_t = sum_{e in S} g_e f_e(x_t) + B_t relu(A_t x_t)          S the K largest logits, g the softmax over them
    z_t = P2 relu(P1 sum_{e not in S} v_e)                       v_e an embedding of expert e
    h_t = relu(G z_t + c)                                        c stands for the layer's own embedding
    A_t = sum_j h_tj A_j  [b, D],  B_t = sum_j h_tj B_j  [D, b]  the generated expert

x [T, D]; router [E, D]; w_in [E, m*F, D]; w_down [E, D, F]; embeddings [E, H]; P1, P2, G [H, H]; c [H];
generate_in [H, b, D]; generate_out [H, b, D] (B_j transposed). H = 128 and b = 64 as in the authors' code, or D if that
is less; its biases are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebench.catalogue.layer_forms import hyper_sizes
from moebench.catalogue.spec import LayerSpec
from moebench.layer_forms.bank import (
    Weights,
    doubled,
    drawer,
    mix,
    reference_mix,
    scores,
    settle,
    softmax_over,
    top_k,
)

BUILT = 16  # tokens whose matrices the reference builds at once


def make_weights(
    layer: LayerSpec, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str
) -> Weights:
    """As listed above, scaled such that the generated expert says about as much as the routed ones."""
    D, F, E, m = layer.hidden_size, layer.expert_ffn_size, layer.routed_experts, 2 if layer.gated else 1
    H, b = hyper_sizes(layer)
    draw = drawer(generator, dtype, device)
    return {
        "router": draw(E, D), "w_in": draw(E, m * F, D), "w_down": draw(E, D, F),
        "embeddings": draw(E, H) * E**-0.5, "process_in": draw(H, H), "process_out": draw(H, H), "trunk": draw(H, H),
        "layer_embedding": draw(H), "generate_in": draw(H, b, D), "generate_out": draw(H, b, D) * (D / b) ** 0.5,
    }  # fmt: skip


def choices(layer: LayerSpec, weights: Weights, x: Tensor) -> Tensor:
    """Experts of each token: int64 [T, K]."""
    return top_k(scores(x, weights["router"]), layer.top_k)


def forward(layer: LayerSpec, weights: Weights, x: Tensor) -> Tensor:
    """x [T, D] -> y [T, D]; no token's matrices are built, since they are linear in h."""
    logits = scores(x, weights["router"])
    ids = top_k(logits, layer.top_k)
    routed = mix(layer, x, ids, softmax_over(logits, ids), weights["w_in"], weights["w_down"])
    h = code(weights, ids).to(x.dtype)
    generate_in, generate_out = weights["generate_in"], weights["generate_out"]
    parts = (x @ generate_in.flatten(0, 1).T).unflatten(1, generate_in.shape[:2])
    hidden = torch.relu(torch.einsum("th,thb->tb", h, parts))
    outer = (h.unsqueeze(-1) * hidden.unsqueeze(1)).flatten(1)
    return routed + outer @ generate_out.flatten(0, 1)


def code(weights: Weights, ids: Tensor) -> Tensor:
    """h [T, H] of the experts not among ids [T, K]."""
    embeddings = weights["embeddings"]
    unchosen = torch.ones(len(ids), len(embeddings), dtype=embeddings.dtype, device=ids.device).scatter(1, ids, 0.0)
    z = torch.relu(unchosen @ embeddings @ weights["process_in"].T) @ weights["process_out"].T
    return torch.relu(z @ weights["trunk"].T + weights["layer_embedding"])


def reference(layer: LayerSpec, weights: Weights, x: Tensor, chosen: Tensor | None = None) -> Tensor:
    """x float64 [T, D] -> y float64 [T, D], each token with its generated matrices; `chosen` as from `choices`."""
    weights = doubled(weights)
    logits = x @ weights["router"].T
    ids = settle(logits, layer.top_k, chosen)
    gates = torch.softmax(logits.gather(1, ids), 1)
    y = reference_mix(layer, x, ids, gates, list(weights["w_in"]), list(weights["w_down"]))
    chosen_sum = torch.stack([weights["embeddings"][experts].sum(0) for experts in ids])
    selection = weights["embeddings"].sum(0) - chosen_sum
    z = (selection @ weights["process_in"].T).clamp(min=0) @ weights["process_out"].T
    h = (z @ weights["trunk"].T + weights["layer_embedding"]).clamp(min=0)
    generated = []
    for rows, codes in zip(x.split(BUILT), h.split(BUILT), strict=True):
        inner, outer = (torch.tensordot(codes, weights[name], 1) for name in ("generate_in", "generate_out"))
        generated.append(torch.einsum("tb,tbd->td", torch.einsum("tbd,td->tb", inner, rows).clamp(min=0), outer))
    return y + torch.cat(generated)
