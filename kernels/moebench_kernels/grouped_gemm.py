"""Grouped GEMM: each expert's matrix on its own rows.

    out[r] = act(rows[r] @ W[e].T)         for offsets[e] <= r < offsets[e + 1]; 0 past offsets[E]

The gradient of W is in ragged_gemm.py.

Rows are not padded: a tile never crosses experts. The host cannot know how many tiles each
expert has without waiting for the device, so the grid is an upper bound (every non-empty group
adds at most one partial tile) and each program finds its expert from the offsets.

Either operand's rows may be gathered from a token-major tensor while they are loaded
(row r reads token row2assignment[r] // K), which spares the permuted copy.

Products are accumulated in float32. float32 inputs are multiplied in IEEE float32, not TF32.

Shapes: rows [R, K], W [E, N, K] ([E, K, N] when transposed), out [R, N]; here N and K are
the matrix's sizes, not top-k.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebench_kernels.activation import GATED, act, up_factor
from moebench_kernels.checks import FLOATS, check_launch, check_same_dtype, check_tensor
from moebench_kernels.dot import dot
from moebench_kernels.plan import Plan
from moebench_kernels.ragged_gemm import launch_ragged_gemm
from moebench_kernels.runtime import cdiv, interpreting, jit, next_power_of_2, on_device, tl


def grouped_gemm_torch(rows: Tensor, weights: Tensor, plan: Plan, *, transpose: bool = False) -> Tensor:
    """Reference of `grouped_gemm`, one expert at a time; runs on any device, float64 included. Reads the offsets."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    bounds = plan.offsets.tolist()
    matrices = weights if transpose else weights.mT
    parts = [rows[bounds[e] : bounds[e + 1]].to(wide) @ matrices[e].to(wide) for e in range(plan.n_experts)]
    tail = rows.new_zeros(plan.n_rows - bounds[-1], matrices.shape[2], dtype=wide)
    return torch.cat([*parts, tail]).to(rows.dtype)


