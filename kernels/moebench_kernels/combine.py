"""Combine: a token's weighted sum of its experts' answers.

    y[t] = sum over kept k of weights[t, k] * rows[token2row[t, k]]       added in float32, k rising

Backward: d_rows[r] = w[a] * dy[t] and d_weights[a] = <dy[t], rows[r]>, a = row2assignment[r] = t*K + k;
0 for dropped assignments and for rows that belong to no expert.

Shapes: rows [T*K, D], weights [T, K], y [T, D].
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebench_kernels.checks import FLOATS, check_launch, check_tensor
from moebench_kernels.plan import Plan
from moebench_kernels.runtime import cdiv, jit, next_power_of_2, on_device, tl


def combine_torch(rows: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    """Reference of `combine`; runs on any device. In float64 it computes in float64."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    row = plan.token2row.long()
    kept = (row >= 0)[:, :, None]
    picked = torch.where(kept, rows[row.clamp(min=0)].to(wide), 0)
    return (picked * torch.where(kept, weights[:, :, None], 0)).sum(1).to(rows.dtype)


@dataclass(frozen=True)
class CombineConfig:
    """Tokens (or rows, in backward) and columns of a tile."""

    block_t: int
    block_d: int
    num_warps: int = 4


def combine_config(D: int) -> CombineConfig:
    """2048 float32 sums a program: 16 registers a thread."""
    block_d = min(512, next_power_of_2(D))
    return CombineConfig(block_t=2048 // block_d, block_d=block_d)


@jit
def _gather_sum_kernel(
    rows_ptr, weights_ptr, token2row_ptr, y_ptr, T, D,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    column_blocks = tl.cdiv(D, BLOCK_D)
    token = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    col = tl.program_id(0) % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for k in range(TOP_K):
        row = tl.load(token2row_ptr + token * TOP_K + k, mask=token < T, other=-1)
        kept = row >= 0
        value = tl.load(
            rows_ptr + row.to(tl.int64)[:, None] * D + col[None, :], mask=kept[:, None] & (col < D)[None, :], other=0.0
        ).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights_ptr + token * TOP_K + k, mask=kept, other=0.0)[:, None]
        total += value
    exists = (token < T)[:, None] & (col < D)[None, :]
    tl.store(y_ptr + token[:, None] * D + col[None, :], total.to(y_ptr.dtype.element_ty), mask=exists)


@jit
def _combine_backward_kernel(
    dy_ptr, rows_ptr, weights_ptr, row2assignment_ptr, d_rows_ptr, d_weights_ptr, n_rows, D,
    TOP_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    assignment = tl.load(row2assignment_ptr + row, mask=row < n_rows, other=-1)
    kept = assignment >= 0
    token = (assignment // TOP_K).to(tl.int64)
    weight = tl.load(weights_ptr + assignment, mask=kept, other=0.0)
    d_weight = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, D, BLOCK_D):
        col = first + tl.arange(0, BLOCK_D)
        at = row[:, None] * D + col[None, :]
        inside = kept[:, None] & (col < D)[None, :]
        dy = tl.load(dy_ptr + token[:, None] * D + col[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.load(rows_ptr + at, mask=inside, other=0.0).to(tl.float32)
        d_weight += tl.sum(dy * value, axis=1)
        d_row = (weight[:, None] * dy).to(d_rows_ptr.dtype.element_ty)
        tl.store(d_rows_ptr + at, d_row, mask=(row < n_rows)[:, None] & (col < D)[None, :])
    tl.store(d_weights_ptr + assignment, d_weight, mask=kept)


def launch_gather_sum(rows: Tensor, weights: Tensor | None, plan: Plan) -> Tensor:
    """y [T, D] of rows [T*K, D], unchecked; weights None: all one."""
    D = rows.shape[1]
    y = rows.new_empty(plan.n_tokens, D)
    config = combine_config(D)
    if plan.n_tokens:
        with on_device(rows):
            _gather_sum_kernel[(cdiv(plan.n_tokens, config.block_t) * cdiv(D, config.block_d),)](
                rows, weights, plan.token2row, y, plan.n_tokens, D, TOP_K=plan.top_k, WEIGHTED=weights is not None,
                BLOCK_T=config.block_t, BLOCK_D=config.block_d, num_warps=config.num_warps,
            )  # fmt: skip
    return y


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(rows, weights)
        return launch_gather_sum(rows, weights, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weights = ctx.saved_tensors
        plan, D = ctx.plan, rows.shape[1]
        d_rows, d_weights = torch.empty_like(rows), torch.zeros_like(weights)
        config = combine_config(D)
        if plan.n_rows:
            with on_device(rows):
                _combine_backward_kernel[(cdiv(plan.n_rows, config.block_t),)](
                    dy.contiguous(), rows, weights, plan.row2assignment, d_rows, d_weights, plan.n_rows, D,
                    TOP_K=plan.top_k, BLOCK_R=config.block_t, BLOCK_D=config.block_d, num_warps=config.num_warps,
                )  # fmt: skip
        return d_rows, d_weights, None


def combine(rows: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    """Weighted gather-and-sum of the experts' answers. Differentiable in `rows` and `weights`.

    Args:
        rows: [T*K, D], float32, float16 or bfloat16, contiguous, in the plan's order.
        weights: float32 [T, K]; any strides; those of dropped assignments are not read.
        plan: of these T tokens.

    Returns:
        y [T, D] of rows' dtype, summed in float32; zero for a token all of whose assignments were dropped.

    Raises:
        TypeError, ValueError: before any launch.

    Source: Shazeer 2017, arXiv 1701.06538, eq. 1.
    """
    check_tensor("rows", rows, (plan.n_rows, "D"), FLOATS)
    check_tensor("weights", weights, tuple(plan.token2row.shape), (torch.float32,), strided=True)
    check_launch(rows=rows, weights=weights, plan=plan.counts)
    return _Combine.apply(rows, weights.contiguous(), plan)
