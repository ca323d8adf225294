"""Small models of every family, built from transformers' own classes on the meta device (shapes, no memory)."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

# What keeps a default model small enough to build fast, and what a class cannot do without.
LAYERS = {"dbrx": "n_layers", "longcat_flash": "num_layers", "switch_transformers": "num_layers"}
NEEDED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "deepseek_ocr2_text": {"num_experts_per_tok": 6, "mlp_layer_types": ["dense", *["sparse"] * 5]},
    "dots1": {"n_routed_experts": 16, "n_shared_experts": 2, "num_experts_per_tok": 4, "first_k_dense_replace": 1},
    "granitemoeshared": {"shared_intermediate_size": 512},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "head_dim": 128},
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv", "conv", "full_attention"]},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "minimax_m3_vl_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse", "sparse", "sparse"]},
    "nllb-moe": {"encoder_layers": 4, "decoder_layers": 8, "num_experts": 4, "vocab_size": 1000},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"]},
    "cohere2_moe": {"num_shared_experts": 2, "shared_expert_combination_strategy": "sum", "first_k_dense_replace": 1},
    "switch_transformers": {"num_layers": 4, "num_sparse_encoder_layers": 2, "num_decoder_layers": 6},
}
# transformers' own class names where the Auto classes do not lead to them: module, config class, model class.
CLASSES = {
    "aria_text": ("aria", "AriaTextConfig", "AriaTextForCausalLM"),
    "deepseek_ocr2_text": ("deepseek_ocr2", "DeepseekOcr2TextConfig", "DeepseekOcr2TextModel"),
    "nllb-moe": ("nllb_moe", "NllbMoeConfig", "NllbMoeForConditionalGeneration"),
    "qwen3_omni_moe_text": ("qwen3_omni_moe", "Qwen3OmniMoeTextConfig", "Qwen3OmniMoeThinkerTextModel"),
    "switch_transformers": ("switch_transformers", "SwitchTransformersConfig",
                            "SwitchTransformersForConditionalGeneration"),
    "unlimited_ocr_text": ("unlimited_ocr", "UnlimitedOcrTextConfig", "UnlimitedOcrTextModel"),
}  # fmt: skip
# Families that older transformers releases, which we also support, do not have: the first release with each.
FIRST_IN = dict.fromkeys(("hy_v4_vl_text", "lara_mini", "sarvam_mla", "sarvam_moe"), (5, 24))
DEPTH = 6
VOCABULARY = 300_000  # above every default padding id


def config_of(model_type: str, **changed: Any) -> Any:
    """A transformers config of `model_type`: its own defaults but for the depth, what `NEEDED` says, and `changed`.

    Skips the test where the installed transformers is older than the family.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    installed = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if installed < FIRST_IN.get(model_type, (0, 0)):
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    cls = _named(model_type, 1) if model_type in CLASSES else CONFIG_MAPPING[model_type]
    keys = dict(NEEDED.get(model_type, {}))
    if model_type not in ("nllb-moe", "switch_transformers", "nemotron_h"):
        keys[LAYERS.get(model_type, "num_hidden_layers")] = DEPTH
    return cls(**keys | changed)


def model_of(model_type: str, config: Any) -> torch.nn.Module:
    """The model of `config` on the meta device, with its language-model head where the class has one."""
    from transformers import AutoModel, AutoModelForCausalLM

    with torch.device("meta"):
        if model_type in CLASSES:
            return _named(model_type, 2)(config)
        try:
            return AutoModelForCausalLM.from_config(config)
        except ValueError:
            return AutoModel.from_config(config)


def _named(model_type: str, which: int) -> Any:
    module, *names = CLASSES[model_type]
    part = "configuration" if which == 1 else "modeling"
    return getattr(importlib.import_module(f"transformers.models.{module}.{part}_{module}"), names[which - 1])


# Selection biases are no weights of the layer (design: auxiliary biases are not counted).
AUXILIARY = re.compile(r"e_score_correction_bias|mlp\.expert_bias|feed_forward\.expert_bias|\.mlp\.bias$")
MOE = re.compile(
    r"(\.experts[._]|\.router\.|\.mlp\.gate\.|\.mixer\.gate\.|feed_forward\.gate\.|shared_expert|shared_mlp|\.wg\.|\.mlp\.(?:in|out)put_linear)"
)


def moe_layers(model: torch.nn.Module) -> dict[str, int]:
    """Layer's name -> parameters of its experts, router and shared experts, for every layer that has experts."""
    totals: dict[str, int] = {}
    sparse = set()
    for name, parameter in model.named_parameters():
        layer = re.search(r"^(.*?(?:layers|blocks|block)\.\d+)\.", name)
        if layer is None or "self_att" in name or AUXILIARY.search(name):
            continue
        if MOE.search(name):
            totals[layer[1]] = totals.get(layer[1], 0) + parameter.numel()
            if ".experts" in name or "input_linear" in name:
                sparse.add(layer[1])
    return {name: total for name, total in totals.items() if name in sparse}


