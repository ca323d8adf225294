"""The float64 answer of the experts, one at a time, shared with no implementation.

y_t = sum_k w_tk * f_e(x_t) over given ids and weights, -1 meaning dropped, joined with
the shared experts; differentiable, so autograd gives the gradients' oracle too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moebench.catalogue.spec import LayerSpec
from moebench.weights import Weights


def experts(
    layer: LayerSpec, weights: Weights, x: Tensor, ids: Tensor, gates: Tensor, *, on_input: bool = False
) -> Tensor:
    """x float64 [n, D], ids int64 [n, K], gates float64 [n, K] -> float64 [n, D]; an id of E or more returns x itself.

    Args:
        on_input: whether the weight multiplies the expert's input instead of its output.
    """
    y = torch.zeros_like(x)
    for expert in ids[ids >= 0].unique().tolist():
        token, pick = (ids == expert).nonzero(as_tuple=True)
        rows, gate = x[token], gates[token, pick].unsqueeze(1)
        if expert >= layer.routed_experts:
            out = gate * rows
        elif on_input:
            out = one_expert(layer, weights, gate * rows, expert)
        else:
            out = gate * one_expert(layer, weights, rows, expert)
        y = y.index_add(0, token, out)
    return y


def one_expert(layer: LayerSpec, weights: Weights, x: Tensor, expert: int) -> Tensor:
    """[n, D] -> [n, D] through one of the routed experts."""
    (w_in, w_down), (b_in, b_down) = weights.expert(expert), weights.expert_biases(expert)
    return ffn(layer, x, w_in, w_down, b_in, b_down)


def joined(layer: LayerSpec, weights: Weights, x: Tensor, routed: Tensor, dense_x: Tensor | None = None) -> Tensor:
    """The routed sum [n, D] with the always-on FFN, as the layer joins them; `parallel` feeds that FFN dense_x."""
    if weights.shared_gate_up is None or weights.shared_down is None:
        return routed
    if layer.shared_activation is not None:
        layer = replace(layer, activation=layer.shared_activation, activation_limit=None, shared_activation=None)
    inputs = x if layer.shared_combine != "parallel" or dense_x is None else dense_x
    dense = ffn(layer, inputs, weights.shared_gate_up.double(), weights.shared_down.double())
    if weights.shared_gate is None:
        total = routed + dense
        return total / 2**0.5 if layer.shared_combine == "scaled_residual" else total
    z = x @ weights.shared_gate.double().T
    if layer.shared_combine == "learned_mix":
        first = 1 / (1 + torch.exp(z[:, 1:] - z[:, :1]))  # a softmax of two
        return first * routed + (1 - first) * dense
    g = 1 / (1 + torch.exp(-z))
    return g * routed + (1 - g) * dense if layer.shared_combine == "cmr" else routed + g * dense


def ffn(
    layer: LayerSpec, x: Tensor, w_in: Tensor, w_down: Tensor, b_in: Tensor | None = None, b_down: Tensor | None = None
) -> Tensor:
    """One expert: [n, D] -> [n, D]; w_in [m*F, D], gate rows first; w_down [D, F]; biases [m*F] and [D]."""
    out = hidden(layer, x, w_in, b_in) @ w_down.T
    return out if b_down is None else out + b_down


def hidden(layer: LayerSpec, x: Tensor, w_in: Tensor, b_in: Tensor | None = None) -> Tensor:
    """The first half of an expert: [n, D] -> [n, F]."""
    rows = x @ w_in.T if b_in is None else x @ w_in.T + b_in
    if not layer.gated:
        return _PLAIN[layer.activation](rows)
    gates, up = rows.chunk(2, dim=1)
    if layer.activation == "clamped_swiglu":  # gpt-oss
        gates = gates.clamp(max=7.0)
        return gates / (1 + torch.exp(-1.702 * gates)) * (up.clamp(-7.0, 7.0) + 1)
    if layer.activation_limit is not None:
        gates, up = gates.clamp(max=layer.activation_limit), up.clamp(-layer.activation_limit, layer.activation_limit)
    return _PLAIN["gelu" if layer.activation == "geglu" else "silu"](gates) * up


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / 2**0.5)),
    "relu": lambda z: z.clamp(min=0),
    "relu2": lambda z: z.clamp(min=0) ** 2,
}