@dataclass(frozen=True)
class GemmConfig:
    """Tile of a grouped GEMM: block_m rows by block_n columns, block_k of the sum at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def gemm_config(rows_per_expert: float, N: int, K: int, dtype: torch.dtype, *, gated: bool = False) -> GemmConfig:
    """The forward and dX tile, by mean load; never wider than the matrix.

    Chosen by the compiler's report (no spill on sm_80 and sm_90, fits their shared memory, WGMMA on
    sm_90 from 64 rows); not measured on a GPU yet. A gated tile keeps two accumulators, so it takes half the
    columns. float32 runs on FMA units (IEEE), where a large tile only costs registers.
    """
    if dtype == torch.float32:
        return _fit(GemmConfig(16 if rows_per_expert <= 16 else 64, 32 if gated else 64, 32, 4, 3), N, K)
    block_n = 64 if gated else 128
    if rows_per_expert <= 16:
        return _fit(GemmConfig(16, block_n, 128, 4, 3), N, K)
    if rows_per_expert <= 64:
        return _fit(GemmConfig(64, block_n, 64, 4, 3), N, K)
    return _fit(GemmConfig(128, block_n, 64, 8, 3), N, K)


def _fit(c: GemmConfig, N: int, K: int) -> GemmConfig:
    return replace(c, block_n=min(c.block_n, _side(N)), block_k=min(c.block_k, _side(K)))


def _side(size: int) -> int:
    return max(16, next_power_of_2(size))  # tl.dot takes no less than 16


@jit
def find_tile(offsets_ptr, tile, n_experts, n_rows, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr):
    """Expert, first row and end of the tile-th tile. Group n_experts are the rows of no expert; past it, no rows."""
    group = tl.arange(0, BLOCK_G)
    start = tl.load(offsets_ptr + group, mask=group <= n_experts, other=n_rows)
    end = tl.load(offsets_ptr + group + 1, mask=group < n_experts, other=n_rows)
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    expert = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    tile_in_group = tile - tl.sum(tl.where(group < expert, tiles, 0), axis=0)
    first = tl.sum(tl.where(group == expert, start, 0), axis=0) + tile_in_group * BLOCK_M
    return expert, first, tl.sum(tl.where(group == expert, end, 0), axis=0)


@jit
def _grouped_gemm_kernel(
    rows_ptr, w_ptr, out_ptr, z_ptr, offsets_ptr, row2assignment_ptr,
    n_rows, N, K, n_experts, stride_e, stride_n, stride_k,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, KIND: tl.constexpr, IS_GATED: tl.constexpr, SAVE_Z: tl.constexpr,
    INTERPRET: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(N, BLOCK_N)
    expert, first, end = find_tile(offsets_ptr, tl.program_id(0) // column_tiles, n_experts, n_rows, BLOCK_M, BLOCK_G)
    row = first.to(tl.int64) + tl.arange(0, BLOCK_M)
    col = (tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    row_ok = row < end
    col_ok = col < N
    source = row
    if GATHER:
        source = (tl.load(row2assignment_ptr + row, mask=row_ok, other=0) // TOP_K).to(tl.int64)
    a_ptrs = rows_ptr + source[:, None] * K + inner[None, :]
    b_ptrs = w_ptr + expert.to(tl.int64) * stride_e + col[None, :] * stride_n + inner[:, None].to(tl.int64) * stride_k
    up_ptrs = b_ptrs + tl.cast(N, tl.int64) * stride_n
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if IS_GATED:
        total_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, tl.where(expert < n_experts, K, 0), BLOCK_K):
        inner_ok = inner < K - k
        a = tl.load(a_ptrs, mask=row_ok[:, None] & inner_ok[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=inner_ok[:, None] & col_ok[None, :], other=0.0)
        total = dot(a, b, total, INTERPRET)
        if IS_GATED:
            up = tl.load(up_ptrs, mask=inner_ok[:, None] & col_ok[None, :], other=0.0)
            total_up = dot(a, up, total_up, INTERPRET)
            up_ptrs += BLOCK_K * stride_k
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * stride_k
    exists = row_ok[:, None] & col_ok[None, :]
    width = N
    if IS_GATED:
        width = 2 * N
    if SAVE_Z:
        at_z = z_ptr + row[:, None] * width + col[None, :]
        tl.store(at_z, total.to(z_ptr.dtype.element_ty), mask=exists)
        if IS_GATED:
            tl.store(at_z + N, total_up.to(z_ptr.dtype.element_ty), mask=exists)
    if KIND != "none":
        total = act(total, KIND)
    if IS_GATED:
        total = total * up_factor(total_up, KIND)
    tl.store(out_ptr + row[:, None] * N + col[None, :], total.to(out_ptr.dtype.element_ty), mask=exists)


def launch_grouped_gemm(
    rows: Tensor,
    weights: Tensor,
    plan: Plan,
    *,
    transpose: bool = False,
    gather: bool = False,
    activation: str | None = None,
    save_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """out [R, N], and the pre-activation z [R, mN] where `save_z`; unchecked. `gather`: rows is token-major [T, K]."""
    gated = activation in GATED
    K = rows.shape[1]
    N = weights.shape[2 if transpose else 1] // (2 if gated else 1)
    stride_e, stride_k, stride_n = weights.stride() if transpose else (weights.stride(i) for i in (0, 2, 1))
    out = rows.new_empty(plan.n_rows, N)
    z = rows.new_empty(plan.n_rows, 2 * N if gated else N) if save_z else None
    if plan.n_rows == 0:
        return out, z
    c = gemm_config(plan.n_rows / plan.n_experts, N, K, rows.dtype, gated=gated)
    row_tiles = plan.n_rows // c.block_m + min(plan.n_experts + 1, plan.n_rows)
    with on_device(rows):
        _grouped_gemm_kernel[(row_tiles * cdiv(N, c.block_n),)](
            rows, weights, out, z, plan.offsets, plan.row2assignment,
            plan.n_rows, N, K, plan.n_experts, stride_e, stride_n, stride_k,
            TOP_K=plan.top_k, GATHER=gather, KIND=GATED.get(activation, activation or "none"), IS_GATED=gated,
            SAVE_Z=save_z, INTERPRET=interpreting(), BLOCK_G=next_power_of_2(plan.n_experts + 1),
            BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
    return out, z


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, plan: Plan, transpose: bool) -> Tensor:
        ctx.plan, ctx.transpose = plan, transpose
        ctx.save_for_backward(rows, weights)
        return launch_grouped_gemm(rows, weights, plan, transpose=transpose)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, weights = ctx.saved_tensors
        d_out, d_rows, d_weights = d_out.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            d_rows, _ = launch_grouped_gemm(d_out, weights, ctx.plan, transpose=not ctx.transpose)
        if ctx.needs_input_grad[1]:
            left, right = (rows, d_out) if ctx.transpose else (d_out, rows)
            d_weights = launch_ragged_gemm(left, right, ctx.plan)
        return d_rows, d_weights, None, None


def grouped_gemm(rows: Tensor, weights: Tensor, plan: Plan, *, transpose: bool = False) -> Tensor:
    """out[r] = rows[r] @ weights[e].T for every row r of expert e. Differentiable in `rows` and `weights`.

    Args:
        rows: [T*K, D_in], float32, float16 or bfloat16, contiguous, in the plan's order. Not read past offsets[E].
        weights: [E, D_out, D_in] of the same dtype; [E, D_in, D_out] when `transpose`.
        plan: of these rows.

    Returns:
        [T*K, D_out] of the same dtype, accumulated in float32; zero past offsets[E].

    Raises:
        TypeError, ValueError: before any launch.

    Source: MegaBlocks, arXiv 2211.15841, section 4 (grouped GEMM over ragged experts).
    """
    check_tensor(
        "weights", weights, (plan.n_experts, "D_in" if transpose else "D_out", "D_out" if transpose else "D_in"), FLOATS
    )
    check_tensor("rows", rows, (plan.n_rows, weights.shape[1 if transpose else 2]), FLOATS)
    check_same_dtype(rows=rows, weights=weights)
    check_launch(rows=rows, weights=weights, plan=plan.counts)
    return _GroupedGemm.apply(rows, weights, plan, transpose)