def other_sizes(model_type: str) -> dict[str, Any]:
    """Sizes no family has by default, under the family's own keys."""
    from moebench.catalogue.families import families

    row = families()[model_type]
    if model_type == "dbrx":
        ffn = {"hidden_size": 1024, "moe_num_experts": 24, "moe_top_k": 3, "ffn_hidden_size": 320}
        return {"d_model": 1024, "vocab_size": VOCABULARY, "n_heads": 8, "ffn_config": ffn}
    first = {
        name: getattr(row, name).removeprefix("each ").split("|")[0]
        for name in ("hidden", "experts", "top_k", "ffn", "dense")
    }
    sizes = {first["ffn"]: 320, first["experts"]: 24, first["hidden"]: 960, "vocab_size": VOCABULARY}
    if first["dense"] and first["dense"] != first["ffn"]:
        sizes[first["dense"]] = 448
    if not first["top_k"].startswith("="):
        sizes[first["top_k"]] = 3
    if model_type == "nllb-moe":
        sizes |= {"decoder_ffn_dim": 320}
    return sizes | SHARED_SIZES.get(model_type, {})


SHARED_SIZES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"shared_expert_intermediate_size": 640, "mlp_only_layers": [0, 3], "qkv_bias": False},
    "qwen3_moe": {"decoder_sparse_step": 4, "tie_word_embeddings": True, "attention_bias": True},
    "qwen3_next": {"shared_expert_intermediate_size": 640, "linear_num_key_heads": 8, "linear_value_head_dim": 64},
    "granitemoeshared": {"shared_intermediate_size": 640},
    "granitemoehybrid": {"shared_intermediate_size": 640, "mamba_n_heads": 60, "mamba_d_head": 32},
    "deepseek_v2": {"n_shared_experts": 3, "q_lora_rank": None, "kv_lora_rank": 256, "first_k_dense_replace": 2},
    "deepseek_v3": {"n_shared_experts": 2, "qk_rope_head_dim": 32, "v_head_dim": 96, "first_k_dense_replace": 1},
    "glm4_moe": {"use_qk_norm": True, "head_dim": 128, "attention_bias": True},
    "gpt_oss": {"attention_bias": False},
    "jamba": {
        "expert_layer_period": 3,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "mamba_expand": 1,
        "mamba_proj_bias": True,
    },
    "glm_moe_dsa": {"indexer_types": ["full", "full", "shared", "shared", "full", "shared"]},
    "llama4_text": {"interleave_moe_layer_step": 3, "num_attention_heads": 8},
    "ernie4_5_moe": {"moe_layer_start_index": 2, "moe_layer_end_index": 4, "moe_num_shared_experts": 1},
    "minimax": {"layer_types": ["linear_attention"] * 4 + ["full_attention"] * 2},
    "afmoe": {"num_dense_layers": 3, "num_shared_experts": 1},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 3, "num_heads": 8},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 4},
    "nemotron_h": {"moe_shared_expert_intermediate_size": 640},
    "hy_v4_vl_text": {"n_shared_experts": 2, "mlp_layer_types": ["dense", "dense", *["sparse"] * 4]},
    "lara_mini": {
        "shared_expert_intermediate_size": 640,
        "layer_types": ["linear_attention"] * 4 + ["full_attention", "sliding_attention"],
        "linear_num_key_heads": 4,
        "linear_value_head_dim": 64,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "sarvam_mla": {"n_shared_experts": 2, "q_lora_rank": 768, "attention_bias": True, "first_k_dense_replace": 2},
    "sarvam_moe": {"n_shared_experts": 2, "use_qk_norm": False, "attention_bias": True, "head_dim": 96},
}

EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num")


def families_with_experts() -> set[str]:
    """model_types of transformers' config classes that count experts, read from their source: no import of hundreds."""
    import transformers

    found = set()
    for path in Path(transformers.__file__).parent.glob("models/*/configuration_*.py"):
        source = path.read_text(encoding="utf-8")
        if any(key in source for key in EXPERT_KEYS):
            found |= {_model_type(node) for node in ast.parse(source).body if isinstance(node, ast.ClassDef)} - {None}
    return found


def _model_type(node: ast.ClassDef) -> str | None:
    counts = any(isinstance(s, ast.AnnAssign) and ast.unparse(s.target) in EXPERT_KEYS for s in node.body)
    named = [s.value for s in node.body if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == "model_type"]
    return ast.literal_eval(named[0]) if counts and named else None
