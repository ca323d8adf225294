"""Backward of the gate: d weights [T, K] -> d logits [T, E]. The choice itself, and so the bias, has no gradient.

With C the chosen experts, g = scale * dL/dweights put at its expert (0 elsewhere), and s the scores:

    renormalised    n = sum over C of s, + 1e-20    h = (g - sum(g s) / n) / n on C, 0 elsewhere
    else            h = g
    softmax         dz = s (h - sum(s h))           over all E; "topk_first": s over C, and dz 0 elsewhere
    others          dz = h ds/dz                    so 0 outside C

Logits that were not finite receive 0. Nothing is kept but logits and ids: scores are computed again.

Shapes: logits and d logits [T, E], ids and d weights [T, K].
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moebench_kernels.build import Build, signature
from moebench_kernels.checks import check_launch
from moebench_kernels.gate_scores import bounded, pointwise_score, pointwise_slope
from moebench_kernels.runtime import cdiv, interpreting, jit, next_power_of_2, on_device, tl


@dataclass(frozen=True)
class GateBackwardConfig:
    """Tile: tokens a program takes; each row of E logits stays in registers."""

    block_t: int
    num_warps: int


def gate_backward_config(n_experts: int, *, interpreted: bool = False) -> GateBackwardConfig:
    """1024 logits a program, 8 a thread in each of four copies; rows of 1024 and more take 16 a thread.

    With 8 there, sm_80's compiler settles for 40 registers and spills two.

    The interpreter pays by the operation, not by the element: there as many rows as a GPU never takes.
    """
    width = next_power_of_2(n_experts)
    if interpreted:
        return GateBackwardConfig(block_t=max(1, 16384 // width), num_warps=4)
    return GateBackwardConfig(block_t=max(1, 1024 // width), num_warps=4 if width < 1024 else width // 512)


@jit
def _topk_gate_backward_kernel(
    logits_ptr, ids_ptr, d_weights_ptr, d_logits_ptr, T, scale,
    E: tl.constexpr, SCORING: tl.constexpr, OVER_CHOSEN: tl.constexpr, RENORMALISE: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    exists = (token < T)[:, None] & (expert < E)[None, :]
    raw = tl.load(logits_ptr + token[:, None] * E + expert[None, :], mask=exists, other=0.0).to(tl.float32)
    z = bounded(raw)
    g = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    chosen = tl.zeros([BLOCK_T, BLOCK_E], tl.int1)
    for k in range(TOP_K):
        picked = tl.load(ids_ptr + token * TOP_K + k, mask=token < T, other=0)
        upstream = tl.load(d_weights_ptr + token * TOP_K + k, mask=token < T, other=0.0)
        here = expert[None, :] == picked[:, None]
        g = tl.where(here, scale * upstream[:, None], g)
        chosen = chosen | here
    if SCORING == "softmax":
        member = (expert < E)[None, :]
        if OVER_CHOSEN:
            member = chosen
        z = tl.where(member, z, float("-inf"))
        s = tl.exp(z - tl.max(z, axis=1)[:, None])
        s = s / tl.sum(s, axis=1)[:, None]
    else:
        s = pointwise_score(z, SCORING)
    # The mean that a softmax takes off; where renormalised, all but the guard's share of it is gone already.
    if RENORMALISE:
        n = tl.sum(tl.where(chosen, s, 0.0), axis=1) + 1e-20
        level = tl.sum(g * s, axis=1) / n
        g = tl.where(chosen, (g - level[:, None]) / n[:, None], 0.0)
        mean = level * (1e-20 / n)
    else:
        mean = tl.sum(g * s, axis=1)
    d_z = s * (g - mean[:, None]) if SCORING == "softmax" else g * pointwise_slope(z, s, SCORING)
    d_z = tl.where(tl.abs(raw) <= 3.4028234663852886e38, d_z, 0.0).to(d_logits_ptr.dtype.element_ty)
    tl.store(d_logits_ptr + token[:, None] * E + expert[None, :], d_z, mask=exists)


@torch.library.custom_op("moebench::topk_gate_backward", mutates_args=())
def topk_gate_backward(
    logits: Tensor, ids: Tensor, d_weights: Tensor, scoring: str, over_chosen: bool, renormalise: bool, scale: float
) -> Tensor:
    """d logits [T, E] in the logits' dtype, from d weights float32 [T, K]; see `topk_gate`."""
    check_launch(logits=logits, ids=ids, d_weights=d_weights)
    (T, E), K = logits.shape, ids.shape[1]
    d_logits = torch.empty_like(logits)
    if T:
        config = gate_backward_config(E, interpreted=interpreting())
        with on_device(logits):
            _topk_gate_backward_kernel[(cdiv(T, config.block_t),)](
                logits, ids, d_weights.contiguous(), d_logits, T, scale,
                E=E, SCORING=scoring, OVER_CHOSEN=over_chosen, RENORMALISE=renormalise and not over_chosen, TOP_K=K,
                BLOCK_T=config.block_t, BLOCK_E=next_power_of_2(E), num_warps=config.num_warps,
            )  # fmt: skip
    return d_logits


@topk_gate_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _build(dtype: str, n_experts: int, top_k: int, scoring: str, over_chosen: bool, renormalise: bool) -> Build:
    config = gate_backward_config(n_experts)
    constants = {
        "E": n_experts, "SCORING": scoring, "OVER_CHOSEN": over_chosen, "RENORMALISE": renormalise, "TOP_K": top_k,
        "BLOCK_T": config.block_t, "BLOCK_E": next_power_of_2(n_experts),
    }  # fmt: skip
    types = signature(_topk_gate_backward_kernel, dtype, constants, ids_ptr="*i32", d_weights_ptr="*fp32", scale="fp32")
    name = f"topk_gate_backward {scoring} {dtype} e{n_experts} k{top_k}"
    name += " chosen" * over_chosen + " renormalised" * renormalise
    return Build(
        name, _topk_gate_backward_kernel, types, constants, num_warps=config.num_warps, unaligned=("T", "ids_ptr")
    )


def builds() -> list[Build]:
    """Each scoring, each tile width that ships, each logits dtype."""
    return [
        _build("bf16", 8, 2, "softmax", True, False),
        _build("fp32", 64, 8, "softmax", False, False),
        _build("fp16", 128, 8, "softmax", True, False),
        _build("fp32", 256, 8, "sigmoid", False, True),
        _build("bf16", 512, 8, "sqrt_softplus", False, True),
        _build("fp32", 1024, 16, "softmax", False, True),
        _build("fp32", 2048, 16, "softmax", False, True),
        _build("fp32", 4096, 64, "softmax", False, True),
    ]
