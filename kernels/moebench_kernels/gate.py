"""Gate: logits -> the K experts of each token, and their weights.

    ids     = the K largest of z, ties to the lower id
    weights = scale * exp(z_ids - max z) / n
    n       = sum over all E experts of exp(z - max z)      softmax, then top-k ("score_first"; OLMoE, Qwen)
            = sum over the K chosen experts of the same     "topk_first" (Mixtral), or renormalised

Softmax keeps the order of z, so the choice is made on z itself: logits whose
probabilities round to the same number are still told apart. Before that,
NaN and -inf become the lowest finite float32 and +inf the highest, so every row
has K distinct ids and finite weights; such logits receive no gradient.

Backward, with p the softmax over the experts that n sums, and g = dL/dweights
put at its expert (0 elsewhere): dz = scale * p * (g - sum(p * g)).

Shapes: logits [T, E], ids [T, K], weights [T, K].
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebench_kernels.checks import FLOATS, check_choice, check_launch, check_tensor
from moebench_kernels.runtime import cdiv, jit, next_power_of_2, on_device, tl

SCORINGS = ("softmax", "sigmoid", "sqrt_softplus")
ORDERS = ("score_first", "topk_first")
MAX_TOP_K = 64
MAX_EXPERTS = 4096


def topk_gate_torch(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    order: str = "score_first",
    renormalise: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Reference of `topk_gate`; runs on any device. In float64 it computes and returns float64 weights."""
    _check_options(logits, top_k, scoring, order)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    limit = torch.finfo(torch.float32).max
    z = torch.nan_to_num(z, nan=-limit, posinf=limit, neginf=-limit)
    ids = torch.sort(z, dim=-1, descending=True, stable=True).indices[:, :top_k]
    if order == "topk_first" or renormalise:
        weights = torch.softmax(z.gather(1, ids), dim=-1)
    else:
        weights = torch.softmax(z, dim=-1).gather(1, ids)
    return ids.int().contiguous(), weights * scale


@dataclass(frozen=True)
class GateConfig:
    """Tile of a gate kernel: tokens a program takes; the row of E logits stays in registers."""

    block_t: int
    num_warps: int = 4


