"""Inputs of a layer, as the tests of `moe_layer` share them."""

from __future__ import annotations

from typing import Any

import torch
from kernel_loops import leaf, random_ids
from torch import Tensor

from moebench_kernels.activation import GATED

NAMES = ("dx", "d_weights", "d_w_gate_up", "d_w_down", "d_b_gate_up", "d_b_down")


def tensors(
    T: int, E: int, K: int, D: int, F: int, activation: str, dropped: float, bias: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """ids, and [x, weights, w_gate_up, w_down, and with bias b_gate_up, b_down] in float32."""
    m = 2 if activation in GATED else 1
    ids = torch.cat([random_ids(T, E, min(E, K - first), dropped) for first in range(0, K, E)], dim=1)
    w_gate_up, w_down = torch.randn(E, m * F, D) * D**-0.5, torch.randn(E, D, F) * F**-0.5
    biases = [torch.randn(E, m * F), torch.randn(E, D)] if bias else []
    return ids, [torch.randn(T, D), torch.rand(T, K), w_gate_up, w_down, *biases]


def leaves(
    values: list[Tensor],
    dtype: torch.dtype,
    device: torch.device,
    weights: torch.dtype,
    bias: torch.dtype | None = None,
) -> list[Tensor]:
    """Fresh leaves of `dtype`, the router weights and the biases of their own."""
    return [leaf(v, weights if i == 1 else bias or dtype if i >= 4 else dtype, device) for i, v in enumerate(values)]


def layer(function: Any, ids: Tensor, values: list[Tensor], **options: Any) -> Tensor:
    """The layer, or its reference, on a list as `tensors` makes it."""
    x, weights, w_gate_up, w_down, *biases = values
    named = dict(zip(("b_gate_up", "b_down"), biases, strict=False))
    return function(x, ids, weights, w_gate_up, w_down, **named, **options)
