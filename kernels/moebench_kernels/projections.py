"""The two maps of an expert, on all rows at once.

    up      a[r] = act(W_gate_up[e] x[r])       one grouped GEMM; the activation is in its epilogue
    down    y[r] = W_down[e] a[r]               one grouped GEMM

Backward of up keeps x and the pre-activation z, and recomputes a.

Shapes: x [T, D] or rows [T*K, D], w_gate_up [E, mF, D] (m = 2 for gated kinds, gate rows first, then up rows; else 1),
a [T*K, F], w_down [E, D, F].
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebench_kernels.activation import ACTIVATIONS, activate_torch, input_maps, launch_activation_backward
from moebench_kernels.checks import FLOATS, check_choice, check_launch, check_same_dtype, check_tensor
from moebench_kernels.combine import launch_gather_sum
from moebench_kernels.grouped_gemm import (
    grouped_gemm,
    grouped_gemm_torch,
    launch_grouped_gemm,
)
from moebench_kernels.permute import permute_torch
from moebench_kernels.plan import Plan
from moebench_kernels.ragged_gemm import launch_ragged_gemm


def up_projection_torch(
    x: Tensor, w_gate_up: Tensor, plan: Plan, *, activation: str = "swiglu", permuted: bool = False
) -> Tensor:
    """Reference of `up_projection`; runs on any device, float64 included. Rounds once, after the activation."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x if permuted else permute_torch(x, plan)
    z = grouped_gemm_torch(rows.to(wide), w_gate_up.to(wide), plan)
    return activate_torch(z, activation).to(x.dtype)


def down_projection_torch(hidden: Tensor, w_down: Tensor, plan: Plan) -> Tensor:
    """Reference of `down_projection`; runs on any device, float64 included."""
    return grouped_gemm_torch(hidden, w_down, plan)


class _UpProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_gate_up: Tensor, plan: Plan, activation: str, permuted: bool, keep: bool
    ) -> Tensor:
        hidden, z = launch_grouped_gemm(x, w_gate_up, plan, gather=not permuted, activation=activation, save_z=keep)
        ctx.plan, ctx.activation, ctx.permuted = plan, activation, permuted
        ctx.save_for_backward(x, w_gate_up, z)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hidden: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        x, w_gate_up, z = ctx.saved_tensors
        plan, dx, dw = ctx.plan, None, None
        dz, _, _ = launch_activation_backward(z, d_hidden.contiguous(), ctx.activation, plan)
        if ctx.needs_input_grad[0]:
            dx, _ = launch_grouped_gemm(dz, w_gate_up, plan, transpose=True)
            dx = dx if ctx.permuted else launch_gather_sum(dx, None, plan)
        if ctx.needs_input_grad[1]:
            dw = launch_ragged_gemm(dz, x, plan, gather_right=not ctx.permuted)
        return dx, dw, None, None, None, None


def up_projection(
    x: Tensor, w_gate_up: Tensor, plan: Plan, *, activation: str = "swiglu", permuted: bool = False
) -> Tensor:
    """act(W_gate_up[e] x) for every assignment. Differentiable in `x` and `w_gate_up`.

    Args:
        x: [T, D] hidden states, gathered while they are loaded; or, when `permuted`, rows [T*K, D] from `permute`.
            float32, float16 or bfloat16, contiguous.
        w_gate_up: of x's dtype; [E, 2F, D], gate rows first, for "swiglu" and "geglu"; [E, F, D] for the others.
        plan: of these tokens.
        activation: "swiglu", "geglu", "relu", "gelu" (erf) or "silu".
        permuted: which of the two forms `x` has (with K = 1 the shapes would not tell).

    Returns:
        [T*K, F] of x's dtype; accumulated and activated in float32; zero past offsets[E].

    Raises:
        TypeError, ValueError: before any launch.

    Source: SwiGLU and GeGLU: Shazeer 2020, arXiv 2002.05202, eq. 6.
    """
    check_choice("activation", activation, ACTIVATIONS)
    check_tensor("x", x, (plan.n_rows if permuted else plan.n_tokens, "D"), FLOATS)
    check_gate_up(w_gate_up, plan.n_experts, x.shape[1], activation)
    check_same_dtype(x=x, w_gate_up=w_gate_up)
    check_launch(x=x, w_gate_up=w_gate_up, plan=plan.counts)
    keep = torch.is_grad_enabled() and (x.requires_grad or w_gate_up.requires_grad)
    return _UpProjection.apply(x, w_gate_up, plan, activation, permuted, keep)


def check_gate_up(w_gate_up: Tensor, n_experts: int | str, D: int, activation: str) -> None:
    """Raise unless w_gate_up is [E, mF, D] with m as the activation has it."""
    gated = input_maps(activation) == 2
    check_tensor("w_gate_up", w_gate_up, (n_experts, "2F" if gated else "F", D), FLOATS)
    if gated and w_gate_up.shape[1] % 2:
        raise ValueError(
            f"w_gate_up has {w_gate_up.shape[1]} rows an expert; {activation} needs an even number (gate, up)"
        )


def down_projection(hidden: Tensor, w_down: Tensor, plan: Plan) -> Tensor:
    """W_down[e] a for every row. Differentiable in `hidden` and `w_down`.

    Args:
        hidden: [T*K, F], float32, float16 or bfloat16, contiguous, in the plan's order.
        w_down: [E, D, F] of the same dtype.
        plan: of these rows.

    Returns:
        [T*K, D] of the same dtype; zero past offsets[E].

    Raises:
        TypeError, ValueError: before any launch.
    """
    check_tensor("hidden", hidden, (plan.n_rows, "F"), FLOATS)
    check_tensor("w_down", w_down, (plan.n_experts, "D", hidden.shape[1]), FLOATS)
    return grouped_gemm(hidden, w_down, plan)
