"""The two maps of an expert, on all rows at once.

    up      a[r] = act(W_gate_up[e] x[r] + b_gate_up[e])       one grouped GEMM; the activation is in its epilogue
    down    y[r] = W_down[e] a[r] + b_down[e]                  one grouped GEMM

Backward of up keeps x and the pre-activation z, and recomputes a.

Shapes: x [T, D] or rows [T*K, D], w_gate_up [E, mF, D] (m = 2 for gated kinds, gate rows first, then up rows; else 1),
b_gate_up [E, mF], a [T*K, F], w_down [E, D, F], b_down [E, D].
"""

from typing import Any

import torch
from torch import Tensor

from moebench_kernels.activation import ACTIVATIONS, activate_torch, input_maps, launch_activation_backward
from moebench_kernels.bias_gradient import bias_gradient
from moebench_kernels.checks import FLOATS, check_choice, check_launch, check_one_device, check_same_dtype, check_tensor
from moebench_kernels.combine import launch_gather_sum
from moebench_kernels.grouped_gemm import check_bias, grouped_gemm, grouped_gemm_torch, launch_grouped_gemm
from moebench_kernels.permute import permute_torch
from moebench_kernels.plan import Plan, check_plan
from moebench_kernels.ragged_gemm import launch_ragged_gemm


def up_projection_torch(
    x: Tensor,
    w_gate_up: Tensor,
    plan: Plan,
    *,
    activation: str = "swiglu",
    bias: Tensor | None = None,
    permuted: bool = False,
) -> Tensor:
    """Reference of `up_projection`; runs on any device, float64 included. Rounds once, after the activation."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x if permuted else permute_torch(x, plan)
    hidden = activate_torch(grouped_gemm_torch(rows.to(wide), w_gate_up.to(wide), plan, bias=bias), activation)
    return hidden.to(x.dtype)


def down_projection_torch(hidden: Tensor, w_down: Tensor, plan: Plan, *, bias: Tensor | None = None) -> Tensor:
    """Reference of `down_projection`; runs on any device, float64 included."""
    return grouped_gemm_torch(hidden, w_down, plan, bias=bias)


@torch.library.custom_op("moebench::up_projection", mutates_args=())
def _up_projection(
    x: Tensor, w_gate_up: Tensor, bias: Tensor | None, plan: list[Tensor], block_m: int,
    activation: str, permuted: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The hidden rows and, where `keep`, the pre-activation (else a tensor of no elements)."""
    check_launch(x=x, w_gate_up=w_gate_up, plan=plan[0], bias=x if bias is None else bias)
    hidden, z = launch_grouped_gemm(
        x, w_gate_up, Plan(*plan, block_m), gather=not permuted, activation=activation, save_z=keep, bias=bias
    )
    return hidden, x.new_empty(0) if z is None else z


