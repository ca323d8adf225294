"""topk_gate stands in for the routers of published models: transformers' own classes, small and random."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from kernel_loops import assert_close
from torch import Tensor, nn

from moebench_kernels import topk_gate

pytest.importorskip("transformers")

T, D, E, K = 29, 32, 24, 4
SIZES = {"hidden_size": D, "num_experts_per_tok": K}
GROUPED = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
LIMITED = {"n_groups": 4, "topk_groups": 2}

ROUTERS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": ("mixtral", "MixtralTopKRouter", {"num_local_experts": E}, {"order": "topk_first"}),
    "mixtral, score first": ("mixtral", "MixtralTopKRouter", {"num_local_experts": E}, {"renormalise": True}),
    "qwen3": ("qwen3_moe", "Qwen3MoeTopKRouter", {"num_experts": E, "norm_topk_prob": True}, {"renormalise": True}),
    "qwen3, as it comes": ("qwen3_moe", "Qwen3MoeTopKRouter", {"num_experts": E, "norm_topk_prob": False}, {}),
    "gpt-oss": ("gpt_oss", "GptOssTopKRouter", {"num_local_experts": E}, {"order": "topk_first"}),
    "deepseek-v2-lite": (
        "deepseek_v2", "DeepseekV2TopkRouter", {"n_routed_experts": E, "topk_method": "greedy", **GROUPED},
        {"scale": 2.5},
    ),
    "deepseek-v2": (
        "deepseek_v2", "DeepseekV2TopkRouter",
        {"n_routed_experts": E, "topk_method": "group_limited_greedy", **GROUPED}, {"scale": 2.5, **LIMITED},
    ),
    "deepseek-v3": (
        "deepseek_v3", "DeepseekV3TopkRouter", {"n_routed_experts": E, "norm_topk_prob": True, **GROUPED},
        {"scoring": "sigmoid", "renormalise": True, "scale": 2.5, "group_score": "top2_sum", **LIMITED},
    ),
    "glm-4.5": (
        "glm4_moe", "Glm4MoeTopkRouter",
        {"n_routed_experts": E, "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5},
        {"scoring": "sigmoid", "renormalise": True, "scale": 1.5},
    ),
}  # fmt: skip


def router_of(folder: str, name: str, options: dict[str, Any]) -> nn.Module:
    """The class with small random weights, and where it has one, a selection bias that changes choices."""
    modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    configuration = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
    config = next(v for v in vars(configuration).values() if getattr(v, "model_type", "") == folder)
    router = getattr(modeling, name)(config(**SIZES, **options))
    for tensor in (*router.parameters(), *router.buffers()):
        nn.init.normal_(tensor, std=0.3)
    return router


def dense(ids: Tensor, weights: Tensor) -> Tensor:
    """[T, E]: each expert's weight, 0 where it was not chosen; routers differ in the order of their picks."""
    return torch.zeros(T, E).scatter(1, ids.long().cpu(), weights.detach().float().cpu())


def compare(wanted: Tensor, logits: Tensor, router: nn.Module, device: torch.device, options: dict[str, Any]) -> None:
    bias = getattr(router, "e_score_correction_bias", None)
    ids, weights = topk_gate(logits.detach().to(device), K, bias=None if bias is None else bias.to(device), **options)
    assert_close("weights", dense(ids, weights), wanted, 2e-6)


@pytest.mark.parametrize("name", ROUTERS)
def test_router(name: str, device: torch.device) -> None:
    folder, kind, config, options = ROUTERS[name]
    router = router_of(folder, kind, config)
    logits, weights, ids = router(torch.randn(T, D))
    compare(dense(ids, weights), logits, router, device, options)


@pytest.mark.parametrize("scoring", ["sqrtsoftplus", "sigmoid"])
def test_deepseek_v4(scoring: str, device: torch.device) -> None:
    try:
        router = router_of("deepseek_v4", "DeepseekV4TopKRouter", {"num_local_experts": E, "scoring_func": scoring})
    except ImportError as error:
        pytest.skip(f"this transformers has no DeepSeek-V4: {error}")
    logits, weights, ids = router(torch.randn(T, D))
    options = {"scoring": scoring.replace("sqrt", "sqrt_"), "renormalise": True, "scale": router.routed_scaling_factor}
    compare(dense(ids, weights), logits, router, device, options)


def test_llama4(device: torch.device) -> None:
    """Its router answers with all scores, 0 where not chosen."""
    from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4Router

    router = Llama4Router(Llama4TextConfig(**SIZES, num_local_experts=E))
    scores, logits = router(torch.randn(T, D))
    for order in ("topk_first", "score_first"):
        compare(scores.detach(), logits, router, device, {"scoring": "sigmoid", "order": order})


def test_the_bias_of_these_tests_changes_choices(device: torch.device) -> None:
    folder, kind, config, options = ROUTERS["deepseek-v3"]
    router = router_of(folder, kind, config)
    logits, weights, ids = router(torch.randn(T, D))
    router.e_score_correction_bias.zero_()
    with pytest.raises(AssertionError, match="weights: relative error"):
        compare(dense(ids, weights), logits, router, device, options)
