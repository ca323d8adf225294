"""Ragged-K grouped GEMM: each expert's weight gradient, summed over its own rows.

    dW[e] = sum over r of e  left[r] outer right[r]        offsets[e] <= r < offsets[e + 1]

Shapes: left [R, N], right [R, K], dW [E, N, K]; here N and K are the matrix's sizes, not top-k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebench_kernels.dot import dot
from moebench_kernels.plan import Plan
from moebench_kernels.runtime import cdiv, interpreting, jit, next_power_of_2, on_device, tl


@dataclass(frozen=True)
class RaggedConfig:
    """Tile of dW[e]: block_m by block_n of it, block_k rows of the sum at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def ragged_config(N: int, K: int, dtype: torch.dtype) -> RaggedConfig:
    """The dW tile, never wider than the matrix."""
    m, n, k, warps, stages = (64, 64, 32, 4, 3) if dtype == torch.float32 else (128, 128, 64, 8, 3)
    return RaggedConfig(min(m, _side(N)), min(n, _side(K)), k, warps, stages)


def _side(size: int) -> int:
    return max(16, next_power_of_2(size))  # tl.dot takes no less than 16


@jit
def _ragged_gemm_kernel(
    left_ptr, right_ptr, dw_ptr, offsets_ptr, row2assignment_ptr, N, K,
    TOP_K: tl.constexpr, GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dW[e] [N, K] = left[rows of e].T @ right[rows of e]; an expert without rows gets exact zeros."""
    row_tiles = tl.cdiv(N, BLOCK_M)
    column_tiles = tl.cdiv(K, BLOCK_N)
    expert = tl.program_id(0) // (row_tiles * column_tiles)
    tile = tl.program_id(0) % (row_tiles * column_tiles)
    n = (tile // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    k = (tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(start, end, BLOCK_K):
        row = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
        row_ok = row < end
        left_row = row
        right_row = row
        if GATHER_LEFT or GATHER_RIGHT:
            token = (tl.load(row2assignment_ptr + row, mask=row_ok, other=0) // TOP_K).to(tl.int64)
            if GATHER_LEFT:
                left_row = token
            if GATHER_RIGHT:
                right_row = token
        left = tl.load(
            left_ptr + left_row[:, None] * N + n[None, :], mask=row_ok[:, None] & (n < N)[None, :], other=0.0
        )
        right = tl.load(
            right_ptr + right_row[:, None] * K + k[None, :], mask=row_ok[:, None] & (k < K)[None, :], other=0.0
        )
        total = dot(tl.trans(left), right, total, INTERPRET)
    at = expert.to(tl.int64) * N * K + n[:, None] * K + k[None, :]
    tl.store(dw_ptr + at, total.to(dw_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


def launch_ragged_gemm(
    left: Tensor, right: Tensor, plan: Plan, *, gather_left: bool = False, gather_right: bool = False
) -> Tensor:
    """dW [E, N, K] from left [R, N] and right [R, K] (token-major [T, ...] where gathered); unchecked."""
    N, K = left.shape[1], right.shape[1]
    dw = right.new_empty(plan.n_experts, N, K)
    c = ragged_config(N, K, right.dtype)
    with on_device(right):
        _ragged_gemm_kernel[(plan.n_experts * cdiv(N, c.block_m) * cdiv(K, c.block_n),)](
            left, right, dw, plan.offsets, plan.row2assignment, N, K,
            TOP_K=plan.top_k, GATHER_LEFT=gather_left, GATHER_RIGHT=gather_right, INTERPRET=interpreting(),
            BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
    return dw
