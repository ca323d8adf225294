"""The routed part of an MoE layer, differentiable.

    y[t] = sum over kept k of weights[t, k] * (W_down[e] act(W_gate_up[e] x[t] + b_gate_up[e]) + b_down[e])
    with e = ids[t, k]

Forward: plan, up-projection with fused gather, down-projection, combine.
Backward keeps x, the pre-activation z and the routing; neither the activations nor the experts'
answers are cached. With dy the upstream gradient, r a row of token t and w its router weight:

    da[r] = W_down[e].T dy[t];  d_weights[t, k] = <da[r], a[r]> + <dy[t], b_down[e]>
    dW_down[e] = sum dy[t] outer (w a)[r];           db_down[e] = sum w dy[t]
    dz = act'(z) (w da);   dW_gate_up[e] = sum dz[r] outer x[t];   db_gate_up[e] = sum dz[r]
    dx[t] = sum W_gate_up[e].T dz[r]

Shapes: x [T, D], ids and weights [T, K], w_gate_up [E, mF, D], w_down [E, D, F], b_gate_up [E, mF], b_down [E, D],
z [T*K, mF], y [T, D].
"""

from typing import Any

import torch
from torch import Tensor

from moebench_kernels.activation import ACTIVATIONS, input_maps
from moebench_kernels.activation_gemm_backward import launch_activation_gemm_backward
from moebench_kernels.bias_gradient import bias_gradient
from moebench_kernels.checks import (
    FLOATS,
    INTEGERS,
    check_choice,
    check_launch,
    check_one_device,
    check_same_dtype,
    check_tensor,
)
from moebench_kernels.combine import combine_torch, launch_gather_sum
from moebench_kernels.decode import MAX_TOKENS, decode_layer
from moebench_kernels.decode_gemm import MAX_ASSIGNMENTS
from moebench_kernels.grouped_gemm import check_bias, grouped_gemm_torch, launch_grouped_gemm
from moebench_kernels.plan import Plan, check_plan_of, routing_plan, routing_plan_torch
from moebench_kernels.projections import check_gate_up, up_projection_torch
from moebench_kernels.quantise import QuantisedWeights
from moebench_kernels.quantised_layer import quantised_moe_layer
from moebench_kernels.ragged_gemm import launch_ragged_gemm


def moe_layer_torch(
    x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, *, activation: str = "swiglu",
    b_gate_up: Tensor | None = None, b_down: Tensor | None = None, capacity: int | None = None,
    priority: Tensor | None = None, plan: Plan | None = None,
) -> Tensor:  # fmt: skip
    """Reference of `moe_layer`; runs on any device, differentiable, float64 included."""
    if plan is None:
        plan = routing_plan_torch(ids, w_gate_up.shape[0], **_given(capacity=capacity, priority=priority))
    hidden = up_projection_torch(x, w_gate_up, plan, activation=activation, bias=b_gate_up)
    return combine_torch(grouped_gemm_torch(hidden, w_down, plan, bias=b_down), weights, plan)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


