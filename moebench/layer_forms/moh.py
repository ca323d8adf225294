"""MoH, mixture-of-head attention (Jin et al., arXiv 2410.11842): attention heads as experts.

    o_i = softmax(q_i k_i^T / sqrt(d) + causal) v_i                      head i of H = S + E, d = D/H
    (a_s, a_r) = 2 softmax(W_m x_t)
    g_i = a_s S softmax(W_s x_t)_i                                       the S shared heads come first
    g_i = a_r K softmax(W_r x_t)_i / sum over the K chosen, or 0         the E routed heads
    y_t = sum_i g_i O_i o_i

x [T, D] is one causal sequence; S the layer's shared experts, E its routed ones, K of them a token; F plays no part.
The factors 2, S and K, and the sum of the chosen being 1, are those of the authors' code. Without shared heads a_r = 1.
w_qkv [3, D, D], w_out [D, D], router [E, D], shared_router [S, D], mixer [2, D]. No positions are encoded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moebench.catalogue.layer_forms import attention_heads
from moebench.catalogue.spec import LayerSpec
from moebench.layer_forms.bank import Weights, doubled, drawer, scores, settle, softmax_over, top_k

ROWS = 256  # queries that the reference takes at once: its score matrix is not to fill the memory


def make_weights(
    layer: LayerSpec, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str
) -> Weights:
    """w_qkv, w_out, router; shared_router and mixer where the layer has shared experts."""
    D, S = layer.hidden_size, layer.shared_experts
    draw = drawer(generator, dtype, device)
    weights = {"w_qkv": draw(3, D, D), "w_out": draw(D, D), "router": draw(layer.routed_experts, D)}
    return weights | ({"shared_router": draw(S, D), "mixer": draw(2, D)} if S else {})


def choices(layer: LayerSpec, weights: Weights, x: Tensor) -> Tensor:
    """Routed heads of each token, 0 to E-1: int64 [T, K]."""
    return top_k(scores(x, weights["router"]), layer.top_k)


def forward(layer: LayerSpec, weights: Weights, x: Tensor) -> Tensor:
    """x [T, D] -> y [T, D]; every head is computed, those not chosen are multiplied by 0."""
    q, k, v = (_heads(layer, x @ w.T).transpose(0, 1).unsqueeze(0) for w in weights["w_qkv"])
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)
    gates = head_gates(layer, weights, x)
    return (out * gates.unsqueeze(-1).to(x.dtype)).flatten(1) @ weights["w_out"].T


def head_gates(layer: LayerSpec, weights: Weights, x: Tensor) -> Tensor:
    """g [T, H], at least float32."""
    logits = scores(x, weights["router"])
    ids = top_k(logits, layer.top_k)
    routed = torch.zeros_like(logits).scatter(1, ids, layer.top_k * softmax_over(logits, ids))
    if not layer.shared_experts:
        return routed
    shared = layer.shared_experts * scores(x, weights["shared_router"]).softmax(-1)
    a_shared, a_routed = (2 * scores(x, weights["mixer"]).softmax(-1)).split(1, dim=-1)
    return torch.cat([a_shared * shared, a_routed * routed], dim=1)


def reference(layer: LayerSpec, weights: Weights, x: Tensor, chosen: Tensor | None = None) -> Tensor:
    """x float64 [T, D] -> y float64 [T, D], head by head; `chosen` as from `choices`."""
    weights, S, K = doubled(weights), layer.shared_experts, layer.top_k
    p = torch.softmax(x @ weights["router"].T, 1)
    mask = torch.zeros_like(p).scatter(1, settle(x @ weights["router"].T, K, chosen), 1.0)
    g = list((K * p * mask / (p * mask).sum(1, keepdim=True)).unbind(1))
    if S:
        a = 2 * torch.softmax(x @ weights["mixer"].T, 1)
        shared = S * torch.softmax(x @ weights["shared_router"].T, 1)
        g = [a[:, 0] * column for column in shared.unbind(1)] + [a[:, 1] * column for column in g]
    w_q, w_k, w_v = weights["w_qkv"]
    y = torch.zeros_like(x)
    d = x.shape[1] // attention_heads(layer)
    for head, gate in enumerate(g):
        rows = slice(head * d, (head + 1) * d)
        out = _attend(x @ w_q[rows].T, x @ w_k[rows].T, x @ w_v[rows].T)
        y = y + gate.unsqueeze(1) * (out @ weights["w_out"][:, rows].T)
    return y


def _heads(layer: LayerSpec, rows: Tensor) -> Tensor:
    """[T, D] -> [T, H, d]."""
    return rows.view(len(rows), attention_heads(layer), -1)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head of causal attention: [T, d] each -> [T, d]."""
    T, d = q.shape
    parts = []
    for start in range(0, T, ROWS):
        end = min(start + ROWS, T)
        later = torch.arange(end, device=q.device) > torch.arange(start, end, device=q.device).unsqueeze(1)
        z = (q[start:end] @ k[:end].T / d**0.5).masked_fill(later, float("-inf"))
        parts.append(torch.softmax(z, 1) @ v[:end])
    return torch.cat(parts)
