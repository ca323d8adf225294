"""LoRAMoE (Dou et al., arXiv 2312.09979): experts of low rank beside the frozen maps of one FFN.

    linear(x) = W0 x + (alpha / r) sum_i w_i B_i A_i x,   w = softmax(R x)      over all E experts, for each map alone
    y_t = down(act(gate(x_t)) * up(x_t)),  or  down(act(up(x_t)))

x [T, D]; the FFN has width K*F. Of a map n -> o, named gate (gated layers), up or down: frozen_ [o, n] (W0),
router_ [E, n] (R), a_ [E, r, n], b_ [E, o, r]; r = 4, alpha = 32. All experts take part: K only sets the width. B
starts at zero in training; here it is drawn, so that the experts are seen in the answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebench.catalogue.layer_forms import LORA_ALPHA, LORA_RANK, lora_maps
from moebench.catalogue.spec import LayerSpec
from moebench.layer_forms.bank import Weights, activated, doubled, drawer, scores

SCALE = LORA_ALPHA / LORA_RANK


def make_weights(
    layer: LayerSpec, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str
) -> Weights:
    """frozen_, router_, a_ and b_ of each map; B is scaled such that one expert alone would match W0's output."""
    E, r, draw = layer.routed_experts, LORA_RANK, drawer(generator, dtype, device)
    weights: Weights = {}
    for name, (n, o) in lora_maps(layer).items():
        weights |= {
            f"frozen_{name}": draw(o, n), f"router_{name}": draw(E, n), f"a_{name}": draw(E, r, n),
            f"b_{name}": draw(E, o, r) / SCALE,
        }  # fmt: skip
    return weights


def choices(layer: LayerSpec, weights: Weights, x: Tensor) -> None:
    """Every expert takes part."""


def forward(layer: LayerSpec, weights: Weights, x: Tensor) -> Tensor:
    """x [T, D] -> y [T, D]."""
    rows = torch.cat([_linear(weights, name, x) for name in lora_maps(layer) if name != "down"], dim=1)
    return _linear(weights, "down", activated(layer, rows))


def reference(layer: LayerSpec, weights: Weights, x: Tensor, chosen: Tensor | None = None) -> Tensor:
    """x float64 [T, D] -> y float64 [T, D], expert by expert."""
    weights = doubled(weights)

    def linear(name: str, rows: Tensor) -> Tensor:
        w = torch.softmax(rows @ weights[f"router_{name}"].T, 1)
        y = rows @ weights[f"frozen_{name}"].T
        for expert in range(layer.routed_experts):
            low = (rows @ weights[f"a_{name}"][expert].T) @ weights[f"b_{name}"][expert].T
            y = y + SCALE * w[:, expert : expert + 1] * low
        return y

    rows = torch.cat([linear(name, x) for name in lora_maps(layer) if name != "down"], dim=1)
    return linear("down", activated(layer, rows))


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """One map with its experts: [T, n] -> [T, o]."""
    a, b = weights[f"a_{name}"], weights[f"b_{name}"]
    w = SCALE * scores(x, weights[f"router_{name}"]).softmax(-1)
    low = (x @ a.flatten(0, 1).T).view(len(x), *a.shape[:2]) * w.unsqueeze(-1).to(x.dtype)
    return x @ weights[f"frozen_{name}"].T + low.flatten(1) @ b.transpose(1, 2).flatten(0, 1)
