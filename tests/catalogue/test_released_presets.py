"""Presets against the released model: its config.json read by our reader, or its own code's words.

Two sources of one fact. The reader is held against transformers' code in tests/routing/test_transformers_routers.py,
so a preset that equals what is read from its makers' config.json has that code's router, experts and shared experts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moebench.catalogue.huggingface import read_config
from moebench.catalogue.models import model, models
from moebench.catalogue.spec import RouterSpec

QWEN3 = {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
V2 = {"model_type": "deepseek_v2", "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1}
GLM = {"model_type": "glm4_moe", "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
# What the makers' config.json says of the layer; a key left out here has the family's default.
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {"model_type": "mixtral"},
    "mixtral-8x22b": {
        "model_type": "mixtral", "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56,
    },
    "deepseek-v2-lite": V2 | {
        "hidden_size": 2048, "moe_intermediate_size": 1408, "n_routed_experts": 64, "num_hidden_layers": 27,
        "routed_scaling_factor": 1.0, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "norm_topk_prob": False,
    },
    "deepseek-v2": V2 | {
        "hidden_size": 5120, "moe_intermediate_size": 1536, "n_routed_experts": 160, "num_hidden_layers": 60,
        "routed_scaling_factor": 16.0, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3,
        "norm_topk_prob": False,
    },
    "deepseek-v3": {"model_type": "deepseek_v3", "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5},
    "deepseek-v4-flash": {"model_type": "deepseek_v4", "swiglu_limit": 10.0, "num_hash_layers": 3},
    "deepseek-v4-pro": {
        "model_type": "deepseek_v4", "hidden_size": 7168, "moe_intermediate_size": 3072, "n_routed_experts": 384,
        "num_hidden_layers": 61, "routed_scaling_factor": 2.5,
    },
    "kimi-k2": {
        "model_type": "kimi_k2", "hidden_size": 7168, "moe_intermediate_size": 2048, "n_routed_experts": 384,
        "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": 2.827, "first_k_dense_replace": 1, "num_hidden_layers": 61,
    },
    "glm-4.5": GLM | {
        "hidden_size": 5120, "moe_intermediate_size": 1536, "n_routed_experts": 160, "num_hidden_layers": 92,
        "routed_scaling_factor": 2.5, "first_k_dense_replace": 3, "norm_topk_prob": True,
    },
    "glm-4.5-air": GLM | {
        "hidden_size": 4096, "moe_intermediate_size": 1408, "n_routed_experts": 128, "num_hidden_layers": 46,
        "routed_scaling_factor": 1.0, "first_k_dense_replace": 1, "norm_topk_prob": True,
    },
    "glm-5": {
        "model_type": "glm_moe_dsa", "hidden_size": 6144, "moe_intermediate_size": 2048, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "num_hidden_layers": 78, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5,
    },
    "qwen1.5-moe-a2.7b": {"model_type": "qwen2_moe", "norm_topk_prob": False},
    "qwen2-57b-a14b": {
        "model_type": "qwen2_moe", "hidden_size": 3584, "moe_intermediate_size": 2560, "num_experts": 64,
        "num_experts_per_tok": 8, "shared_expert_intermediate_size": 20480, "num_hidden_layers": 28,
        "norm_topk_prob": False,
    },
    "qwen3-30b-a3b": QWEN3 | {"hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48},
    "qwen3-235b-a22b": QWEN3 | {"hidden_size": 4096, "moe_intermediate_size": 1536, "num_hidden_layers": 94},
    "qwen3-coder-480b-a35b": QWEN3 | {
        "hidden_size": 6144, "moe_intermediate_size": 2560, "num_hidden_layers": 62, "num_experts": 160,
    },
    "qwen3-next-80b-a3b": {"model_type": "qwen3_next", "norm_topk_prob": True},
    "dbrx": {
        "model_type": "dbrx", "d_model": 6144, "n_layers": 40,
        "ffn_config": {
            "ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4, "moe_normalize_expert_weights": 1,
        },
    },
    "jamba-v0.1": {"model_type": "jamba"},
    "olmoe-1b-7b": {"model_type": "olmoe", "intermediate_size": 1024, "norm_topk_prob": False},
    "phi-3.5-moe": {"model_type": "phimoe"},
    "llama4-scout": {
        "model_type": "llama4", "text_config": {"model_type": "llama4_text", "interleave_moe_layer_step": 1},
    },
    "llama4-maverick": {
        "model_type": "llama4",
        "text_config": {"model_type": "llama4_text", "num_local_experts": 128, "interleave_moe_layer_step": 2},
    },
    "gpt-oss-120b": {"model_type": "gpt_oss", "swiglu_limit": 7.0},
    "gpt-oss-20b": {"model_type": "gpt_oss", "num_local_experts": 32, "num_hidden_layers": 24},
    "minimax-01": {
        "model_type": "minimax", "hidden_size": 6144, "intermediate_size": 9216, "num_local_experts": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 80,
    },
    "minimax-m2.5": {
        "model_type": "minimax_m2", "hidden_size": 3072, "intermediate_size": 1536, "num_local_experts": 256,
        "num_experts_per_tok": 8, "num_hidden_layers": 62,
    },
    "nllb-moe-54b": {
        "model_type": "nllb-moe", "d_model": 2048, "encoder_ffn_dim": 8192, "decoder_ffn_dim": 8192,
        "encoder_layers": 24, "decoder_layers": 24, "moe_token_dropout": 0.2,
    },
    "switch-base-128": {
        "model_type": "switch_transformers", "d_model": 768, "d_ff": 3072, "num_experts": 128,
        "num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6,
    },
    "switch-large-128": {
        "model_type": "switch_transformers", "d_model": 1024, "d_ff": 4096, "num_experts": 128, "num_layers": 24,
        "num_decoder_layers": 24, "num_sparse_encoder_layers": 12, "num_sparse_decoder_layers": 12,
    },
    "switch-c-2048": {
        "model_type": "switch_transformers", "d_model": 2080, "d_ff": 6144, "num_experts": 2048, "num_layers": 15,
        "num_decoder_layers": 15, "num_sparse_encoder_layers": 15, "num_sparse_decoder_layers": 15,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_preset_is_what_its_config_says(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS[name]))
    assert read_config(path).layers == model(name).layers


# Presets that transformers has no class of (or one without their form): router, activation and shared form of their own
# code or paper.
WORDS: dict[str, tuple[RouterSpec, str, str]] = {
    "shazeer-moe-137b": (
        RouterSpec("hierarchical_noisy_topk", normalise=True, groups=256, topk_groups=2),
        "relu",
        "none",
    ),
    "gshard-600b": (RouterSpec("gshard_top2", normalise=True), "relu", "none"),
    "switch-xxl-128": (RouterSpec("switch_top1"), "geglu", "none"),
    "st-moe-32b": (RouterSpec("softmax_topk", normalise=True), "geglu", "none"),
    "glam-64b64e": (RouterSpec("gshard_top2", normalise=True), "gelu", "none"),
    "meta-moe-1.1t": (RouterSpec("gshard_top2", normalise=True), "gelu", "none"),
    "v-moe-b16": (RouterSpec("noisy_softmax_topk"), "gelu", "none"),
    "v-moe-l16": (RouterSpec("noisy_softmax_topk"), "gelu", "none"),
    "v-moe-h14": (RouterSpec("noisy_softmax_topk"), "gelu", "none"),
    "swin-moe-s-64": (RouterSpec("noisy_softmax_topk"), "gelu", "none"),
    "swin-moe-b-32": (RouterSpec("noisy_softmax_topk"), "gelu", "none"),
    "llama-moe-3.5b-4of16": (RouterSpec("noisy_topk_tanh", normalise=True, scale=4.0), "swiglu", "none"),
    "llama-moe-3.5b-2of8": (RouterSpec("noisy_topk_tanh", normalise=True, scale=4.0), "swiglu", "none"),
    "llama-moe-3.0b-2of16": (RouterSpec("noisy_topk_tanh", normalise=True, scale=8.0), "swiglu", "none"),
    "grok-1": (RouterSpec("softmax_topk"), "geglu", "none"),
    "grok-2": (RouterSpec("softcap_softmax_topk"), "geglu", "scaled_residual"),
    "deepseekmoe-16b": (RouterSpec("softmax_topk"), "swiglu", "add"),
    "deepseekmoe-145b": (RouterSpec("softmax_topk"), "swiglu", "add"),
    "arctic-480b": (RouterSpec("softmax_topk", normalise=True), "swiglu", "parallel"),
    "skywork-moe-146b": (RouterSpec("logit_standardised", normalise=True), "swiglu", "none"),
    "openmoe-8b": (RouterSpec("softmax_topk"), "swiglu", "residual"),
    "openmoe-34b": (RouterSpec("softmax_topk"), "swiglu", "residual"),
    "hunyuan-large": (RouterSpec("recycle_top1"), "swiglu", "add"),
    "yuan2-m32": (RouterSpec("attention"), "swiglu", "none"),
    "moe-llava-phi2": (RouterSpec("gumbel_top2", normalise=True), "gelu", "none"),
}


@pytest.mark.parametrize("name", WORDS)
def test_a_preset_without_a_class_is_what_its_makers_say(name: str) -> None:
    router, activation, shared = WORDS[name]
    for kind in model(name).layers:
        assert (kind.layer.router, kind.layer.activation, kind.layer.shared_combine) == (router, activation, shared)


def test_every_preset_is_held_against_a_second_source() -> None:
    presets = {spec.id for spec in models().values() if spec.layers and not spec.alias_of}
    assert presets == {*CONFIGS, *WORDS}
