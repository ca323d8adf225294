"""Logits that are not one linear map of x.

    cosine        z = min(exp(tau), 100) cos(P x, w_e)
    attention     z_i = sum_j softmax_j(q_i k_j) v_j, with q, k, v = three maps of x to R^E
    tanh_network  z = M tanh(W x)

All return `Scores`; who chooses by them is in `moebench.catalogue.routers`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moebench.catalogue.spec import RouterSpec
from moebench.routing.scores import Scores, Side, linear, wide

LARGEST_SCALE = 100.0


def cosine(spec: RouterSpec, x: Tensor, gate: Mapping[str, Tensor], side: Side) -> Scores:
    """Swin-MoE's gate (Tutel, arXiv 2206.03382), whose released projection also has a bias.

    Args:
        x: [T, D].
        gate: "project" [256, D], "router" [E, 256], "temperature" [], the logarithm of the scale.
    """
    scale = wide(gate["temperature"]).clamp(max=math.log(LARGEST_SCALE)).exp()
    return Scores(_unit(wide(x @ gate["project"].T)) @ _unit(wide(gate["router"])).T * scale, side=side)


def attention(spec: RouterSpec, x: Tensor, gate: Mapping[str, Tensor], side: Side) -> Scores:
    """Yuan 2.0-M32's attention router (arXiv 2405.17976): E queries, keys and values of width 1, unscaled.

    Args:
        x: [T, D].
        gate: "router" (the queries' map), "key" and "value", [E, D] each.
    """
    q, k, v = (wide(x @ gate[name].T)[:, None, :, None] for name in ("router", "key", "value"))
    # Fused where it can be: [T, E, E] scores would not fit.
    z = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    return Scores(z[:, 0, :, 0], side=side)


def tanh_network(spec: RouterSpec, x: Tensor, gate: Mapping[str, Tensor], side: Side) -> Scores:
    """LLaMA-MoE's gate network (arXiv 2406.16554; its released "mlp" gate, without biases).

    Args:
        x: [T, D].
        gate: "router" [E, D], "mix" [E, E], "noise" [E, D].
    """
    scores = linear(spec, x, gate, side)
    return replace(scores, logits=torch.tanh(scores.logits) @ wide(gate["mix"]).T)


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1 (zero rows stay 0); divided by their largest entry first, so that no square overflows."""
    tiny = torch.finfo(rows.dtype).tiny
    rows = rows / rows.detach().abs().amax(dim=-1, keepdim=True).clamp_min(tiny)
    return rows / rows.square().sum(dim=-1, keepdim=True).sqrt().clamp_min(tiny)