def gate_config(n_experts: int) -> GateConfig:
    """About 4096 logits a program: 32 registers a thread, which leaves room for the second copy in backward."""
    return GateConfig(block_t=max(1, 4096 // next_power_of_2(n_experts)))


@jit
def _load_logits(logits_ptr, token, expert, T, E):
    """Sanitised logits (-inf in columns that do not exist), and whether each was finite."""
    exists = (token < T)[:, None] & (expert < E)[None, :]
    raw = tl.load(logits_ptr + token[:, None] * E + expert[None, :], mask=exists, other=0.0).to(tl.float32)
    limit = 3.4028234663852886e38
    z = tl.where(raw != raw, -limit, tl.minimum(tl.maximum(raw, -limit), limit))
    return tl.where((expert < E)[None, :], z, float("-inf")), tl.abs(raw) <= limit


@jit
def _topk_gate_kernel(
    logits_ptr, ids_ptr, weights_ptr, T, E, scale,
    TOP_K: tl.constexpr, OVER_CHOSEN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    pick = tl.arange(0, BLOCK_K)
    z, _ = _load_logits(logits_ptr, token, expert, T, E)
    peak = tl.max(z, axis=1)
    total = tl.sum(tl.exp(z - peak[:, None]), axis=1)
    ids = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    chosen = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for k in range(TOP_K):
        best = tl.argmax(z, axis=1, tie_break_left=True)
        value = tl.exp(tl.max(z, axis=1) - peak)
        ids = tl.where(pick[None, :] == k, best[:, None], ids)
        chosen = tl.where(pick[None, :] == k, value[:, None], chosen)
        z = tl.where(expert[None, :] == best[:, None], float("-inf"), z)
    if OVER_CHOSEN:
        total = tl.sum(chosen, axis=1)
    at = token[:, None] * TOP_K + pick[None, :]
    exists = (token < T)[:, None] & (pick < TOP_K)[None, :]
    tl.store(ids_ptr + at, ids, mask=exists)
    tl.store(weights_ptr + at, scale * chosen / total[:, None], mask=exists)


@jit
def _topk_gate_backward_kernel(
    logits_ptr, ids_ptr, d_weights_ptr, d_logits_ptr, T, E, scale,
    TOP_K: tl.constexpr, OVER_CHOSEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    z, finite = _load_logits(logits_ptr, token, expert, T, E)
    upstream = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    chosen = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    for k in range(TOP_K):
        picked = tl.load(ids_ptr + token * TOP_K + k, mask=token < T, other=0)
        grad = tl.load(d_weights_ptr + token * TOP_K + k, mask=token < T, other=0.0)
        here = expert[None, :] == picked[:, None]
        upstream += tl.where(here, grad[:, None], 0.0)
        chosen += here.to(tl.int32)
    p = tl.exp(z - tl.max(z, axis=1)[:, None])
    if OVER_CHOSEN:
        p = tl.where(chosen > 0, p, 0.0)
    p = p / tl.sum(p, axis=1)[:, None]
    d_z = scale * p * (upstream - tl.sum(p * upstream, axis=1)[:, None])
    exists = (token < T)[:, None] & (expert < E)[None, :]
    d_z = tl.where(finite, d_z, 0.0).to(d_logits_ptr.dtype.element_ty)
    tl.store(d_logits_ptr + token[:, None] * E + expert[None, :], d_z, mask=exists)


class _TopKGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int, over_chosen: bool, scale: float) -> tuple[Tensor, Tensor]:
        T, E = logits.shape
        ids = torch.empty(T, top_k, dtype=torch.int32, device=logits.device)
        weights = torch.empty(T, top_k, dtype=torch.float32, device=logits.device)
        config = gate_config(E)
        if T:
            with on_device(logits):
                _topk_gate_kernel[(cdiv(T, config.block_t),)](
                    logits, ids, weights, T, E, scale,
                    TOP_K=top_k, OVER_CHOSEN=over_chosen,
                    BLOCK_T=config.block_t, BLOCK_E=next_power_of_2(E), BLOCK_K=next_power_of_2(top_k),
                    num_warps=config.num_warps,
                )  # fmt: skip
        ctx.save_for_backward(logits, ids)
        ctx.over_chosen, ctx.scale = over_chosen, scale
        ctx.mark_non_differentiable(ids)
        return ids, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any, d_weights: Tensor) -> tuple[Tensor, None, None, None]:
        logits, ids = ctx.saved_tensors
        (T, E), top_k = logits.shape, ids.shape[1]
        d_logits = torch.empty_like(logits)
        config = gate_config(E)
        if T:
            with on_device(logits):
                _topk_gate_backward_kernel[(cdiv(T, config.block_t),)](
                    logits, ids, d_weights.contiguous(), d_logits, T, E, ctx.scale,
                    TOP_K=top_k, OVER_CHOSEN=ctx.over_chosen,
                    BLOCK_T=config.block_t, BLOCK_E=next_power_of_2(E), num_warps=config.num_warps,
                )  # fmt: skip
        return d_logits, None, None, None


def topk_gate(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    order: str = "score_first",
    renormalise: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose K experts a token. Differentiable in `logits`.

    Args:
        logits: [T, E], float32, float16 or bfloat16; computed in float32. E <= 4096, any number.
        top_k: K, 1 <= K <= min(E, 64).
        scoring: "softmax" ("sigmoid" and "sqrt_softplus" are not built yet).
        order: "score_first", top-k of the softmax over all experts, or "topk_first", softmax over the K largest logits.
        renormalise: divide the K weights by their sum (no effect on "topk_first").
        scale: factor on the weights after that.

    Returns:
        ids int32 [T, K], distinct in a row, by falling logit; weights float32 [T, K], finite.

    Raises:
        TypeError, ValueError: before any launch.

    Source: Shazeer 2017, arXiv 1701.06538, eq. 3-5 without noise; Mixtral, arXiv 2401.04088, section 2.1.
    """
    _check_options(logits, top_k, scoring, order)
    check_tensor("logits", logits, ("T", "E"), FLOATS)
    check_launch(logits=logits)
    return _TopKGate.apply(logits, top_k, order == "topk_first" or renormalise, float(scale))


def _check_options(logits: Tensor, top_k: int, scoring: str, order: str) -> None:
    check_choice("scoring", scoring, SCORINGS)
    check_choice("order", order, ORDERS)
    if scoring != "softmax":
        raise ValueError(f"scoring {scoring!r} is not built yet; built: softmax")
    if logits.dim() != 2:
        raise ValueError(f"logits has shape {list(logits.shape)}; needed: [T, E]")
    E = logits.shape[1]
    if E > MAX_EXPERTS:
        raise ValueError(f"logits has {E} experts; at most {MAX_EXPERTS} are supported")
    if not 1 <= top_k <= min(E, MAX_TOP_K):
        raise ValueError(f"top_k is {top_k}; it must be between 1 and min(E, {MAX_TOP_K}) = {min(E, MAX_TOP_K)}")
