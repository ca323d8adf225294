"""Our routers and layers against the released code of every family that transformers ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers_layers as released
from torch import Tensor

from moebench import expected
from moebench.catalogue.families import families
from moebench.catalogue.gate import gate_shapes
from moebench.routing import Side, TopK, make_scores, route

pytest.importorskip("transformers", minversion="5.24", reason="older releases name and lay out their blocks otherwise")

# Forms of a family beside its default one: (model_type, kind of layer, changes of the config).
FORMS: list[tuple[str, str, dict[str, Any]]] = [(name, "", {}) for name in released.BLOCKS] + [
    ("axk2", "", {"n_group": 4, "topk_group": 2}),
    ("cohere2_moe", "", {"expert_selection_fn": "sigmoid", "norm_topk_prob": True}),
    ("cohere2_moe", "", {"expert_selection_fn": "sigmoid", "norm_topk_prob": False}),
    ("deepseek_v2", "", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
    ("deepseek_v3", "", {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "n_shared_experts": 2}),
    ("deepseek_v3", "", {"n_group": 8, "topk_group": 2, "norm_topk_prob": False}),
    ("deepseek_v4", "hash", {}),
    ("deepseek_v4", "", {"swiglu_limit": 0.5}),
    ("ernie4_5_moe", "", {"moe_num_shared_experts": 0}),
    ("flint", "", {"norm_topk_prob": False}),
    ("glm5_next_text", "", {"swiglu_limit": 0.5}),
    ("glm4_moe", "", {"n_group": 4, "topk_group": 1, "routed_scaling_factor": 2.5}),
    ("kolibri1", "", {"norm_topk_prob": True}),
    ("lfm2_moe", "", {"use_expert_bias": False}),
    ("lfm2_moe", "", {"norm_topk_prob": False, "routed_scaling_factor": 1.5}),
    ("longcat_flash", "", {"zero_expert_num": 0}),
    ("mistral4", "", {"n_group": 4, "topk_group": 2, "norm_topk_prob": False, "routed_scaling_factor": 1.5}),
    ("mistral_large4_text", "", {"n_group": 4, "topk_group": 2}),
    ("nllb-moe", "", {"router_bias": True, "moe_token_dropout": 0.0}),
    ("olmoe", "", {"norm_topk_prob": True}),
    ("qwen2_moe", "", {"norm_topk_prob": True}),
    ("qwen3_moe", "", {"norm_topk_prob": True}),
    ("switch_transformers", "", {"router_bias": True}),
]


def label(value: Any) -> str:
    return ",".join(f"{key}={it}" for key, it in value.items()) if isinstance(value, dict) else str(value)


def drawn(seed: int) -> tuple[Tensor, Side]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(released.TOKENS, released.WIDTH, generator=generator)
    return x, Side(token_ids=torch.randint(100, (released.TOKENS,), generator=generator))


def dense(routing: TopK, weights: Tensor) -> Tensor:
    return torch.zeros(weights.shape).scatter(1, routing.ids, routing.weights)


def test_every_family_of_ours_is_compared() -> None:
    assert set(released.BLOCKS) == set(families())


@pytest.mark.parametrize(("model_type", "kind", "changed"), FORMS, ids=label)
def test_ids_and_weights_are_the_released_ones(
    model_type: str, kind: str, changed: dict[str, Any], tmp_path: Path
) -> None:
    block = released.block(model_type, tmp_path, kind, **changed)
    x, side = drawn(1)
    theirs = released.run(block, x, side.token_ids)
    routing = route(block.layer, make_scores(block.layer, x, released.gate_weights(block), side))
    assert isinstance(routing, TopK)
    assert routing.on_input == (model_type == "llama4_text")
    ours = dense(routing, theirs.weights)
    assert torch.equal(ours != 0, theirs.weights != 0)
    torch.testing.assert_close(ours, theirs.weights, rtol=2e-5, atol=1e-6)
    if theirs.ids is not None:
        assert torch.equal(routing.ids, theirs.ids)


@pytest.mark.parametrize(("model_type", "kind", "changed"), FORMS, ids=label)
def test_the_float64_layer_is_the_released_one(
    model_type: str, kind: str, changed: dict[str, Any], tmp_path: Path
) -> None:
    block = released.block(model_type, tmp_path, kind, **changed)
    weights = released.weights_of(block)
    x, side = drawn(2)
    theirs = released.run(block, x, side.token_ids).y
    ours = expected.layer_answer(block.layer, weights, x.double(), side)
    error = (ours - theirs).norm(dim=1) / ours.norm(dim=1)
    assert error.max() < 1e-5


@pytest.mark.parametrize(("model_type", "kind", "changed"), FORMS, ids=label)
def test_a_block_holds_what_its_layer_says(model_type: str, kind: str, changed: dict[str, Any], tmp_path: Path) -> None:
    """No weight of the gate is left over or missing, and none is zero throughout."""
    block = released.block(model_type, tmp_path, kind, **changed)
    gate = released.gate_weights(block)
    wanted = gate_shapes(block.layer)
    assert set(gate) == set(wanted)
    assert all(gate[name].shape == wanted[name] for name in gate if name != "table")
    assert all(value.any() for value in gate.values())
    layer, found = block.layer, released.expert_weights(block)
    columns = (2 if layer.gated else 1) * layer.expert_ffn_size
    assert found["w_gate_up"].shape == (layer.routed_experts, columns, layer.hidden_size)
    assert ("b_down" in found) == layer.expert_bias
    assert found.get("shared_down", torch.empty(0, 0)).shape[1] == layer.shared_width
    assert ("shared_gate" in found) == (layer.shared_combine == "sigmoid_gate")


@pytest.mark.parametrize("model_type", ["hy_v4", "hy_v4_vl_text"])
def test_hy_v4_where_its_limit_is_reached(model_type: str, tmp_path: Path) -> None:
    test_the_float64_layer_is_the_released_one(model_type, "", {"swiglu_limit": 0.5}, tmp_path)


@pytest.mark.parametrize("model_type", ["hy_v4", "hy_v4_vl_text"])
def test_hy_v4s_routed_experts_where_their_limit_is_reached(model_type: str, tmp_path: Path) -> None:
    block = released.block(model_type, tmp_path, swiglu_limit=0.5)
    with torch.no_grad():
        for value in block.module.shared_experts.parameters():
            value.zero_()
    x, side = drawn(2)
    theirs = released.run(block, x, side.token_ids).y
    ours = expected.layer_answer(block.layer, released.weights_of(block), x.double(), side)
    assert ((ours - theirs).norm(dim=1) / ours.norm(dim=1)).max() < 1e-5
