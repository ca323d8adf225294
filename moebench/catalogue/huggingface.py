"""From a Hugging Face config.json to a ModelSpec: read as data, none of the checkpoint's code is run. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebench.catalogue.config_layer import layer_of
from moebench.catalogue.families import REFUSED, Family, families, known, text_family
from moebench.catalogue.mixing import mixing_params
from moebench.catalogue.names import nearest
from moebench.catalogue.parameters import Parts
from moebench.catalogue.sparse import depth, layer_counts
from moebench.catalogue.spec import LayerSpec, ModelSpec, MoELayers, RouterSpec, ffn_params
from moebench.catalogue.textfile import read_text
from moebench.catalogue.values import Values

EXPERT_KEYS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok",
    "moe_intermediate_size", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts",
)  # fmt: skip
# A multimodal config keeps its language model under one of these.
TEXT_PARTS = ("text_config", "thinker_config", "language_config", "llm_config")
# Config files that transformers reads with another family's class, or that are the same architecture.
SAME_AS = {"kimi_k2": "deepseek_v3", "minimax_m3": "minimax_m3_vl_text", "qwen3_omni_moe": "qwen3_omni_moe_thinker"}


def read_config(path: Path) -> ModelSpec:
    """The model a config.json describes; keys it leaves out take its family's defaults.

    Args:
        path: a file of at most 10 MB.

    Raises:
        ValueError: not readable, not JSON, not a mixture of experts, an unknown family, or an impossible value;
            one line with the file, the key, what was found and what is allowed.
    """
    config = _parse(path)
    try:
        family, part, nested = _family(str(path), config)
    except RecursionError:
        raise ValueError(f"{path}: not a config.json: nested too deeply") from None
    values = Values(str(path), part, family.defaults)
    hidden_size = values.count(family.hidden)
    layers = depth(family.sparse, values, family.layers)
    kinds, dense = _kinds(family, values, hidden_size, layers)
    # The head belongs to the outer model: what that says of it stands above the text part's own word.
    outer = Values(str(path), config, {}) if nested and "tie_word_embeddings" in config else values
    parts = _parts(family, values, hidden_size, layers, kinds, dense, outer.flag("tie_word_embeddings"))
    return ModelSpec(
        id=path.stem if path.stem != "config" else path.resolve().parent.name or "config",
        title=family.model_type,
        year=None,
        layers=kinds,
        computed_total=parts.total if parts else None,
        computed_active=parts.active if parts else None,
        uncounted=_uncounted(family, values, parts, nested),
        source=str(path),
        notes=f"read from {path.name} as {family.model_type}",
    )


def _parse(path: Path) -> dict[str, Any]:
    text = read_text(path)
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise ValueError(f"{path}: not a config.json: nested too deeply") from None
    except ValueError:
        raise ValueError(f"{path}: holds a number of thousands of digits") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds a JSON {type(config).__name__}; a config.json is an object")
    return config


def _family(where: str, config: dict[str, Any]) -> tuple[Family, Mapping[str, Any], bool]:
    """The family, the object with its keys, and whether that is a part of a larger model."""
    model_type = config.get("model_type")
    if model_type is not None and not isinstance(model_type, str):
        raise ValueError(f"{where}: model_type is {str(model_type)[:60]!r}; it must be text")
    name = SAME_AS.get(model_type or "", model_type or "")
    family = families().get(name)
    if family is not None:
        return family, config, False
    inner = text_family(name)
    if inner is not None:
        return inner, _innermost(where, config), True
    if name in REFUSED or name.removesuffix("_text") in REFUSED:
        reason = REFUSED.get(name) or REFUSED[name.removesuffix("_text")]
        raise ValueError(f"{where}: model_type {name!r} is a mixture of experts, but not one layer of ours: {reason}")
    for part in TEXT_PARTS:
        nested = config.get(part)
        if isinstance(nested, dict):
            family, innermost, _ = _family(where, nested)
            return family, innermost, True
    raise _no_family(where, name, config)


def _no_family(where: str, name: str, config: Mapping[str, Any]) -> ValueError:
    if not name:
        return ValueError(f"{where}: model_type is missing; a config.json names its family there")
    if any(key in config for key in EXPERT_KEYS):
        families_known = known()
        hint = nearest(name, families_known)
        return ValueError(f"{where}: unknown MoE family {name[:60]!r}{hint}; known are {', '.join(families_known)}")
    return ValueError(f"{where}: model_type {name[:60]!r} is not a mixture of experts (it counts no experts)")


def _innermost(where: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    part: Any = config
    found = True
    while found:
        found = False
        for name in TEXT_PARTS:
            inner = part.get(name)
            if inner is None:
                continue
            if not isinstance(inner, dict):
                raise ValueError(f"{where}: {name} is {str(inner)[:60]!r}; it must be an object")
            part, found = inner, True
            break
    return {} if part is config else part


def _kinds(family: Family, values: Values, hidden_size: int, layers: int) -> tuple[tuple[MoELayers, ...], int]:
    counts, dense = layer_counts(family.sparse, values, layers)
    layer = layer_of(family, values, hidden_size)
    kinds = tuple(
        MoELayers(name, _hashed(layer) if name == "hash" else layer, count) for name, count in counts.items() if count
    )
    if not kinds:
        raise ValueError(f"{values.where}: none of its {layers} layers is an MoE layer")
    return (MoELayers("", kinds[0].layer, kinds[0].count),) if len(kinds) == 1 else kinds, dense


def _hashed(layer: LayerSpec) -> LayerSpec:
    router = RouterSpec("hash_sqrt_softplus", layer.router.normalise, layer.router.scale)
    return LayerSpec(**{**layer.__dict__, "router": router})


def _parts(
    family: Family,
    values: Values,
    hidden_size: int,
    layers: int,
    kinds: tuple[MoELayers, ...],
    dense: int,
    tied: bool,
) -> Parts | None:
    """The whole model's parameters, or None where its attention is not modelled."""
    if not family.attention:
        return None
    layer = kinds[0].layer
    one = ffn_params(hidden_size, values.count(family.dense), gated=layer.gated, bias=layer.expert_bias) if dense else 0
    vocabulary = values.count("vocab_size")
    head_bias = vocabulary if values.flag("lm_head_bias") else 0
    vectors = int(family.norms.rstrip("b")) * (2 if family.norms.endswith("b") else 1)
    final = 0 if vectors == 0 else 2 if family.norms.endswith("b") else 1
    return Parts(
        embedding=hidden_size * vocabulary * (1 if tied else 2) + head_bias,
        mixing=mixing_params(family.attention, values, hidden_size, layers),
        dense=dense * one,
        layers=kinds,
        norms=hidden_size * (vectors * layers + final),
    )


def _uncounted(family: Family, values: Values, parts: Parts | None, nested: bool) -> str | None:
    if parts is None:
        return f"the attention of {family.model_type} is not modelled"
    left_out = ["vision and audio towers"] if nested else []
    if values.optional_count("num_nextn_predict_layers|num_mtp_layers"):
        left_out.append("multi-token-prediction layers")
    return f"not counted: {', '.join(left_out)}" if left_out else None
