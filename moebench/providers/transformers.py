"""transformers-eager, -batched-mm, -grouped-mm: the experts functions of Hugging Face transformers.

Its own experts module (Mixtral's) is built around the layer's weights, which have its layout, and run under each
implementation of its experts interface. Dropped assignments become the id E, which transformers skips.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor

from moebench.providers.case import Case
from moebench.providers.peers import Call, peer, peer_provider
from moebench.providers.torch_grouped import limits
from moebench.weights import DTYPES

HIDDEN_ACT = {"swiglu": "silu", "geglu": "gelu"}
COPIES = {"forward": 1, "forward_backward": 2}  # backward keeps them, and their gradients


def ready(w_gate_up: Tensor, w_down: Tensor, case: Case, *, implementation: str) -> Call:
    """w_gate_up [E, 2F, D], w_down [E, D, F], as they are."""
    if implementation == "batched_mm":
        require_memory(case, w_down.device)
    module = experts_module(w_gate_up, w_down, case, implementation)
    E, drops = w_down.shape[0], case.drops

    def call(x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        kept = ids.where(ids >= 0, E) if drops else ids
        y: Tensor = module(x, kept, gates.to(x.dtype))
        return y

    return call


def experts_module(w_gate_up: Tensor, w_down: Tensor, case: Case, implementation: str) -> Any:
    """A MixtralExperts whose weights are these very tensors, so that gradients reach them."""
    config = peer("transformers", "MixtralConfig")(
        hidden_size=case.layer.hidden_size,
        intermediate_size=case.layer.expert_ffn_size,
        num_local_experts=case.layer.routed_experts,
        num_experts_per_tok=case.layer.top_k,
        hidden_act=HIDDEN_ACT[case.layer.activation],
        experts_implementation=implementation,
    )
    with torch.device("meta"):
        module = peer("transformers.models.mixtral.modeling_mixtral", "MixtralExperts")(config)
    del module.gate_up_proj, module.down_proj
    module.gate_up_proj, module.down_proj = w_gate_up, w_down
    module._is_expert_parallel = case.drops  # its word for: ids of E are to be skipped
    return module


def require_memory(case: Case, device: torch.device) -> None:
    """Raise MemoryError where the copies of the weights cannot fit: on a CPU the system would kill the process."""
    size = case.layer.expert_params() * DTYPES[case.precision].itemsize
    needed = case.tokens * case.layer.top_k * size * COPIES[case.direction]
    left = _cuda_left(device) if device.type == "cuda" else psutil.virtual_memory().available
    if needed > left:
        raise MemoryError(
            f"batched_mm copies the weights for every assignment: {needed / 1e9:.3g} GB of {left / 1e9:.3g} GB left"
        )


def _cuda_left(device: torch.device) -> int:
    """Bytes that are free or in PyTorch's cache."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def loop_limits(case: Case) -> str | None:
    """Before 5.18 the loop takes no id E: on a GPU that is a failed assertion, which ends the process's use of it."""
    if case.drops and _numbers(version := peer("transformers", "__version__")) < (5, 18):
        return f"the loop of transformers {version} takes no dropped assignments; that of 5.18 does"
    return None


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def kept_rows(case: Case, counts: Tensor) -> float:
    """The loop and the grouped GEMM run what was kept."""
    return float(counts.sum())


def all_rows(case: Case, counts: Tensor) -> float:
    """batched_mm runs dropped assignments too, with weight 0."""
    return float(case.tokens * case.layer.top_k) if case.form == "TopK" else float(counts.sum())


def _provider(name: str, implementation: str, **declared: Any) -> Any:
    return peer_provider(
        name,
        partial(ready, implementation=implementation),
        devices=("cpu", "cuda"),
        precisions=("fp32", "bf16", "fp16"),
        directions=("forward", "forward_backward"),
        activations=tuple(HIDDEN_ACT),
        accepts_drops=True,
        **declared,
    )


EAGER = _provider("transformers-eager", "eager", flops_executed=kept_rows, limits=loop_limits)
BATCHED_MM = _provider("transformers-batched-mm", "batched_mm", flops_executed=all_rows)
GROUPED_MM = _provider("transformers-grouped-mm", "grouped_mm", flops_executed=kept_rows, limits=limits)
