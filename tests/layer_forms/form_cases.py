"""The forms, small layers that each can have, and a plain MoE written out token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moebench import oracle
from moebench.catalogue.layer_forms import LAYER_FORMS
from moebench.catalogue.spec import LayerSpec, RouterSpec
from moebench.layer_forms import depths, hetero, hyper, lora, moh, multihead, peer, smear
from moebench.point import Capacity
from moebench.providers.case import Case
from moebench.providers.load import load

FORMS: dict[str, Any] = {
    "smear": smear, "mixture-of-depths": depths, "moh": moh, "peer": peer, "hyper-moe": hyper,
    "multi-head-moe": multihead, "lora-moe": lora, "hetero-moe": hetero,
}  # fmt: skip
NAMES = list(LAYER_FORMS)
TRAINING = RouterSpec(training=True)


def layers_of(name: str) -> list[LayerSpec]:
    """Layers of several shapes that the form can have: gated or not, odd E, K = 1, K = E."""
    if name == "peer":
        return [
            LayerSpec(32, 1, 64, 16, activation="gelu"), LayerSpec(6, 1, 9, 6, activation="relu"),
            LayerSpec(300, 1, 16, 1, activation="silu"),
        ]  # fmt: skip
    if name == "moh":
        shared = {"shared_experts": 2, "shared_ffn_size": 8, "shared_combine": "add"}
        return [LayerSpec(32, 16, 8, 2), LayerSpec(30, 16, 4, 2, **shared), LayerSpec(32, 16, 2, 2, **shared)]
    shapes = [
        LayerSpec(32, 16, 8, 2), LayerSpec(24, 10, 5, 5, activation="geglu"), LayerSpec(16, 8, 7, 1, activation="relu"),
        LayerSpec(16, 8, 4, 3, activation="limited_swiglu", activation_limit=0.5),
    ]  # fmt: skip
    if name == "mixture-of-depths":
        return shapes + [replace(layer, router=TRAINING) for layer in shapes]
    return shapes


def weights_of(name: str, layer: LayerSpec, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = FORMS[name].make_weights(layer, torch.Generator().manual_seed(seed), dtype, "cpu")
    return weights


def tokens_of(layer: LayerSpec, tokens: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, layer.hidden_size, generator=generator, dtype=torch.float64).to(dtype)


def error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found.double() - expected).norm() / expected.norm())


def plain_moe(
    layer: LayerSpec, x: Tensor, router: Tensor, w_in: Tensor | list[Tensor], w_down: Tensor | list[Tensor]
) -> Tensor:
    """Softmax over the K largest logits, one token and one expert at a time."""
    rows = []
    for token in x:
        logits = (router @ token).tolist()
        best = sorted(range(len(logits)), key=lambda expert: -logits[expert])[: layer.top_k]
        gates = torch.softmax(torch.tensor([logits[expert] for expert in best], dtype=torch.float64), 0)
        outs = [oracle.ffn(layer, token.unsqueeze(0), w_in[expert], w_down[expert])[0] for expert in best]
        rows.append(sum(gate * out for gate, out in zip(gates, outs, strict=True)))
    return torch.stack(rows)


def case_of(layer: LayerSpec, tokens: int = 37, **more: Any) -> Case:
    asked: dict[str, Any] = {
        "direction": "forward", "precision": "fp32", "capacity": Capacity(), "scope": "layer", "device_kind": "cpu"
    }  # fmt: skip
    return Case(layer=layer, tokens=tokens, **(asked | more))


def provider_of(name: str) -> Any:
    return load(name)
