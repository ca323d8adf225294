"""A config.json that is damaged, hostile or of something else: one clear line each, and no code run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moebench.catalogue.huggingface import read_config

MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_local_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 4, "vocab_size": 100,
}  # fmt: skip
KEYS = [key for key in MIXTRAL if key != "model_type"]


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 the callers look at the text
        read_config(path)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(str(path))
    assert len(text) < 3000
    return text


def written(folder: Path, config: object) -> Path:
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def test_the_sound_one_is_read(tmp_path: Path) -> None:
    assert read_config(written(tmp_path, MIXTRAL)).layers[0].count == 2


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", ["8", True, None, 8.0, 2.5, -1, 0, 10**12, [8], {"n": 8}, "", "[red]x[/red]"])
def test_what_is_no_count(key: str, value: Any, tmp_path: Path) -> None:
    text = refused(written(tmp_path, MIXTRAL | {key: value}))
    assert f"{key} is " in text
    assert re.search(r"it must be (a whole number, [12] to \d+|at most)", text)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_nan_and_infinity(number: str, tmp_path: Path) -> None:
    text = json.dumps(MIXTRAL).replace('"hidden_size": 64', f'"hidden_size": {number}')
    assert f"hidden_size is {float(number)!r}; it must be a whole number" in refused(written(tmp_path, text))


def test_an_infinity_where_none_of_our_keys_stands_is_let_be(tmp_path: Path) -> None:
    """Nemotron's published files hold `"time_step_limit": [0.0, Infinity]`."""
    text = json.dumps(MIXTRAL).replace('"hidden_size": 64', '"hidden_size": 64, "time_step_limit": [0.0, Infinity]')
    assert read_config(written(tmp_path, text)).layers


def test_a_number_of_ten_thousand_digits(tmp_path: Path) -> None:
    text = json.dumps(MIXTRAL).replace('"hidden_size": 64', '"hidden_size": ' + "9" * 10_000)
    refused(written(tmp_path, text))
    text = json.dumps(MIXTRAL).replace('"hidden_size": 64', '"hidden_size": ' + "9" * 4_000)
    assert "hidden_size is 999" in refused(written(tmp_path, text))


def test_overflowing_floats_are_no_counts(tmp_path: Path) -> None:
    text = json.dumps(MIXTRAL).replace('"hidden_size": 64', '"hidden_size": 1e999')
    assert "hidden_size is inf" in refused(written(tmp_path, text))
    v3 = json.dumps({"model_type": "deepseek_v3", "routed_scaling_factor": 1}).replace(": 1}", ": 1e999}")
    assert "routed_scaling_factor is inf; it must be a number above 0" in refused(written(tmp_path, v3))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("not json at all", "not JSON: Expecting value (line 1, column 1)"),
        (json.dumps(MIXTRAL)[:40], "not JSON"),
        ("[1, 2]", "holds a JSON list"),
        ('"text"', "holds a JSON str"),
        ("null", "holds a JSON NoneType"),
        ("{}", "model_type is missing"),
        ('{"model_type": 3}', "model_type is '3'; it must be text"),
        ('{"model_type": "llama", "hidden_size": 64}', "'llama' is not a mixture of experts"),
        ('{"model_type": "mixtra", "num_local_experts": 8}', "unknown MoE family 'mixtra'; did you mean mixtral"),
        ('{"model_type": "brand_new", "num_experts": 8}', "known are afmoe, "),
        ('{"model_type": "llama4", "text_config": 3}', "text_config is '3'; it must be an object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text_config":' * 5_000 + "{}" + "}" * 5_000, "nested too deeply"),
    ],
)
def test_what_is_no_moe_config(text: str, said: str, tmp_path: Path) -> None:
    assert said in refused(written(tmp_path, text))


