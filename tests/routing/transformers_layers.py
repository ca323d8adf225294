"""The released oracle: transformers' own MoE block of a family, small and random, and its weights in our layout.

A block is built from its config alone, without the model around it. Weights are drawn anew, biases and selection biases
too: a bias that stays zero tests nothing.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moebench.catalogue.families import families
from moebench.catalogue.huggingface import read_config
from moebench.catalogue.spec import LayerSpec
from moebench.weights import Weights

TOKENS, WIDTH, FFN, EXPERTS, PICKS = 32, 32, 20, 16, 3

# The class that holds router, experts and shared experts. In transformers' module of the family's name, or of another.
BLOCKS = {
    "afmoe": "AfmoeSparseMoeBlock", "aria_text": "AriaTextMoELayer", "axk1": "AXK1MoE", "axk2": "AXK2MoE",
    "bailing_hybrid": "BailingHybridMoE", "beam": "BeamMoE", "cohere2_moe": "Cohere2MoeSparseMoeBlock",
    "dbrx": "DbrxFFN", "deepseek_ocr2_text": "DeepseekOcr2TextMoe", "deepseek_v2": "DeepseekV2Moe",
    "deepseek_v3": "DeepseekV3MoE", "deepseek_v32": "DeepseekV32MoE", "deepseek_v4": "DeepseekV4SparseMoeBlock",
    "dots1": "Dots1MoE", "dots3_note_text": "Dots3NoteTextMoE", "ernie4_5_moe": "Ernie4_5_MoeSparseMoeBlock",
    "exaone_moe": "ExaoneMoeSparseMoEBlock", "flex_olmo": "FlexOlmoSparseMoeBlock", "flint": "FlintSparseMoeBlock",
    "glm4_moe": "Glm4MoeMoE", "glm4_moe_lite": "Glm4MoeLiteMoE", "glm4v_moe_text": "Glm4vMoeTextMoE",
    "glm5_next_text": "Glm5NextTextMoE", "glm_moe_dsa": "GlmMoeDsaMoE", "gpt_oss": "GptOssMLP",
    "granitemoe": "GraniteMoeMoE", "granitemoe_swa": "GraniteMoeSWAMoE", "granitemoehybrid": "GraniteMoeHybridMoE",
    "granitemoeshared": "GraniteMoeSharedMoE", "hunyuan_v1_moe": "HunYuanMoEV1Moe", "hy_v3": "HYV3MoE",
    "hy_v4": "HYV4MoE", "hy_v4_vl_text": "HYV4VLMoE", "jamba": "JambaSparseMoeBlock", "jetmoe": "JetMoeMoE",
    "kimi_linear": "KimiLinearMoE", "kolibri1": "Kolibri1SparseMoeBlock", "laguna": "LagunaSparseMoeBlock",
    "lara_mini": "LaraMiniSparseMoeBlock", "lfm2_moe": "Lfm2MoeSparseMoeBlock", "llama4_text": "Llama4TextMoe",
    "longcat_flash": "LongcatFlashMoE", "mellum": "MellumSparseMoeBlock", "mimo_v2_flash": "MiMoV2FlashMoE",
    "minimax": "MiniMaxSparseMoeBlock", "minimax_m2": "MiniMaxM2SparseMoeBlock",
    "minimax_m3_vl_text": "MiniMaxM3VLSparseMoeBlock", "mistral4": "Mistral4MoE",
    "mistral_large4_text": "MistralLarge4TextMoE", "mixtral": "MixtralSparseMoeBlock", "nemotron_h": "NemotronHMoE",
    "nllb-moe": "NllbMoeSparseMLP", "olmoe": "OlmoeSparseMoeBlock", "openai_privacy_filter": "OpenAIPrivacyFilterMLP",
    "phimoe": "PhimoeSparseMoeBlock", "qwen2_moe": "Qwen2MoeSparseMoeBlock",
    "qwen3_5_moe_text": "Qwen3_5MoeSparseMoeBlock", "qwen3_moe": "Qwen3MoeSparseMoeBlock",
    "qwen3_next": "Qwen3NextSparseMoeBlock", "qwen3_omni_moe_text": "Qwen3OmniMoeThinkerTextSparseMoeBlock",
    "qwen3_vl_moe_text": "Qwen3VLMoeTextSparseMoeBlock", "sarvam_mla": "deepseek_v3:DeepseekV3MoE",
    "sarvam_moe": "glm4_moe:Glm4MoeMoE", "solar_open": "SolarOpenMoE",
    "switch_transformers": "SwitchTransformersSparseMLP", "unlimited_ocr_text": "UnlimitedOcrTextMoe",
}  # fmt: skip
# Granite's decoder layer adds a shared network of its own to the block's output.
BESIDE = {
    "granitemoe_swa": "GraniteMoeSWAMLP",
    "granitemoehybrid": "GraniteMoeHybridMLP",
    "granitemoeshared": "GraniteMoeSharedMLP",
}
# What a config of this width needs to be valid, and shared experts of a width of their own.
_SHARED = ("flint", "kolibri1", "laguna", "lara_mini", "qwen2_moe", "qwen3_5_moe_text", "qwen3_next")
_FEW_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "first_k_dense_replace": 1}
NEEDED: dict[str, dict[str, Any]] = {
    **{name: {"shared_expert_intermediate_size": 24} for name in _SHARED},
    **{name: {"shared_intermediate_size": 24} for name in ("granitemoe_swa", "granitemoeshared", "minimax_m3_vl_text")},
    "dbrx": {
        "d_model": WIDTH, "n_layers": 2, "attn_config": {"rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": WIDTH, "ffn_hidden_size": FFN, "moe_num_experts": EXPERTS, "moe_top_k": PICKS,
        },
    },
    "cohere2_moe": {"num_shared_experts": 2, "shared_expert_combination_strategy": "sum"},
    "deepseek_ocr2_text": _FEW_HEADS,
    "dots1": {"n_shared_experts": 2},
    "granitemoehybrid": {"shared_intermediate_size": 24, "mamba_n_heads": 8, "mamba_d_head": 8},
    "llama4_text": {"num_experts_per_tok": 1},
    "longcat_flash": {"zero_expert_num": 6},
    "nemotron_h": {"moe_shared_expert_intermediate_size": 24, "layers_block_type": ["moe"]},
    "nllb-moe": {"decoder_ffn_dim": FFN},
    "phimoe": {"num_experts_per_tok": 2},
    "switch_transformers": {"expert_capacity": TOKENS},
    "unlimited_ocr_text": _FEW_HEADS,
}  # fmt: skip
# Experts' inputs this much larger, so that limits of 7 are reached.
LOUD = {"gpt_oss": 6.0, "openai_privacy_filter": 6.0, "minimax_m3_vl_text": 6.0}


@dataclass(frozen=True)
class Block:
    """A block and the layer that our own reader makes of its config."""

    model_type: str
    layer: LayerSpec
    module: nn.Module
    router: nn.Module
    beside: nn.Module | None


def block(model_type: str, folder: Path, kind: str = "", **changed: Any) -> Block:
    """Build the block of a family and read its layer.

    Args:
        model_type: a row of families.csv.
        folder: where its config.json is written.
        kind: of MoE layer, where the model has several.
        changed: values of the config, above the small sizes.
    """
    config = config_of(model_type, **changed)
    config.to_json_file(folder / "config.json", use_diff=False)
    layers = {each.name: each.layer for each in read_config(folder / "config.json").layers}
    module = _module(model_type, config, kind).eval()
    router = module.gate if hasattr(module, "gate") else module.router
    beside = getattr(_modeling(model_type), BESIDE[model_type])(config).eval() if model_type in BESIDE else None
    for each in (module, *([beside] if beside else [])):
        _draw(each, LOUD.get(model_type, 1.0))
    return Block(model_type, layers[kind or next(reversed(layers))], module, router, beside)


def config_of(model_type: str, **changed: Any) -> Any:
    """A small config; skips the test where the installed transformers is older than the family."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {model_type}")
    row = families()[model_type]
    named = {row.hidden: WIDTH, row.experts: EXPERTS, row.top_k: PICKS, row.ffn: FFN, "vocab_size": 100}
    first = {name.removeprefix("each ").split("|")[0]: value for name, value in named.items()}
    sizes = {name: value for name, value in first.items() if name[0] != "=" and "." not in name}
    return CONFIG_MAPPING[model_type](**sizes | NEEDED.get(model_type, {}) | changed)


