"""The routed part of an MoE layer with quantised weights; forward only.

    y[t] = sum over kept k of weights[t, k] * W_down[e] h[r],   h[r] = act(W_gate_up[e] x[t]),   e = ids[t, k]

Activations are quantised where a matrix reads them: x once per token, before it is gathered, and the hidden rows
after they were rounded to x's dtype; "w4a16" quantises none. The experts' answers are rounded to x's dtype and summed
in float32.

Quantising the hidden rows in the up-projection's epilogue would spare one pass over them, but only for "fp8:128", and
only in a tile whose columns are a block of 128: with two sums, each with a part of its own, that tile spills at 128
rows. So it is a pass of its own.

Shapes: x [T, D], ids and weights [T, K], w_gate_up [E, mF, D] (m = 2 for gated kinds, gate rows first),
w_down [E, D, F].
"""

import torch
from torch import Tensor

from moebench_kernels.activation import ACTIVATIONS, input_maps
from moebench_kernels.checks import (
    FLOATS,
    INTEGERS,
    check_choice,
    check_launch,
    check_no_gradient,
    check_one_device,
    check_tensor,
)
from moebench_kernels.combine import combine, combine_torch
from moebench_kernels.plan import Plan, check_plan_of, routing_plan, routing_plan_torch
from moebench_kernels.quantise import (
    QuantisedWeights,
    check_quantised,
    check_supported,
    group_of,
    quantise_rows,
    quantise_rows_torch,
)
from moebench_kernels.quantised_gemm import quantised_gemm, quantised_gemm_torch


def quantised_moe_layer_torch(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w_gate_up: QuantisedWeights,
    w_down: QuantisedWeights,
    *,
    activation: str = "swiglu",
    plan: Plan | None = None,
) -> Tensor:
    """Reference of `quantised_moe_layer`: quantises at the same points, multiplies in float64; runs on any device."""
    plan = routing_plan_torch(ids, w_gate_up.shape[0]) if plan is None else plan
    hidden = quantised_gemm_torch(
        *_rows_torch(x, w_gate_up), w_gate_up, plan, activation=activation, gather=True, dtype=x.dtype
    )
    return combine_torch(quantised_gemm_torch(*_rows_torch(hidden, w_down), w_down, plan, dtype=x.dtype), weights, plan)


def _rows_torch(x: Tensor, weights: QuantisedWeights) -> tuple[Tensor, Tensor | None]:
    return (x, None) if group_of(weights.kind) else quantise_rows_torch(x, weights.kind)


def _rows(x: Tensor, weights: QuantisedWeights) -> tuple[Tensor, Tensor | None]:
    return (x, None) if group_of(weights.kind) else quantise_rows(x, weights.kind)


@torch.library.custom_op("moebench::quantised_moe_layer", mutates_args=())
def _layer(
    x: Tensor, weights: Tensor, up_values: Tensor, up_scales: Tensor, down_values: Tensor, down_scales: Tensor,
    counts: Tensor, offsets: Tensor, row2assignment: Tensor, token2row: Tensor,
    tile_offsets: Tensor, tile2expert: Tensor,
    block_m: int, up_kind: str, down_kind: str, activation: str,
) -> Tensor:  # fmt: skip
    check_launch(x=x, weights=weights, w_gate_up=up_values, w_down=down_values, plan=counts)
    check_supported(up_kind, x.device)
    check_supported(down_kind, x.device)
    plan = Plan(counts, offsets, row2assignment, token2row, tile_offsets, tile2expert, block_m)
    up, down = QuantisedWeights(up_values, up_scales, up_kind), QuantisedWeights(down_values, down_scales, down_kind)
    hidden = quantised_gemm(*_rows(x, up), up, plan, activation=activation, gather=True, dtype=x.dtype)
    return combine(quantised_gemm(*_rows(hidden, down), down, plan, dtype=x.dtype), weights, plan)


@_layer.register_fake
def _empty_y(
    x: Tensor, weights: Tensor, up_values: Tensor, up_scales: Tensor, down_values: Tensor, down_scales: Tensor,
    counts: Tensor, offsets: Tensor, row2assignment: Tensor, token2row: Tensor,
    tile_offsets: Tensor, tile2expert: Tensor,
    block_m: int, up_kind: str, down_kind: str, activation: str,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x)


def quantised_moe_layer(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w_gate_up: QuantisedWeights,
    w_down: QuantisedWeights,
    *,
    activation: str = "swiglu",
    plan: Plan | None = None,
) -> Tensor:
    """The experts of an MoE layer on given routing, with quantised weights. Forward only.

    Args:
        x: [T, D], float32, float16 or bfloat16 ("w4a16": not float32), contiguous; T may be 0.
        ids: int32 or int64 [T, K]; outside 0..E-1 (say -1): dropped. Any strides.
        weights: float32 [T, K]. Any strides.
        w_gate_up: of [E, 2F, D], gate rows first, for gated activations; of [E, F, D] for the others.
        w_down: of [E, D, F]; may be of another kind than w_gate_up.
        activation: one of ACTIVATIONS.
        plan: of these ids, where it is at hand; otherwise it is made.

    Returns:
        y [T, D] of x's dtype.

    Raises:
        TypeError, ValueError: before any launch; also where a gradient is required, or the device lacks the dtype
            (see `supported`).

    Source: Shazeer 2017, arXiv 1701.06538, eq. 1; activations per 128 columns: DeepSeek-V3, arXiv 2412.19437, 3.3.2.
    """
    check_choice("activation", activation, ACTIVATIONS)
    check_tensor("x", x, ("T", "D"), FLOATS)
    T, D = x.shape
    check_tensor("ids", ids, (T, "K"), INTEGERS, strided=True)
    check_tensor("weights", weights, tuple(ids.shape), (torch.float32,), strided=True)
    _check_weights(x, w_gate_up, w_down, D, activation)
    check_no_gradient(x=x, weights=weights)
    check_one_device(
        x=x, ids=ids, weights=weights, **{"w_gate_up.values": w_gate_up.values, "w_gate_up.scales": w_gate_up.scales},
        **{"w_down.values": w_down.values, "w_down.scales": w_down.scales},
    )  # fmt: skip
    if plan is None:
        plan = routing_plan(ids, w_gate_up.shape[0])
    check_plan_of(plan, ids, w_gate_up.shape[0])
    return _layer(
        x, weights.contiguous(), w_gate_up.values, w_gate_up.scales, w_down.values, w_down.scales,
        plan.counts, plan.offsets, plan.row2assignment, plan.token2row, plan.tile_offsets, plan.tile2expert,
        plan.block_m, w_gate_up.kind, w_down.kind, activation,
    )  # fmt: skip


def _check_weights(
    x: Tensor, w_gate_up: QuantisedWeights, w_down: QuantisedWeights, D: int, activation: str
) -> None:  # fmt: skip
    m = input_maps(activation)
    check_quantised("w_gate_up", w_gate_up, "E", "2F" if m == 2 else "F", D)
    E, height, _ = w_gate_up.shape
    if height % m:
        raise ValueError(f"w_gate_up has {height} rows an expert; {activation} needs an even number (gate, up)")
    check_quantised("w_down", w_down, E, D, height // m)
    for weights in (w_gate_up, w_down):
        if group_of(weights.kind) and x.dtype == torch.float32:
            raise TypeError(f"x is float32; allowed with {weights.kind}: float16, bfloat16")
