"""Tiny models of several families, saved as checkpoints; their routers written again as plain sums; small traces."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from moebench.cli import Commands
from moebench.cli_trace import trace
from moebench.trace_file import Facts, Trace, expert_dtype

E, K, VOCABULARY = 8, 2, 256
STEPS, BATCH, LENGTH = 200, 16, 48
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": K,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
FINE = {"moe_intermediate_size": 16, "intermediate_size": 48}
# model_type -> its own keys.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": E, "intermediate_size": 48},
    "olmoe": {"num_experts": E, "intermediate_size": 24, "num_key_value_heads": 4},
    "qwen2_moe": {"num_experts": E, "shared_expert_intermediate_size": 16, "mlp_only_layers": [1], **FINE},
    "qwen3_moe": {"num_experts": E, "norm_topk_prob": True, **FINE},
    "deepseek_v3": {"n_routed_experts": E, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
                    "num_key_value_heads": 4, **MLA, **FINE},
    "glm4_moe": {"n_routed_experts": E, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, **FINE},
    "gpt_oss": {"num_local_experts": E, "intermediate_size": 24, "sliding_window": 16},
    "llama4_text": {"num_local_experts": E, "intermediate_size": 24, "intermediate_size_mlp": 24,
                    "interleave_moe_layer_step": 1, "num_experts_per_tok": 1},
    "jetmoe": {"num_local_experts": E, "intermediate_size": 24, "kv_channels": 8, "num_key_value_heads": 2},
}  # fmt: skip


def tiny(model_type: str, **more: Any) -> nn.Module:
    """A random model whose routers tell tokens apart."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    keys = {**COMMON, **FAMILIES.get(model_type, {}), **more}
    if model_type == "jetmoe":
        keys.pop("num_attention_heads"), keys.pop("head_dim")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **keys)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith((".gate.weight", ".router.weight", ".router.layer.weight", ".router.bias")):
            nn.init.normal_(parameter, std=0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            nn.init.normal_(buffer, std=0.2)
    return model


def save(model: nn.Module, folder: Path) -> Path:
    """The model as safetensors, in several files, with no tokenizer."""
    model.save_pretrained(folder, max_shard_size="200KB")  # type: ignore[operator]
    return folder


def picks_of(model_type: str, router: nn.Module, x: Tensor, config: Any) -> list[list[tuple[int, float]]]:
    """For each token its (expert, weight), by loops over the published formula in float64; in no order.

    x: the hidden states that came to the router, [T, D].
    """
    linear = router.layer if model_type == "jetmoe" else router
    logits = x.double() @ linear.weight.double().T
    if model_type == "gpt_oss":
        logits += router.bias.double()
    bias = router.e_score_correction_bias.double().tolist() if hasattr(router, "e_score_correction_bias") else None
    return [_pick(model_type, row, bias, config) for row in logits.tolist()]


def _pick(model_type: str, z: list[float], bias: list[float] | None, config: Any) -> list[tuple[int, float]]:
    k = config.num_experts_per_tok
    if model_type in ("deepseek_v3", "glm4_moe"):
        p = [1 / (1 + math.exp(-v)) for v in z]
        assert bias is not None
        c = [one + other for one, other in zip(p, bias, strict=True)]
        size = len(z) // config.n_group
        groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
        groups.sort(key=lambda g: -sum(sorted((c[e] for e in g), reverse=True)[:2]))
        allowed = [e for g in groups[: config.topk_group] for e in g]
        top = sorted(allowed, key=lambda e: -c[e])[:k]
        total = sum(p[e] for e in top) if config.norm_topk_prob else 1.0
        return [(e, p[e] / total * config.routed_scaling_factor) for e in top]
    top = sorted(range(len(z)), key=lambda e: -z[e])[:k]
    if model_type == "llama4_text":
        return [(e, 1 / (1 + math.exp(-z[e]))) for e in top]
    renormalised = model_type in ("mixtral", "gpt_oss", "jetmoe") or config.norm_topk_prob
    whole = top if renormalised else range(len(z))
    return [(e, math.exp(z[e]) / sum(math.exp(z[i]) for i in whole)) for e in top]


@dataclass(frozen=True)
class Recorded:
    """A trained model's folder, the texts it read, and the file the command wrote."""

    model: Path
    texts: tuple[Path, ...]
    file: Path
    trace: Trace


def traced(*words: str) -> Any:
    """The command, with a user's mistakes turned into lines as under `moebench`."""
    return CliRunner().invoke(Commands(commands={"trace": trace}), ["trace", *words])


def train(texts: list[bytes]) -> torch.nn.Module:
    """Next-byte prediction and load balance for a few seconds, enough that bytes and domains prefer experts."""
    model = tiny(
        "olmoe", hidden_size=64, head_dim=16, intermediate_size=32, output_router_logits=True, router_aux_loss_coef=0.02
    ).train()
    streams = [torch.tensor(list(text)) for text in texts]
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        stream = streams[step % len(streams)]
        starts = torch.randint(len(stream) - LENGTH, (BATCH,), generator=generator)
        batch = stream[starts[:, None] + torch.arange(LENGTH)]
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 4.0, "an untrained model has log(256) = 5.5"
    return model.eval()


def made(L: int = 2, T: int = 5, K: int = 2, E: int = 4, **facts: Any) -> Trace:
    """A small trace whose token t names experts t, t + 1, ... of E."""
    ids = (np.arange(T)[None, :, None] + np.arange(K) + np.arange(L)[:, None, None]) % E
    own = Facts("m", "mixtral", E, K, tuple(range(L)), ("a", "b"), "bytes", "output", "float32", "0.1")
    return Trace(
        replace(own, **facts),
        ids.astype(expert_dtype(E)),
        np.linspace(0, 1, L * T * K, dtype=np.float32).reshape(L, T, K),
        np.arange(T, dtype=np.int32),
        np.arange(T, dtype=np.int32),
        (np.arange(T) % 2).astype(np.uint16),
        {0: "\ud800 <b>\x1b[31m", 3: "word"},
    )
