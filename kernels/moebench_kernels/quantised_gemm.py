"""Grouped GEMM on quantised weights: each expert's matrix on its own rows, scales applied in float32.

    fp8:row, int8   out[r, n] = act( a_scale[r] * w_scale[e, n] * sum_k a[r, k] w[e, n, k] )
    fp8:128         out[r, n] = act( sum_b a_scale[r, b] * w_scale[e, n/128, b] * sum_{k in b} a[r, k] w[e, n, k] )
    w4a16:G         out[r, n] = act( sum_g w_scale[e, n, g] * sum_{k in g} x[r, k] (nibble[e, n, k] - 8) )

Shapes: rows [R, K] (or [T, K] gathered), W [E, mN, K] with m = 2 for gated activations (gate rows first), out [R, N].
"""

from typing import Any

import torch
from torch import Tensor

from moebench_kernels.activation import ACTIVATIONS, GATED, activate_torch, input_maps
from moebench_kernels.build import TARGETS, Build, signature
from moebench_kernels.checks import (
    FLOATS,
    check_choice,
    check_launch,
    check_no_gradient,
    check_one_device,
    check_tensor,
)
from moebench_kernels.descriptors import operand
from moebench_kernels.grouped_gemm import grouped_gemm_torch
from moebench_kernels.permute import permute_torch
from moebench_kernels.plan import Plan, check_plan
from moebench_kernels.quantise import (
    BLOCK,
    FP8,
    FP8_TARGETS,
    QuantisedWeights,
    check_quantised,
    check_supported,
    dequantise_weights,
    group_of,
)
from moebench_kernels.quantised_kernels import _eight_bit_kernel, _four_bit_kernel
from moebench_kernels.quantised_tiles import QuantisedTile, quantised_tile
from moebench_kernels.runtime import cdiv, interpreting, on_device
from moebench_kernels.tiles import TMA_FAMILIES, device_family, processors


