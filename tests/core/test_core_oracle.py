"""The oracle against the MoE blocks of Hugging Face transformers: same float64 weights, layer read from the config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moebench import oracle, oracle_gate
from moebench.catalogue.huggingface import read_config
from moebench.catalogue.spec import LayerSpec
from moebench.weights import Weights

D, F, E, K, T = 24, 20, 6, 2, 33
pytest.importorskip("transformers", reason="the oracle's own oracle is transformers")
COMMON = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
# Family -> its names for the sizes, and what else matters to the layer.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": E, "num_experts_per_tok": K, "intermediate_size": F}),
    "mixtral-top-3": ("mixtral", {"num_local_experts": E, "num_experts_per_tok": 3, "intermediate_size": F}),
    "olmoe": ("olmoe", {"num_experts": E, "num_experts_per_tok": K, "intermediate_size": F}),
    "olmoe-normalised": (
        "olmoe",
        {"num_experts": E, "num_experts_per_tok": K, "intermediate_size": F, "norm_topk_prob": True},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {"num_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": F, "shared_expert_intermediate_size": 28},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": F, "norm_topk_prob": True},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {"n_routed_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": F, "n_shared_experts": 2,
         "topk_method": "greedy", "routed_scaling_factor": 1.5, "first_k_dense_replace": 0,
         "n_group": 1, "topk_group": 1},
    ),
    "granitemoeshared": (
        "granitemoeshared",
        {"num_local_experts": E, "num_experts_per_tok": K, "intermediate_size": F, "shared_intermediate_size": 28},
    ),
}  # fmt: skip
BLOCKS = {
    "mixtral": "MixtralSparseMoeBlock", "olmoe": "OlmoeSparseMoeBlock", "qwen2_moe": "Qwen2MoeSparseMoeBlock",
    "qwen3_moe": "Qwen3MoeSparseMoeBlock", "deepseek_v2": "DeepseekV2Moe", "granitemoeshared": "GraniteMoeSharedMoE",
}  # fmt: skip


@dataclass(frozen=True)
class Twin:
    """A block of transformers and the same layer as moebench has it."""

    block: nn.Module
    shared: nn.Module | None
    layer: LayerSpec
    weights: Weights

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """ids and gates of the block's own router, each token's experts in rising order."""
        _, gates, ids = (self.block.gate if hasattr(self.block, "gate") else self.block.router)(x)
        order = ids.argsort(dim=1)
        return ids.gather(1, order), gates.gather(1, order).double()

    def __call__(self, x: Tensor) -> Tensor:
        y = self.block(x[None])[0]
        return y if self.shared is None else y + self.shared(x)


@pytest.fixture(params=CASES)
def twin(request: pytest.FixtureRequest, tmp_path: Path) -> Twin:
    family, keys = CASES[request.param]
    module, config = _modules(family, COMMON | keys)
    config.to_json_file(tmp_path / "config.json", use_diff=False)
    layer = read_config(tmp_path / "config.json").layers[0].layer
    torch.manual_seed(7)
    block = getattr(module, BLOCKS[family])(config).double().eval().requires_grad_(False)
    beside = module.GraniteMoeSharedMLP(config).double().requires_grad_(False) if family == "granitemoeshared" else None
    for parameter in [*block.parameters(), *(beside.parameters() if beside else ())]:
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return Twin(block, beside, layer, _weights(block, beside, family))


def _modules(family: str, keys: dict[str, Any]) -> tuple[Any, Any]:
    import importlib

    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[family](**keys)
    config._experts_implementation = "eager"
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}"), config


def _weights(block: Any, beside: Any, family: str) -> Weights:
    router = (block.gate if hasattr(block, "gate") else block.router).weight
    shared = getattr(block, "shared_expert", None) or getattr(block, "shared_experts", None)
    gate_up = down = None
    if shared is not None:
        gate_up, down = torch.cat([shared.gate_proj.weight, shared.up_proj.weight]), shared.down_proj.weight
    if beside is not None:
        gate_up, down = beside.input_linear.weight, beside.output_linear.weight
    gate = block.shared_expert_gate.weight if family == "qwen2_moe" else None
    experts = block.experts
    return Weights(router, experts.gate_up_proj, experts.down_proj, gate_up, down, gate)


def hidden_states() -> Tensor:
    return torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def test_the_layer_is_the_config_s(twin: Twin) -> None:
    assert (twin.layer.hidden_size, twin.layer.expert_ffn_size, twin.layer.routed_experts) == (D, F, E)
    assert twin.layer.total_params() == sum(value.numel() for value in twin.weights.tensors().values())


def test_gate(twin: Twin) -> None:
    """transformers rounds its scores to float32, so weights agree to that; the choice exactly."""
    x = hidden_states()
    want_ids, want = twin.route(x)
    ids, gates = oracle_gate.gate(twin.layer, twin.weights, x)
    order = ids.argsort(dim=1)
    assert torch.equal(ids.gather(1, order), want_ids)
    assert ids.shape == (T, twin.layer.top_k)
    torch.testing.assert_close(gates.gather(1, order), want, rtol=2e-6, atol=1e-7)


def test_experts_and_their_gradients(twin: Twin) -> None:
    """float64 throughout: ids and weights are given."""
    x, mine = hidden_states().requires_grad_(), hidden_states().requires_grad_()
    ids, gates = twin.route(x.detach())
    want = twin.block.experts(x, ids, gates)
    found = oracle.experts(twin.layer, twin.weights, mine, ids, gates)
    assert relative(found, want) < 1e-13
    upstream = torch.randn_like(want)
    want.backward(upstream)
    found.backward(upstream)
    assert relative(mine.grad, x.grad) < 1e-13


def test_shared_experts(twin: Twin) -> None:
    x = hidden_states()
    ids, gates = twin.route(x)
    want = twin(x) - twin.block.experts(x, ids, gates)
    found = oracle.joined(twin.layer, twin.weights, x, torch.zeros_like(x))
    if twin.layer.shared_experts:
        assert relative(found, want) < 1e-12
    else:
        assert not found.any()
        assert want.norm() < 1e-12


def test_the_whole_layer(twin: Twin) -> None:
    x = hidden_states()
    ids, gates = oracle_gate.gate(twin.layer, twin.weights, x)
    y = oracle.joined(twin.layer, twin.weights, x, oracle.experts(twin.layer, twin.weights, x, ids, gates))
    assert relative(y, twin(x)) < 1e-6  # float32 scores again


def test_dropped_assignments_give_nothing(twin: Twin) -> None:
    x = hidden_states()
    ids, gates = twin.route(x)
    gone = torch.rand(ids.shape, generator=torch.Generator().manual_seed(5)) < 0.4
    want = twin.block.experts(x, ids, gates.masked_fill(gone, 0))
    assert relative(oracle.experts(twin.layer, twin.weights, x, ids.masked_fill(gone, -1), gates), want) < 1e-13


def test_switch_transformers_ungated_top_1(tmp_path: Path) -> None:
    """Ungated ReLU experts behind a top-1 router whose value scales the output."""
    keys = {"d_model": D, "d_ff": F, "num_experts": E, "num_layers": 6, "num_heads": 4, "d_kv": 6}
    module, config = _modules("switch_transformers", keys)
    config.to_json_file(tmp_path / "config.json", use_diff=False)
    layer = read_config(tmp_path / "config.json").layers[0].layer
    assert (layer.gated, layer.activation, layer.top_k, layer.router.kind) == (False, "relu", 1, "switch_top1")
    torch.manual_seed(7)
    block = module.SwitchTransformersSparseMLP(config).double().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    experts = [block.experts[f"expert_{index}"] for index in range(E)]
    weights = Weights(
        block.router.classifier.weight.detach().clone().double(),
        torch.stack([expert.wi.weight for expert in experts]),
        torch.stack([expert.wo.weight for expert in experts]),
    )
    x = hidden_states()
    ids, gates = oracle_gate.gate(layer, weights, x)
    found = oracle.experts(layer, weights, x, ids, gates)
    want = block(x[None])[0]
    assert int((want.norm(dim=1) > 0).sum()) == T  # none over capacity, so every token has an answer
    assert relative(found, want) < 1e-6


@pytest.mark.parametrize(
    ("activation", "name"),
    [("swiglu", "silu"), ("geglu", "gelu"), ("silu", "silu"), ("gelu", "gelu"), ("relu", "relu")],
)
def test_activations_are_pytorch_s(activation: str, name: str) -> None:
    layer = LayerSpec(D, F, 1, 1, activation=activation)
    w_in = torch.randn(2 * F if layer.gated else F, D, dtype=torch.float64)
    act = getattr(torch.nn.functional, name)
    rows = hidden_states() @ w_in.T
    want = act(rows[:, :F]) * rows[:, F:] if layer.gated else act(rows)
    torch.testing.assert_close(oracle.hidden(layer, hidden_states(), w_in), want, rtol=1e-13, atol=1e-15)