@torch.library.custom_op("moebench::moe_layer", mutates_args=())
def _moe_layer(
    x: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, b_gate_up: Tensor | None, b_down: Tensor | None,
    plan: list[Tensor], block_m: int, activation: str, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and z where `keep` (else nothing: [0])."""
    given = _given(b_gate_up=b_gate_up, b_down=b_down)
    check_launch(x=x, weights=weights, w_gate_up=w_gate_up, w_down=w_down, plan=plan[0], **given)
    p = Plan(*plan, block_m)
    hidden, z = launch_grouped_gemm(x, w_gate_up, p, gather=True, activation=activation, save_z=keep, bias=b_gate_up)
    rows, _ = launch_grouped_gemm(hidden, w_down, p, bias=b_down)
    return launch_gather_sum(rows, weights, p), x.new_empty(0) if z is None else z


@_moe_layer.register_fake
def _(x, weights, w_gate_up, w_down, b_gate_up, b_down, plan, block_m, activation, keep):  # type: ignore[no-untyped-def]
    z = x.new_empty(plan[2].shape[0], w_gate_up.shape[1]) if keep else x.new_empty(0)
    return torch.empty_like(x), z


@torch.library.custom_op("moebench::moe_layer_backward", mutates_args=())
def _moe_layer_backward(
    dy: Tensor, x: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, b_down: Tensor | None, z: Tensor,
    plan: list[Tensor], block_m: int, activation: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, weights, w_gate_up, w_down, b_gate_up (float32), b_down (float32); [0] where not needed."""
    check_launch(dy=dy, x=x, weights=weights, w_gate_up=w_gate_up, w_down=w_down, z=z)
    p = Plan(*plan, block_m)
    need_x, need_weights, need_gate_up, need_down, need_b_gate_up, need_b_down = needs
    found = [x.new_empty(0) for _ in needs]
    if any(needs[:5]):
        dz, weighted, found[1] = launch_activation_gemm_backward(
            dy, w_down, z, weights, p, activation, need_wa=need_down, need_d_weights=need_weights,
            need_dz=need_x or need_gate_up or need_b_gate_up,
        )  # fmt: skip
    if need_weights and b_down is not None:
        found[1] += _answer_of_bias(dy, b_down, p)
    if need_down:
        found[3] = launch_ragged_gemm(dy, weighted, p, gather_left=True)
        del weighted
    if need_x:
        d_rows, _ = launch_grouped_gemm(dz, w_gate_up, p, transpose=True)
        found[0] = launch_gather_sum(d_rows, None, p)
        del d_rows
    if need_gate_up:
        found[2] = launch_ragged_gemm(dz, x, p, gather_right=True)
    if need_b_gate_up:
        found[4] = bias_gradient(dz, p.offsets)
    if need_b_down:
        found[5] = _weighted_sums(dy, weights, p)
    return found


def _answer_of_bias(dy: Tensor, b_down: Tensor, plan: Plan) -> Tensor:
    """<dy[t], b_down[e]> float32 [T, K], 0 where dropped: a grouped product with matrices of one row."""
    rows, _ = launch_grouped_gemm(dy, b_down.to(dy.dtype)[:, None, :].contiguous(), plan, gather=True)
    kept = plan.token2row >= 0
    return torch.where(kept, rows.flatten()[plan.token2row.clamp(min=0).long()].float(), 0.0)


def _weighted_sums(dy: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    """sum over rows of e of w dy[t], float32 [E, D]: a weight gradient whose left operand is one column of weights."""
    assignment = plan.row2assignment.long()
    column = torch.where(assignment >= 0, weights.flatten()[assignment.clamp(min=0)], 0.0)
    return launch_ragged_gemm(column.to(dy.dtype)[:, None], dy, plan, gather_right=True)[:, 0].float()


@_moe_layer_backward.register_fake
def _(dy, x, weights, w_gate_up, w_down, b_down, z, plan, block_m, activation, needs):  # type: ignore[no-untyped-def]
    E, D, _F = w_down.shape
    wide = {"dtype": torch.float32}
    like = [
        torch.empty_like(x), torch.empty_like(weights), torch.empty_like(w_gate_up), torch.empty_like(w_down),
        x.new_empty(E, w_gate_up.shape[1], **wide), x.new_empty(E, D, **wide),
    ]  # fmt: skip
    return [full if need else x.new_empty(0) for full, need in zip(like, needs, strict=True)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weights, w_gate_up, w_down, b_gate_up, b_down, plan, ctx.block_m, ctx.activation, _keep = inputs
    ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in (b_gate_up, b_down)]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weights, w_gate_up, w_down, b_down, output[1], *plan)


def _backward(ctx: Any, dy: Tensor | None, _dz: None) -> tuple[Any, ...]:
    x, weights, w_gate_up, w_down, b_down, z, *plan = ctx.saved_tensors
    if dy is None:
        return *(None,) * 6, [None] * len(plan), None, None, None
    needs = list(ctx.needs_input_grad[:6])
    found = _moe_layer_backward(
        dy.contiguous(), x, weights, w_gate_up, w_down, b_down, z, plan, ctx.block_m, ctx.activation, needs
    )
    dtypes = [x.dtype, weights.dtype, w_gate_up.dtype, w_down.dtype, *ctx.bias_dtypes]
    gradients = [g.to(dtype) if need else None for g, dtype, need in zip(found, dtypes, needs, strict=True)]
    return *gradients, [None] * len(plan), None, None, None


def _refuse(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError("moe_layer has no second derivatives (its backward is not differentiable)")


_moe_layer.register_autograd(_backward, setup_context=_setup)
_moe_layer_backward.register_autograd(_refuse)


def moe_layer(
    x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor | QuantisedWeights, w_down: Tensor | QuantisedWeights,
    *, activation: str = "swiglu", b_gate_up: Tensor | None = None, b_down: Tensor | None = None,
    capacity: int | None = None, priority: Tensor | None = None, plan: Plan | None = None,
) -> Tensor:  # fmt: skip
    """The experts of an MoE layer on given routing. Differentiable in all but `ids` and the routing options.

    Args:
        x: [T, D], float32, float16 or bfloat16, contiguous; T may be 0.
        ids: int32 or int64 [T, K]; outside 0..E-1 (say -1): dropped. Any strides.
        weights: float32 [T, K]. Any strides; those of dropped assignments are not read.
        w_gate_up: of x's dtype; [E, 2F, D], gate rows first, for the gated activations; [E, F, D] for the others.
        w_down: [E, D, F], x's dtype.
        activation: "swiglu", "geglu", "clamped_swiglu", "relu", "gelu" (erf) or "silu".
        b_gate_up: [E, 2F] or [E, F], x's dtype or float32.
        b_down: [E, D], likewise. Weighted like the answer it belongs to.
        capacity, priority: as `routing_plan` takes them: most rows an expert keeps, and which it keeps first.
        plan: the plan of `ids`, if the caller has one; `ids` is then not read, and capacity belongs to the plan.

    Both matrices may be `QuantisedWeights` instead (forward only, without biases); see `quantised_moe_layer`.
    Where no gradient is wanted, up to 128 tokens without plan and capacity take the decode path (`decode_layer`).

    Returns:
        y [T, D] of x's dtype. The activations and the experts' answers are rounded to x's dtype in between,
        the pre-activation is not. Where no gradient is wanted nothing is kept, else x, the pre-activation
        [T*K, mF] and the routing.

    Raises:
        TypeError, ValueError: before any launch.
        RuntimeError: for second derivatives.

    Source: Shazeer 2017, arXiv 1701.06538, eq. 1; backward without cached answers: SonicMoE, arXiv 2512.14080.
    """
    options = _given(capacity=capacity, priority=priority)
    if isinstance(w_gate_up, QuantisedWeights) or isinstance(w_down, QuantisedWeights):
        if given := _given(b_gate_up=b_gate_up, b_down=b_down):
            raise ValueError(f"{' and '.join(given)} given beside quantised weights, which take no biases")
        if plan is not None:
            _check_plan(plan, ids, w_gate_up.shape[0], options)
        elif options:
            plan = routing_plan(ids, w_gate_up.shape[0], **options)
        return quantised_moe_layer(x, ids, weights, w_gate_up, w_down, activation=activation, plan=plan)
    _check(x, ids, weights, w_gate_up, w_down, activation, b_gate_up, b_down)
    if plan is not None:
        _check_plan(plan, ids, w_gate_up.shape[0], options)
    return _forward(x, ids, weights, w_gate_up, w_down, activation, b_gate_up, b_down, plan, options)


def _forward(
    x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, activation: str,
    b_gate_up: Tensor | None, b_down: Tensor | None, plan: Plan | None, options: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Which way the checked layer goes."""
    differentiable = _given(x=x, weights=weights, w1=w_gate_up, w2=w_down, b1=b_gate_up, b2=b_down).values()
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable)
    if plan is None and not options and not keep and x.shape[0] <= MAX_TOKENS and ids.shape[1] <= MAX_ASSIGNMENTS:
        return decode_layer(
            x, ids, weights, w_gate_up, w_down, activation=activation, b_gate_up=b_gate_up, b_down=b_down
        )
    if plan is None:
        plan = routing_plan(ids, w_gate_up.shape[0], **options)
    y, _z = _moe_layer(
        x, weights.contiguous(), w_gate_up, w_down, b_gate_up, b_down, list(plan[:-1]), plan.block_m, activation, keep
    )
    return y


def _check(
    x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, activation: str,
    b_gate_up: Tensor | None, b_down: Tensor | None,
) -> None:  # fmt: skip
    check_choice("activation", activation, ACTIVATIONS)
    check_tensor("x", x, ("T", "D"), FLOATS)
    T, D = x.shape
    check_tensor("ids", ids, (T, "K"), INTEGERS, strided=True)
    check_tensor("weights", weights, tuple(ids.shape), (torch.float32,), strided=True)
    check_gate_up(w_gate_up, "E", D, activation)
    E, width = w_gate_up.shape[:2]
    check_tensor("w_down", w_down, (E, D, width // input_maps(activation)), FLOATS)
    check_same_dtype(x=x, w_gate_up=w_gate_up, w_down=w_down)
    check_bias("b_gate_up", b_gate_up, E, width, x.dtype)
    check_bias("b_down", b_down, E, D, x.dtype)
    check_one_device(
        x=x, ids=ids, weights=weights, w_gate_up=w_gate_up, w_down=w_down, b_gate_up=b_gate_up, b_down=b_down
    )


def _check_plan(plan: Plan, ids: Tensor, n_experts: int, options: dict[str, Any]) -> None:
    if options:
        raise ValueError(f"{' and '.join(options)} given beside a plan; give them to routing_plan")
    check_plan_of(plan, ids, n_experts)