def _modeling(model_type: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    other, _, _ = BLOCKS[model_type].rpartition(":")
    own = CONFIG_MAPPING[model_type].__module__.rpartition(".")[0].rpartition(".")[2]
    return importlib.import_module(f"transformers.models.{other or own}.modeling_{other or own}")


def _module(model_type: str, config: Any, kind: str) -> nn.Module:
    cls = getattr(_modeling(model_type), BLOCKS[model_type].rpartition(":")[2])
    arguments: dict[str, Any] = {}
    if model_type == "deepseek_v4":
        arguments["layer_idx"] = config.mlp_layer_types.index("hash_moe" if kind == "hash" else "moe")
    if model_type == "nllb-moe":
        arguments["ffn_dim"] = FFN
    module: nn.Module = cls(config, **arguments)
    if model_type == "axk1":
        module.post_mlp_layernorm = nn.Identity()  # a norm after the layer, no part of a LayerSpec
    return module


@torch.no_grad()
def _draw(module: nn.Module, loudness: float) -> None:
    generator = torch.Generator().manual_seed(20)
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if not value.is_floating_point():
            picks = torch.rand(value.shape[0], EXPERTS, generator=generator).argsort(dim=1)
            value.copy_(picks[:, : value.shape[1]])
            continue
        std = 0.3 if value.dim() < 2 or name.endswith("bias") else WIDTH**-0.5
        value.normal_(std=std * (loudness if "gate_up" in name else 1.0), generator=generator)
    if type(module).__name__ == BLOCKS["phimoe"]:
        # Logits within 2 % of each other, of both signs: else its mask leaves one expert and every weight is 1.
        value = module.get_parameter("router.weight")
        value.copy_(4 * value[:1] + 0.3 * value)
    if type(module).__name__ == BLOCKS["jetmoe"]:
        module.get_parameter("bias").zero_()  # added to the layer's output; a LayerSpec has none


def gate_weights(built: Block) -> dict[str, Tensor]:
    """The router's weights under our names."""
    found = dict(built.module.named_parameters()) | dict(built.module.named_buffers())
    first = {ours: next((found[name] for name in names if name in found), None) for ours, names in GATE_NAMES.items()}
    weights = {ours: value.detach() for ours, value in first.items() if value is not None}
    return {ours: value.flatten() if ours.endswith("bias") else value for ours, value in weights.items()}


GATE_NAMES = {
    "router": (
        "gate.weight", "router.weight", "router.gate.weight", "gate.wg.weight", "router.layer.weight",
        "router.classifier.weight",
    ),
    "logit_bias": ("router.bias", "router.classifier.bias"),
    "selection_bias": (
        "gate.e_score_correction_bias", "e_score_correction_bias", "expert_bias", "router.e_score_correction_bias",
        "gate.moe_statics.e_score_correction_bias",
    ),
    "table": ("gate.tid2eid",),
}  # fmt: skip


def expert_weights(built: Block) -> dict[str, Tensor]:
    """w_gate_up, w_down, b_gate_up, b_down, shared_gate_up, shared_down, shared_gate: those that the block has."""
    experts = built.module.experts if hasattr(built.module, "experts") else built.module
    weights = _dbrx(experts) if built.model_type == "dbrx" else _listed(experts) or _stacked(built, experts)
    return {name: value.detach() for name, value in (weights | _shared(built)).items()}


def _dbrx(experts: Any) -> dict[str, Tensor]:
    w1, v1, w2 = (getattr(experts.mlp, name).view(EXPERTS, FFN, WIDTH) for name in ("w1", "v1", "w2"))
    return {"w_gate_up": torch.cat([w1, v1], dim=1), "w_down": w2.transpose(1, 2)}


def _listed(experts: Any) -> dict[str, Tensor]:
    """Experts that are modules of their own (Switch, NLLB)."""
    if not isinstance(experts, nn.ModuleDict):
        return {}
    places = {"wi.weight": "w_gate_up", "fc1.weight": "w_gate_up", "fc1.bias": "b_gate_up", "fc2.bias": "b_down"}
    each = [dict(experts[f"expert_{e}"].named_parameters()) for e in range(EXPERTS)]
    return {places.get(name, "w_down"): torch.stack([one[name] for one in each]) for name in each[0]}


def _stacked(built: Block, experts: Any) -> dict[str, Tensor]:
    found = dict(experts.named_parameters())
    first = next(found[name] for name in ("gate_up_proj", "up_proj", "input_linear.weight") if name in found)
    second = next(found[name] for name in ("down_proj", "output_linear.weight") if name in found)
    if first.shape[1] == WIDTH:  # [E, D, 2F] instead of [E, 2F, D]
        first, second = first.transpose(1, 2), second.transpose(1, 2)
    weights = {"w_gate_up": first[:EXPERTS], "w_down": second}  # LongCat keeps rows for its zero experts too
    if "gate_up_proj_bias" in found:
        weights |= {"b_gate_up": found["gate_up_proj_bias"], "b_down": found["down_proj_bias"]}
    if built.model_type == "gpt_oss":  # gate and up alternate
        for name in ("w_gate_up", "b_gate_up"):
            weights[name] = torch.cat([weights[name][:, 0::2], weights[name][:, 1::2]], dim=1)
    return weights


def _shared(built: Block) -> dict[str, Tensor]:
    inside = dict(built.module.named_children())
    names = [name for name in ("shared_experts", "shared_expert", "shared_mlp") if name in inside]
    shared = inside[names[0]] if names else built.beside
    if shared is None:
        return {}
    found = {name.removesuffix(".weight"): value for name, value in shared.named_parameters()}
    parts = [found[name] for name in ("gate_proj", "gate_up_proj", "input_linear", "up_proj") if name in found]
    down = found["output_linear" if "output_linear" in found else "down_proj"]
    gate = {"shared_gate": inside["shared_expert_gate"].weight} if "shared_expert_gate" in inside else {}
    return {"shared_gate_up": torch.cat(parts), "shared_down": down, **gate}


def weights_of(built: Block) -> Weights:
    """All of the block's weights in our layout."""
    gate = gate_weights(built)
    return Weights(router=gate.pop("router"), gate=gate, **expert_weights(built))


@dataclass(frozen=True)
class Released:
    """What the block did: `weights` [T, E] as they reach an expert's output (Llama 4: its input), 0 where not chosen;
    ids [T, K] best first, where the block has an order; y [T, D]."""

    weights: Tensor
    ids: Tensor | None
    y: Tensor


@torch.no_grad()
def run(built: Block, x: Tensor, token_ids: Tensor) -> Released:
    """One forward pass of the block over x [T, D], its router watched."""
    seen: list[Any] = []
    handle = built.router.register_forward_hook(lambda module, args, out: seen.append(out))
    arguments = {"input_ids": token_ids[None]} if built.layer.router.kind.startswith("hash") else {}
    y = built.module(x[None].clone(), **arguments)
    handle.remove()
    y = (y[0] if isinstance(y, tuple) else y).reshape(x.shape)
    if built.beside is not None:
        y = y + built.beside(x)
    weights, ids = _choices(built, seen[0])
    return Released(weights, ids, _nllb(built, x, weights) if built.model_type == "nllb-moe" else y)


def _choices(built: Block, out: Any) -> tuple[Tensor, Tensor | None]:
    """Dense weights [T, E + zero experts] and, where the router sorts, ids."""
    module: Any = built.module
    if built.model_type == "dbrx":
        values, ids = module.route_tokens_to_experts(out)
    elif built.model_type == "llama4_text":
        return out[0], None
    elif built.model_type == "switch_transformers":
        return (out[0] * out[1])[0], None
    elif built.model_type == "nllb-moe":
        return out[1] * (1 - module.experts.moe_token_dropout), None
    elif built.model_type == "jetmoe":
        _, token, gates, sizes, _ = out
        expert = torch.arange(EXPERTS).repeat_interleave(torch.tensor(sizes))
        return torch.zeros(TOKENS, EXPERTS).index_put((token, expert), gates), None
    else:
        _, values, ids = out
    factor = PICKS if built.model_type == "openai_privacy_filter" else getattr(module, "routed_scaling_factor", 1.0)
    dense = torch.zeros(TOKENS, EXPERTS + built.layer.router.zero_experts).scatter(1, ids, values * factor)
    sorts = "sorted=False" not in inspect.getsource(type(built.router)) and "tid2eid" not in dir(built.router)
    return dense, ids if sorts else None


def _nllb(built: Block, x: Tensor, weights: Tensor) -> Tensor:
    """Its experts and weights, our sum: its own loop (5.24) codes a mask as one-hot and runs experts 0 and 1 only."""
    experts: Any = built.module.experts
    outputs = torch.stack([experts[f"expert_{e}"](x) for e in range(EXPERTS)], dim=1)
    return (weights.unsqueeze(2) * outputs).sum(1)
