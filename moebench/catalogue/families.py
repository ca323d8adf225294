"""The Hugging Face MoE families: where each config.json keeps what, and what it means when it is silent. No torch.

One row of families.csv a family:
    experts, top_k, ffn, dense, layers, hidden: key names; ffn is a routed expert's width, dense a dense layer's;
        "each KEY": the file may also hold a list of one number a layer
    router, normalise, scale, shared, activation: rules of `moebench.catalogue.config_layer`
    sparse: which layers are MoE layers, a rule of `moebench.catalogue.sparse`
    attention: a rule of `moebench.catalogue.mixing`; blank where it is not modelled
    norms: norm vectors a layer ("b": with biases)
    vision_of: the multimodal model whose text part this is
    defaults: what transformers takes for a key that is left out
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Family:
    """One row of families.csv."""

    model_type: str
    experts: str
    top_k: str
    ffn: str
    router: str
    normalise: str
    scale: str
    shared: str
    sparse: str
    activation: str
    attention: str
    norms: str
    dense: str
    layers: str
    hidden: str
    vision_of: str
    defaults: Mapping[str, Any]


# Families with experts whose layer is not what a LayerSpec says; they are refused by name.
REFUSED = {
    "diffusion_gemma": "its dense and expert FFNs run side by side with norms of their own",
    "doge": "its experts are single neurons found by product keys",
    "ernie4_5_vl_moe": "text and image tokens have experts of different widths",
    "gemma4": "its dense and expert FFNs run side by side with norms of their own",
    "inkling": "its router also weighs the shared experts",
    "inkling_mm_model": "its router also weighs the shared experts",
    "inkling2": "its experts cap their gate and up values",
    "inkling2_loop": "its experts cap their gate and up values",
    "muse_spark": "its experts run in a narrower space behind a projection",
    "qwen4_exp": "its layers join through hyper-connections with extra embeddings",
    "step3p5": "its activation is clamped differently from layer to layer",
    "step3p7": "its activation is clamped differently from layer to layer",
    "vitpose_backbone": "its experts are chosen by data set, not by token",
    "zaya": "its router is a network with state, and may skip the experts",
}


@cache
def families() -> Mapping[str, Family]:
    """The families by model_type."""
    text = files("moebench.catalogue").joinpath("families.csv").read_text(encoding="utf-8")
    return MappingProxyType({row["model_type"]: _family(row) for row in csv.DictReader(text.splitlines())})


def known() -> list[str]:
    """Every model_type that is read, multimodal ones by their own name."""
    return sorted({family.vision_of or family.model_type for family in families().values()})


def text_family(model_type: str) -> Family | None:
    """The family of a multimodal model's text part, or None."""
    if not model_type:
        return None
    return next((family for family in families().values() if family.vision_of == model_type), None)


def _family(row: dict[str, str]) -> Family:
    pairs = (item.partition("=") for item in row.pop("defaults").split(";"))
    defaults = {key: json.loads(value) for key, _, value in pairs}
    return Family(**row, defaults=MappingProxyType(defaults))
