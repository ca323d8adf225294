"""The routed part of an MoE layer, differentiable.

    y[t] = sum over kept k of weights[t, k] * W_down[e] act(W_gate_up[e] x[t]),     e = ids[t, k]

Forward: plan, up-projection with fused gather, down-projection, combine.
Backward keeps x, the pre-activation z and the routing; neither the activations nor the experts'
answers are cached. With dy the upstream gradient and r a row of token t:

    da[r] = W_down[e].T dy[t]          before the weight; then d_weights[t, k] = <da[r], a[r]>
    dW_down[e] = sum dy[t] outer (w a)[r]
    dz = act'(z) (w da);   dW_gate_up[e] = sum dz[r] outer x[t];   dx[t] = sum W_gate_up[e].T dz[r]

Shapes: x [T, D], ids and weights [T, K], w_gate_up [E, mF, D], w_down [E, D, F], y [T, D].
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebench_kernels.activation import ACTIVATIONS, input_maps, launch_activation_backward
from moebench_kernels.checks import (
    FLOATS,
    INTEGERS,
    check_choice,
    check_launch,
    check_same_dtype,
    check_tensor,
)
from moebench_kernels.combine import combine_torch, launch_gather_sum
from moebench_kernels.grouped_gemm import launch_grouped_gemm
from moebench_kernels.plan import Plan, routing_plan, routing_plan_torch
from moebench_kernels.projections import check_gate_up, down_projection_torch, up_projection_torch
from moebench_kernels.ragged_gemm import launch_ragged_gemm


def moe_layer_torch(
    x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, *, activation: str = "swiglu"
) -> Tensor:
    """Reference of `moe_layer`; runs on any device, differentiable, float64 included."""
    plan = routing_plan_torch(ids, w_gate_up.shape[0])
    hidden = up_projection_torch(x, w_gate_up, plan, activation=activation)
    return combine_torch(down_projection_torch(hidden, w_down, plan), weights, plan)


class _MoELayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, plan: Plan, activation: str, keep: bool
    ) -> Tensor:
        hidden, z = launch_grouped_gemm(x, w_gate_up, plan, gather=True, activation=activation, save_z=keep)
        rows, _ = launch_grouped_gemm(hidden, w_down, plan)
        ctx.plan, ctx.activation = plan, activation
        ctx.save_for_backward(x, weights, w_gate_up, w_down, z)
        return launch_gather_sum(rows, weights, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, w_gate_up, w_down, z = ctx.saved_tensors
        plan, dy, dx, dw_gate_up, dw_down = ctx.plan, dy.contiguous(), None, None, None
        da, _ = launch_grouped_gemm(dy, w_down, plan, transpose=True, gather=True)
        dz, weighted, d_weights = launch_activation_backward(z, da, ctx.activation, plan, weights)
        if ctx.needs_input_grad[0]:
            d_rows, _ = launch_grouped_gemm(dz, w_gate_up, plan, transpose=True)
            dx = launch_gather_sum(d_rows, None, plan)
        if ctx.needs_input_grad[2]:
            dw_gate_up = launch_ragged_gemm(dz, x, plan, gather_right=True)
        if ctx.needs_input_grad[3]:
            dw_down = launch_ragged_gemm(dy, weighted, plan, gather_left=True)
        return dx, d_weights, dw_gate_up, dw_down, None, None, None


def moe_layer(
    x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, *, activation: str = "swiglu"
) -> Tensor:
    """The experts of an MoE layer on given routing. Differentiable in `x`, `weights`, `w_gate_up` and `w_down`.

    Args:
        x: [T, D], float32, float16 or bfloat16, contiguous; T may be 0.
        ids: int32 or int64 [T, K]; outside 0..E-1 (say -1): dropped. Any strides.
        weights: float32 [T, K]. Any strides.
        w_gate_up: of x's dtype; [E, 2F, D], gate rows first, for "swiglu" and "geglu"; [E, F, D] for the others.
        w_down: [E, D, F], x's dtype.
        activation: "swiglu", "geglu", "relu", "gelu" (erf) or "silu".

    Returns:
        y [T, D] of x's dtype. The activations and the experts' answers are rounded to x's dtype in between,
        the pre-activation is not.

    Raises:
        TypeError, ValueError: before any launch.

    Source: Shazeer 2017, arXiv 1701.06538, eq. 1; backward without cached answers: SonicMoE, arXiv 2512.14080.
    """
    check_choice("activation", activation, ACTIVATIONS)
    check_tensor("x", x, ("T", "D"), FLOATS)
    T, D = x.shape
    check_tensor("ids", ids, (T, "K"), INTEGERS, strided=True)
    check_tensor("weights", weights, tuple(ids.shape), (torch.float32,), strided=True)
    check_gate_up(w_gate_up, "E", D, activation)
    E, F = w_gate_up.shape[0], w_gate_up.shape[1] // input_maps(activation)
    check_tensor("w_down", w_down, (E, D, F), FLOATS)
    check_same_dtype(x=x, w_gate_up=w_gate_up, w_down=w_down)
    check_launch(x=x, ids=ids, weights=weights, w_gate_up=w_gate_up, w_down=w_down)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights, w_gate_up, w_down))
    return _MoELayer.apply(x, weights.contiguous(), w_gate_up, w_down, routing_plan(ids, E), activation, keep)
