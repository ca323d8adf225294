"""Every family's config.json against transformers' own model of it, built on the meta device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny

from moebench.catalogue.families import REFUSED, families, known
from moebench.catalogue.huggingface import read_config


def zero_experts(config: Any) -> int:
    """LongCat's zero experts return their input, but transformers keeps maps for them that it never uses."""
    return int(config.zero_expert_num * config.hidden_size * 2 * config.expert_ffn_hidden_size)


# What transformers holds beyond a LayerSpec's count: model_type -> parameters in each MoE layer, in or beside it.
IN_LAYER: dict[str, Callable[[Any], int]] = {"longcat_flash": zero_experts}
BESIDE_LAYER: dict[str, Callable[[Any], int]] = {"axk1": lambda config: config.hidden_size}  # a norm after the MoE


def save(config: Any, folder: Path, use_diff: bool) -> Path:
    path = folder / "config.json"
    config.to_json_file(path, use_diff=use_diff)
    return path


def compare(model_type: str, config: Any, path: Path) -> None:
    """Our counts are transformers' own: each MoE layer, and the whole model where we claim one."""
    spec = read_config(path)
    model = tiny.model_of(model_type, config)
    extra = IN_LAYER.get(model_type, lambda config: 0)(config)
    ours = sorted(kind.layer.total_params() + extra for kind in spec.layers for _ in range(kind.count))
    assert ours == sorted(tiny.moe_layers(model).values())
    if spec.computed_total is None:
        assert families()[model_type].attention == ""
        assert spec.uncounted
        return
    named = {name: parameter for name, parameter in model.named_parameters() if not tiny.AUXILIARY.search(name)}
    theirs = sum(parameter.numel() for parameter in named.values())
    if not getattr(config, "tie_word_embeddings", False) and not any("lm_head" in name for name in named):
        theirs += config.hidden_size * config.vocab_size
    beside = BESIDE_LAYER.get(model_type, lambda config: 0)(config)
    assert spec.computed_total + spec.moe_layers * (extra + beside) == theirs


@pytest.mark.parametrize("model_type", families())
def test_a_config_that_states_only_what_differs_takes_the_defaults(model_type: str, tmp_path: Path) -> None:
    config = tiny.config_of(model_type)
    compare(model_type, config, save(config, tmp_path, use_diff=True))


@pytest.mark.parametrize("model_type", families())
def test_every_size_is_read_from_the_file(model_type: str, tmp_path: Path) -> None:
    config = tiny.config_of(model_type, **tiny.other_sizes(model_type))
    path = save(config, tmp_path, use_diff=False)
    compare(model_type, config, path)
    layer = read_config(path).layers[0].layer
    sizes = tiny.other_sizes(model_type)
    row = families()[model_type]
    for key, ours in ((row.hidden, layer.hidden_size), (row.experts, layer.routed_experts), (row.top_k, layer.top_k)):
        first = key.removeprefix("each ").split("|")[0]
        if first in sizes:
            assert ours == sizes[first]


# Multimodal models without a family of their own: their text part names one.
THROUGH_THEIR_TEXT = {"kimi_k25": "deepseek_v3", "nemo_speechlm": "nemotron_h"}