def test_nesting_the_parser_can_bear_but_our_walk_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How deep the parser goes depends on the Python."""
    nested: dict[str, Any] = {}
    for _ in range(5_000):
        nested = {"model_type": "x", "text_config": nested}
    monkeypatch.setattr("moebench.catalogue.huggingface.json.loads", lambda text: nested)
    assert "nested too deeply" in refused(written(tmp_path, "{}"))


def test_a_large_file_is_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    assert "100,000,000 bytes; at most 10,000,000" in refused(path)


def test_what_is_no_text_file(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "none.json")
    assert "is a directory" in refused(tmp_path)
    latin = tmp_path / "latin.json"
    latin.write_bytes('{"model_type": "é"}'.encode("latin-1"))
    assert "not UTF-8" in refused(latin)
    assert "not a regular file" in refused(Path("/dev/zero"))


def test_a_byte_order_mark_is_forgiven(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(MIXTRAL).encode())
    assert read_config(path).layers


def test_more_picks_than_experts(tmp_path: Path) -> None:
    text = refused(written(tmp_path, MIXTRAL | {"num_experts_per_tok": 9}))
    assert "num_experts_per_tok is 9; it must be at most the 8 experts (num_local_experts)" in text


def test_one_expert_is_no_mixture(tmp_path: Path) -> None:
    text = refused(written(tmp_path, {"model_type": "granitemoehybrid", "num_local_experts": 0}))
    assert "num_local_experts is 0; it must be a whole number, 2 to" in text


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "qwen3_moe", "norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'; it must be true or false"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [99]}, "mlp_only_layers is [99]; it must be a list of layer"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"model_type": "qwen3_moe", "hidden_act": "tanh"}, "hidden_act is 'tanh'; it must be one of silu"),
        ({"model_type": "qwen3_moe", "hidden_act": 5}, "hidden_act is 5; it must be text"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": list(range(24))}, "none of its 24 layers is an MoE layer"),
        ({"model_type": "deepseek_v3", "n_group": 7}, "n_group is 7; it must be a divisor of 256 experts"),
        ({"model_type": "deepseek_v3", "moe_layer_freq": 0}, "moe_layer_freq is 0; it must be a whole number, 1 to"),
        ({"model_type": "mimo_v2_flash", "moe_layer_freq": [0, 1]}, "it must be a number, or 48 zeros and ones"),
        ({"model_type": "dots3_note_text", "pyramid_num_routed": [8, 16]}, "pyramid_num_routed is [8, 16]"),
        ({"model_type": "deepseek_v2", "num_experts_per_tok": 6, "topk_method": "x"}, "topk_method is 'x'"),
        ({"model_type": "deepseek_v2"}, "num_experts_per_tok is missing or null"),
        ({"model_type": "dbrx", "ffn_config": 3}, "ffn_config is 3; it must be an object"),
        ({"model_type": "dbrx", "ffn_config": {"moe_normalize_expert_weights": 2.0}}, "it must be 1 or null"),
        ({"model_type": "hunyuan_v1_moe", "num_experts": 8, "moe_topk": [2, 3]}, "the same for every layer"),
        ({"model_type": "glm4_moe_lite", "mlp_layer_types": ["dense"]}, "mlp_layer_types is ['dense']"),
        ({"model_type": "cohere2_moe", "num_shared_experts": 2}, "shared_expert_combination_strategy is 'average'"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "MEX"}, "hybrid_override_pattern is 'MEX'"),
        ({"model_type": "nemotron_h", "moe_latent_size": 64}, "moe_latent_size is 64"),
        ({"model_type": "gpt_oss", "swiglu_limit": 10.0}, "swiglu_limit is 10.0; it must be 7"),
        ({"model_type": "minimax_m3_vl_text", "swiglu_alpha": 1.0}, "swiglu_alpha is 1.0; it must be 1.702"),
        ({"model_type": "minimax_m3_vl_text", "swiglu_limit": None}, "swiglu_limit is missing or null; it must be"),
        ({"model_type": "deepseek_v4", "swiglu_limit": -1}, "swiglu_limit is -1; it must be a number above 0"),
        ({"model_type": "deepseek_v4", "swiglu_limit": "x"}, "swiglu_limit is 'x'; it must be a number above 0"),
        ({"model_type": "hy_v3", "mlp_bias": True}, "mlp_bias is True; it must be false: biases in shared experts"),
        ({"model_type": "ernie4_5_moe", "use_bias": True}, "use_bias is True; it must be false: biases in shared"),
        ({"model_type": "nllb-moe", "moe_token_dropout": 1.0}, "moe_token_dropout is 1.0; it must be a number under 1"),
        ({"model_type": "longcat_flash", "zero_expert_num": -1}, "zero_expert_num is -1; it must be a whole number"),
    ],
)
def test_impossible_values_of_single_families(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refused(written(tmp_path, config))


def test_a_list_of_equal_picks_is_one_number(tmp_path: Path) -> None:
    path = written(tmp_path, {"model_type": "hunyuan_v1_moe", "num_experts": 8, "moe_topk": [2] * 32})
    assert read_config(path).layers[0].layer.top_k == 2


def test_nothing_of_the_checkpoint_is_run(tmp_path: Path) -> None:
    trap = tmp_path / "modeling_x.py"
    trap.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    read_config(written(tmp_path, MIXTRAL | {"auto_map": {"AutoModel": "modeling_x.X"}}))
    assert not (tmp_path / "ran").exists()