@_up_projection.register_fake
def _(x, w_gate_up, bias, plan, block_m, activation, permuted, keep):  # type: ignore[no-untyped-def]
    n_rows, width = plan[2].shape[0], w_gate_up.shape[1]
    return x.new_empty(n_rows, width // input_maps(activation)), x.new_empty(*((n_rows, width) if keep else (0,)))


@torch.library.custom_op("moebench::up_projection_backward", mutates_args=())
def _up_projection_backward(
    d_hidden: Tensor, z: Tensor, x: Tensor, w_gate_up: Tensor, plan: list[Tensor], block_m: int,
    activation: str, permuted: bool, want_dx: bool, want_dw: bool, want_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, d_w_gate_up and, in float32, d_bias; a tensor of no elements for each that is not wanted."""
    check_launch(d_hidden=d_hidden, w_gate_up=w_gate_up)
    whole = Plan(*plan, block_m)
    dz = launch_activation_backward(z, d_hidden, activation, whole)
    dx, dw, db = x.new_empty(0), x.new_empty(0), x.new_empty(0, dtype=torch.float32)
    if want_dx:
        dx, _ = launch_grouped_gemm(dz, w_gate_up, whole, transpose=True)
        dx = dx if permuted else launch_gather_sum(dx, None, whole)
    if want_dw:
        dw = launch_ragged_gemm(dz, x, whole, gather_right=not permuted)
    if want_db:
        db = bias_gradient(dz, whole.offsets)
    return dx, dw, db


@_up_projection_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    d_hidden, z, x, w_gate_up, plan, block_m, activation, permuted, want_dx, want_dw, want_db
):
    nothing = (0,)
    return (
        x.new_empty(x.shape if want_dx else nothing),
        w_gate_up.new_empty(w_gate_up.shape if want_dw else nothing),
        x.new_empty(w_gate_up.shape[:2] if want_db else nothing, dtype=torch.float32),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w_gate_up, bias, plan, ctx.block_m, ctx.activation, ctx.permuted, ctx.keep = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], x, w_gate_up, *plan)


def _backward(ctx: Any, d_hidden: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    z, x, w_gate_up, *plan = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    if d_hidden is None:
        return None, None, None, [None] * len(plan), None, None, None, None
    grads = _up_projection_backward(
        d_hidden.contiguous(), z, x, w_gate_up, plan, ctx.block_m, ctx.activation, ctx.permuted, *wanted
    )
    dx, dw, db = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    return dx, dw, None if db is None else db.to(ctx.bias_dtype), [None] * len(plan), None, None, None, None


_up_projection.register_autograd(_backward, setup_context=_setup)


def up_projection(
    x: Tensor,
    w_gate_up: Tensor,
    plan: Plan,
    *,
    activation: str = "swiglu",
    bias: Tensor | None = None,
    permuted: bool = False,
) -> Tensor:
    """act(W_gate_up[e] x + b[e]) for every assignment. Differentiable in `x`, `w_gate_up` and `bias`.

    Args:
        x: [T, D] hidden states, gathered while they are loaded; or, when `permuted`, rows [T*K, D] from `permute`.
            float32, float16 or bfloat16, contiguous.
        w_gate_up: of x's dtype; [E, 2F, D], gate rows first, for the gated activations ("swiglu", "geglu",
            "clamped_swiglu"); [E, F, D] for the others.
        plan: of these tokens.
        activation: "swiglu", "geglu", "clamped_swiglu" (gpt-oss), "relu", "gelu" (erf) or "silu".
        bias: [E, 2F] or [E, F], of x's dtype or float32; added before the activation.
        permuted: which of the two forms `x` has (with K = 1 the shapes would not tell).

    Returns:
        [T*K, F] of x's dtype; accumulated and activated in float32; zero past offsets[E].

    Raises:
        TypeError, ValueError: before any launch.

    Source: SwiGLU and GeGLU: Shazeer 2020, arXiv 2002.05202, eq. 6; clamped: OpenAI, gpt-oss model card, 2025.
    """
    check_choice("activation", activation, ACTIVATIONS)
    check_plan(plan)
    check_tensor("x", x, (plan.n_rows if permuted else plan.n_tokens, "D"), FLOATS)
    check_gate_up(w_gate_up, plan.n_experts, x.shape[1], activation)
    check_same_dtype(x=x, w_gate_up=w_gate_up)
    check_bias("bias", bias, plan.n_experts, w_gate_up.shape[1], x.dtype)
    check_one_device(x=x, w_gate_up=w_gate_up, bias=bias, plan=plan.counts)
    wanted = x.requires_grad or w_gate_up.requires_grad or (bias is not None and bias.requires_grad)
    keep = torch.is_grad_enabled() and wanted
    return _up_projection(x, w_gate_up, bias, list(plan[:-1]), plan.block_m, activation, permuted, keep)[0]


def check_gate_up(w_gate_up: Tensor, n_experts: int | str, D: int, activation: str) -> None:
    """Raise unless w_gate_up is [E, mF, D] with m as the activation has it."""
    gated = input_maps(activation) == 2
    check_tensor("w_gate_up", w_gate_up, (n_experts, "2F" if gated else "F", D), FLOATS)
    if gated and w_gate_up.shape[1] % 2:
        raise ValueError(
            f"w_gate_up has {w_gate_up.shape[1]} rows an expert; {activation} needs an even number (gate, up)"
        )


def down_projection(hidden: Tensor, w_down: Tensor, plan: Plan, *, bias: Tensor | None = None) -> Tensor:
    """W_down[e] a + b[e] for every row. Differentiable in `hidden`, `w_down` and `bias`.

    Args:
        hidden: [T*K, F], float32, float16 or bfloat16, contiguous, in the plan's order.
        w_down: [E, D, F] of the same dtype.
        plan: of these rows.
        bias: [E, D], of the same dtype or float32.

    Returns:
        [T*K, D] of the same dtype; zero past offsets[E].

    Raises:
        TypeError, ValueError: before any launch.
    """
    check_plan(plan)
    check_tensor("hidden", hidden, (plan.n_rows, "F"), FLOATS)
    check_tensor("w_down", w_down, (plan.n_experts, "D", hidden.shape[1]), FLOATS)
    return grouped_gemm(hidden, w_down, plan, bias=bias)