def quantised_gemm_torch(
    rows: Tensor,
    row_scales: Tensor | None,
    weights: QuantisedWeights,
    plan: Plan,
    *,
    activation: str | None = None,
    gather: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Reference of `quantised_gemm`: the dequantised operands multiplied in float64; runs on any device."""
    x = rows.double()
    if row_scales is not None:
        scales = row_scales.double()
        x *= scales[:, None] if scales.ndim == 1 else scales.repeat_interleave(BLOCK, 1)[:, : x.shape[1]]
    x = permute_torch(x, plan) if gather else x
    z = grouped_gemm_torch(x, dequantise_weights(weights, torch.float64), plan)
    return (activate_torch(z, activation) if activation else z).to(dtype)


def _constants(kind: str, tile: QuantisedTile, block_m: int, N: int, activation: str, gather: bool) -> dict[str, Any]:
    """The constexpr arguments that launch and audit share."""
    gated, group = activation in GATED, group_of(kind)
    shared = {
        "GATHER": gather, "KIND": GATED.get(activation, activation), "IS_GATED": gated,
        "BLOCK_M": block_m, "BLOCK_N": tile.block_n, "GROUP_M": tile.group_m,
    }  # fmt: skip
    if group:
        # Bytes at a time: within a group, so a power of two that divides half of it.
        return shared | {"GROUP": group, "BLOCK_B": min(tile.block_k // 2, group // 2 & -(group // 2))}
    return shared | {
        "INTEGER": kind == "int8", "BLOCKED": kind == "fp8:128", "SWAP": block_m <= 32, "BLOCK_K": tile.block_k,
        # Whether each tile of gate columns and of up columns lies within one block of 128.
        "UNIFORM": not gated or N % tile.block_n == 0,
    }  # fmt: skip


@torch.library.custom_op("moebench::quantised_gemm", mutates_args=())
def _quantised_gemm(
    rows: Tensor, row_scales: Tensor | None, values: Tensor, scales: Tensor, kind: str,
    offsets: Tensor, tile_offsets: Tensor, tile2expert: Tensor, row2assignment: Tensor,
    block_m: int, top_k: int, activation: str, gather: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    given = {"rows": rows, "weights": values, "weights' scales": scales, "plan": offsets}
    check_launch(**given, **({} if row_scales is None else {"row_scales": row_scales}))
    check_supported(kind, rows.device)
    out = _empty_out(
        rows, row_scales, values, scales, kind, offsets, tile_offsets, tile2expert, row2assignment, block_m, top_k,
        activation, gather, dtype,
    )  # fmt: skip
    n_rows, N = out.shape
    if n_rows == 0:
        return out
    K, n_experts, family = rows.shape[1], len(values), device_family(rows.device)
    tile = quantised_tile(kind, block_m, activation in GATED, family)
    c = _constants(kind, tile, block_m, N, activation, gather)
    columns = c["BLOCK_B"] if group_of(kind) else c["BLOCK_K"]
    whole = not group_of(kind) or K % group_of(kind) == 0  # a descriptor cannot stop at the end of a partial group
    tma, width = family in TMA_FAMILIES, values.shape[2]
    left, c["ROWS_TMA"] = operand(rows, [n_rows, K], [block_m, columns], tma and not gather and whole)
    right, c["W_TMA"] = operand(values, [values.numel() // width, width], [tile.block_n, columns], tma)
    programs = min(tile.per_sm * processors(rows.device), len(tile2expert) * cdiv(N, tile.block_n))
    plan = (offsets, tile_offsets, tile2expert, row2assignment, n_rows, N, K, n_experts)
    c |= {"TOP_K": top_k, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
    with on_device(rows):
        if group_of(kind):
            c |= {"WIDE": rows.dtype == torch.bfloat16, "INTERPRET": interpreting()}
            _four_bit_kernel[(programs,)](left, right, scales, out, *plan, *scales.stride(), **c)
        else:
            _eight_bit_kernel[(programs,)](left, row_scales, right, scales, out, *plan, **c)
    return out


@_quantised_gemm.register_fake
def _empty_out(
    rows: Tensor, row_scales: Tensor | None, values: Tensor, scales: Tensor, kind: str,
    offsets: Tensor, tile_offsets: Tensor, tile2expert: Tensor, row2assignment: Tensor,
    block_m: int, top_k: int, activation: str, gather: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return rows.new_empty(row2assignment.shape[0], values.shape[1] // input_maps(activation), dtype=dtype)


def quantised_gemm(
    rows: Tensor,
    row_scales: Tensor | None,
    weights: QuantisedWeights,
    plan: Plan,
    *,
    activation: str | None = None,
    gather: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """out[r] = act(W[e] rows[r]) for every row r of expert e, with quantised weights. Forward only.

    Args:
        rows: [T*K, D_in] in the plan's order, or [T, D_in] where `gather`; contiguous, from `quantise_rows`. Plain
            float16 or bfloat16 for "w4a16".
        row_scales: as `quantise_rows` gave them; None for "w4a16".
        weights: of [E, m D_out, D_in]; m = 2 for gated activations (gate rows first), else 1. int8: D_in <= 133143.
        plan: of these rows.
        activation: one of ACTIVATIONS, or None.
        gather: `rows` is token-major and is gathered while it is loaded.
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        [T*K, D_out]; scaled and activated in float32, rounded once; zero past offsets[E].

    Raises:
        TypeError, ValueError: before any launch; also where the device has no fp8 (see `supported`).

    Source: scales inside the sum for 128-blocks: DeepSeek-V3, arXiv 2412.19437, section 3.3.2.
    """
    if activation is not None:
        check_choice("activation", activation, ACTIVATIONS)
    if dtype not in FLOATS:
        raise TypeError(f"dtype is {dtype}; allowed: float32, float16, bfloat16")
    check_plan(plan)
    _check_operands(rows, row_scales, weights, plan.n_tokens if gather else plan.n_rows)
    check_no_gradient(rows=rows)
    check_quantised("weights", weights, plan.n_experts, "mN", rows.shape[1])
    if weights.shape[1] % input_maps(activation or "none"):
        raise ValueError(f"weights has {weights.shape[1]} rows an expert; {activation} needs an even number (gate, up)")
    check_one_device(rows=rows, row_scales=row_scales, weights=weights.values, scales=weights.scales, plan=plan.counts)
    return _quantised_gemm(
        rows, row_scales, weights.values, weights.scales, weights.kind,
        plan.offsets, plan.tile_offsets, plan.tile2expert, plan.row2assignment,
        plan.block_m, plan.top_k, activation or "none", gather, dtype,
    )  # fmt: skip


def _check_operands(rows: Tensor, row_scales: Tensor | None, weights: QuantisedWeights, n_rows: int) -> None:
    """Raise unless rows and their scales are of the weights' kind."""
    if not isinstance(weights, QuantisedWeights):
        raise TypeError(f"weights is a {type(weights).__name__}; QuantisedWeights are needed (see quantise_weights)")
    if group_of(weights.kind):
        check_tensor("rows", rows, (n_rows, "D_in"), (torch.float16, torch.bfloat16))
        if row_scales is not None:
            raise ValueError(f"row_scales must be None for {weights.kind}, whose activations are not quantised")
        return
    check_tensor("rows", rows, (n_rows, "D_in"), (torch.int8 if weights.kind == "int8" else FP8,))
    K = rows.shape[1]
    if weights.kind == "int8" and K * 127 * 127 >= 2**31:
        raise ValueError(f"rows has {K} columns; int8 sums 133143 at most in int32")
    shape = (n_rows, cdiv(K, BLOCK)) if weights.kind == "fp8:128" else (n_rows,)
    check_tensor("row_scales", row_scales, shape, (torch.float32,))


def builds() -> list[Build]:
    """Both kernels for D = 2048 and F = 1024, in each tile: up with gather and SwiGLU, and down."""
    found = []
    for target in TARGETS:
        for gated in (True, False):
            for block_m in (16, 32, 64, 128):
                if target in FP8_TARGETS:
                    found += [_build(kind, "bf16", target, gated, block_m) for kind in ("fp8:row", "fp8:128")]
                found += [_build(kind, "bf16", target, gated, block_m) for kind in ("int8", "w4a16:128")]
                if gated:
                    found.append(_build("w4a16:128", "fp16", target, gated, block_m))
        found.append(_build("w4a16:32", "bf16", target, True, 16))
        if target in FP8_TARGETS:  # F is no multiple of the tile: a scale for each column
            found.append(_build("fp8:128", "bf16", target, True, 128, F=1056))
    return found


def _build(kind: str, dtype: str, target: str, gated: bool, block_m: int, F: int = 1024) -> Build:
    """What the operator would launch on a target with aligned operands."""
    tile, tma, four = quantised_tile(kind, block_m, gated, target), target in TMA_FAMILIES, bool(group_of(kind))
    constants = _constants(kind, tile, block_m, F if gated else 2048, "swiglu" if gated else "none", gated)
    constants |= {"TOP_K": 8, "ROWS_TMA": tma and not gated, "W_TMA": tma}
    if four:
        # The scales of neighbouring rows lie side by side.
        constants |= {"WIDE": dtype == "bf16", "INTERPRET": False, "stride_n": 1}
    row, weight = (dtype, "u8") if four else ("i8", "i8") if kind == "int8" else ("fp8e4nv", "fp8e4nv")
    columns = constants["BLOCK_B" if four else "BLOCK_K"]
    types = dict.fromkeys(("offsets_ptr", "tile_offsets_ptr", "tile2expert_ptr", "row2assignment_ptr"), "*i32")
    types |= {
        "rows": f"tensordesc<{row}[{block_m}, {columns}]>" if constants["ROWS_TMA"] else f"*{row}",
        "w": f"tensordesc<{weight}[{tile.block_n}, {columns}]>" if tma else f"*{weight}",
        "row_scales_ptr": "*fp32", "w_scales_ptr": "*bf16" if four else "*fp32",
    }  # fmt: skip
    kernel = _four_bit_kernel if four else _eight_bit_kernel
    return Build(
        f"quantised_gemm {kind} {dtype} {'swiglu' if gated else 'plain'} m{block_m} F{F} {target}",
        kernel,
        signature(kernel, dtype, constants, **types),
        constants,
        targets=(target,),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        # int8 has no unit in tensor memory.
        expect=("mma" if kind == "int8" else "tcgen05", "wgmma", "mma", "mfma", "tma"),
    )