@pytest.mark.parametrize("outer", THROUGH_THEIR_TEXT)
def test_a_text_part_that_names_its_family_is_read(outer: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": outer, "text_config": {"model_type": THROUGH_THEIR_TEXT[outer]}}))
    assert read_config(path).title == THROUGH_THEIR_TEXT[outer]


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_family_we_cannot_express_is_refused_with_its_reason(model_type: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": model_type, "num_experts": 8}))
    with pytest.raises(ValueError, match=REFUSED[model_type]):
        read_config(path)


# Experts outside the language model, which is read.
OTHER_TOWERS = ("dots3_note_vision_encoder", "qwen3_omni_moe_talker_text")


def test_every_transformers_family_with_experts_is_read_or_refused_by_name() -> None:
    handled = {
        *known(),
        *families(),
        *REFUSED,
        *(f"{name}_text" for name in REFUSED),
        *THROUGH_THEIR_TEXT,
        *OTHER_TOWERS,
    }
    found = tiny.families_with_experts()
    assert len(found) > 60
    assert found <= handled, sorted(found - handled)


@pytest.mark.parametrize(
    ("outer", "inner"),
    [("llama4", "llama4_text"), ("qwen3_vl_moe", "qwen3_vl_moe_text"), ("glm4v_moe", "glm4v_moe_text")],
)
def test_a_multimodal_config_is_read_through_its_text_part(outer: str, inner: str, tmp_path: Path) -> None:
    alone = save(tiny.config_of(inner), tmp_path, use_diff=False)
    text = json.loads(alone.read_text())
    nested = tmp_path / "nested.json"
    nested.write_text(json.dumps({"model_type": outer, "text_config": text}))
    assert read_config(nested).layers == read_config(alone).layers
    assert "vision" in (read_config(nested).uncounted or "")
    text.pop("model_type")
    nested.write_text(json.dumps({"model_type": outer, "text_config": text}))
    assert read_config(nested).layers == read_config(alone).layers


def test_the_head_of_a_multimodal_model_is_tied_as_its_outer_config_says(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    sizes = {"hidden_size": 64, "vocab_size": 1000, "num_hidden_layers": 2, "tie_word_embeddings": False}
    path.write_text(json.dumps({"model_type": "qwen3_vl_moe", "text_config": sizes, "tie_word_embeddings": True}))
    tied = read_config(path).computed_total
    path.write_text(json.dumps({"model_type": "qwen3_vl_moe", "text_config": sizes}))
    untied = read_config(path).computed_total
    assert tied is not None
    assert untied is not None
    assert untied - tied == 64 * 1000


def test_qwen3_omni_is_read_through_two_levels(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    text = {"model_type": "qwen3_omni_moe_text", "num_experts": 24, "num_experts_per_tok": 3}
    path.write_text(json.dumps({"model_type": "qwen3_omni_moe", "thinker_config": {"text_config": text}}))
    assert read_config(path).layers[0].layer.routed_experts == 24


def test_kimi_k2_is_a_deepseek_v3(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    sizes = {
        "hidden_size": 7168, "num_hidden_layers": 61, "n_routed_experts": 384, "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048, "intermediate_size": 18432, "first_k_dense_replace": 1, "n_group": 1,
        "topk_group": 1, "routed_scaling_factor": 2.827, "num_attention_heads": 64, "vocab_size": 163840,
    }  # fmt: skip
    path.write_text(json.dumps({"model_type": "kimi_k2"} | sizes))
    spec = read_config(path)
    assert spec.layers[0].layer.router.kind == "sigmoid_bias"
    assert spec.layers[0].count == 60
    assert spec.computed_total == pytest.approx(1026.4e9, rel=1e-3)


@pytest.mark.parametrize(
    ("model_type", "more"), [("sarvam_moe", {"use_qkv_bias": True}), ("sarvam_mla", {"head_dim": 576})]
)
def test_sarvams_own_spellings_are_read(model_type: str, more: dict[str, Any], tmp_path: Path) -> None:
    """Its makers' files count experts as num_experts and num_shared_experts."""
    sizes = {"num_experts": 24, "num_shared_experts": 3, "num_hidden_layers": 4, **more}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": model_type} | sizes))
    layer = read_config(path).layers[0].layer
    assert (layer.routed_experts, layer.shared_experts, layer.router.scale) == (24, 3, 2.5)
    compare(model_type, tiny.config_of(model_type, **sizes), path)


def test_hy_v4_vl_is_read_through_its_text_part(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "hy_v4_vl", "text_config": {"n_routed_experts": 24}}))
    spec = read_config(path)
    assert (spec.title, spec.layers[0].layer.routed_experts, spec.moe_layers) == ("hy_v4_vl_text", 24, 77)
    assert (spec.layers[0].layer.activation, spec.layers[0].layer.activation_limit) == ("limited_swiglu", 10.0)


# What each family's router is, in the words of its transformers code; the counts above cannot see it.
ROUTERS = {
    "mixtral": ("topk_softmax", True), "gpt_oss": ("topk_softmax", True), "granitemoe": ("topk_softmax", True),
    "qwen2_moe": ("softmax_topk", False), "qwen3_moe": ("softmax_topk", False), "qwen3_next": ("softmax_topk", True),
    "olmoe": ("softmax_topk", False), "dbrx": ("softmax_topk", True), "jamba": ("softmax_topk", False),
    "phimoe": ("sparsemixer", False), "deepseek_v2": ("softmax_topk", False), "deepseek_v3": ("sigmoid_bias", True),
    "glm4_moe": ("sigmoid_bias", True), "minimax": ("topk_softmax", True), "minimax_m2": ("sigmoid_bias", True),
    "llama4_text": ("sigmoid_input", False), "switch_transformers": ("switch_top1", False),
    "nllb-moe": ("softmax_topk", True), "hunyuan_v1_moe": ("softmax_topk", True), "dots1": ("sigmoid_bias", False),
    "ernie4_5_moe": ("softmax_bias", True), "longcat_flash": ("softmax_bias_zero", False),
    "deepseek_v4": ("sqrt_softplus_bias", True), "lfm2_moe": ("sigmoid_bias", True),
    "cohere2_moe": ("topk_softmax", True), "mistral4": ("softmax_topk", True), "afmoe": ("sigmoid_bias", True),
    "hy_v4_vl_text": ("sigmoid_bias", True), "lara_mini": ("softmax_topk", True),
    "sarvam_mla": ("sigmoid_bias", True), "sarvam_moe": ("sigmoid_bias", True),
}  # fmt: skip


@pytest.mark.parametrize("model_type", ROUTERS)
def test_router(model_type: str, tmp_path: Path) -> None:
    spec = read_config(save(tiny.config_of(model_type), tmp_path, use_diff=True))
    router = spec.layers[-1].layer.router
    assert (router.kind, router.normalise) == ROUTERS[model_type]


def test_groups_scale_and_biases(tmp_path: Path) -> None:
    v3 = read_config(save(tiny.config_of("deepseek_v3"), tmp_path, use_diff=True)).layers[0].layer.router
    assert (v3.groups, v3.topk_groups, v3.scale) == (8, 4, 2.5)
    limited = tiny.config_of("deepseek_v2", topk_method="group_limited_greedy", n_group=8, topk_group=3)
    v2 = read_config(save(limited, tmp_path, use_diff=True)).layers[0].layer.router
    assert (v2.kind, v2.groups, v2.topk_groups) == ("group_limited", 8, 3)
    oss = read_config(save(tiny.config_of("gpt_oss"), tmp_path, use_diff=True)).layers[0].layer
    assert oss.expert_bias
    assert oss.router.logit_bias
    assert oss.activation == "clamped_swiglu"


def test_deepseek_v4_names_its_two_kinds(tmp_path: Path) -> None:
    spec = read_config(save(tiny.config_of("deepseek_v4"), tmp_path, use_diff=False))
    assert [(kind.name, kind.count, kind.layer.router.kind) for kind in spec.layers] == [
        ("hash", 3, "hash_sqrt_softplus"),
        ("learned", 3, "sqrt_softplus_bias"),
    ]


def test_which_layers_are_moe_layers_in_the_makers_own_files(tmp_path: Path) -> None:
    """Spellings of published files that transformers converts before it writes its own."""
    path = tmp_path / "config.json"
    for config, moe_layers in (
        ({"model_type": "mimo_v2_flash", "moe_layer_freq": [0] + [1] * 47, "routed_scaling_factor": None}, 47),
        ({"model_type": "minimax_m3_vl", "text_config": {"moe_layer_freq": [0, 0, 0] + [1] * 57}}, 57),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "MEM*E-ME"}, 3),
        ({"model_type": "deepseek_v3", "moe_layer_freq": 1, "first_k_dense_replace": 1}, 60),
        ({"model_type": "deepseek_v3", "moe_layer_freq": 2, "first_k_dense_replace": 3}, 29),
        ({"model_type": "kimi_linear", "num_experts": 256, "num_experts_per_token": 8, "moe_renormalize": True}, 26),
    ):
        path.write_text(json.dumps(config))
        assert read_config(path).moe_layers == moe_layers
        assert read_config(path).layers[0].layer.router.scale > 0


def test_presets_agree_with_the_config_they_were_read_from(tmp_path: Path) -> None:
    """Two sources of one fact: the catalogue's row, and the model's config.json as its makers publish it."""
    from moebench.catalogue.models import model

    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "olmoe", "intermediate_size": 1024}))
    assert read_config(path).layers == model("olmoe-1b-7b").layers
    assert read_config(path).computed_total == pytest.approx(model("olmoe-1b-7b").computed_total, rel=1e-4)
    path.write_text(json.dumps({"model_type": "mixtral"}))
    assert read_config(path).layers == model("mixtral-8x7b").layers
    path.write_text(json.dumps({"model_type": "deepseek_v3"}))
    assert read_config(path).layers == model("deepseek-v3").layers
    path.write_text(json.dumps({"model_type": "gpt_oss"}))
    assert read_config(path).layers == model("gpt-oss-120b").layers
