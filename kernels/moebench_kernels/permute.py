"""Permute: copy hidden states into rows grouped by expert.

    rows[r] = x[row2token[r]]        0 for rows that belong to no expert

Backward sums what a token's rows received: dx[t] = sum over kept k of d_rows[token2row[t, k]].

Shapes: x [T, D], rows [T*K, D].
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebench_kernels.checks import FLOATS, check_launch, check_tensor
from moebench_kernels.combine import launch_gather_sum
from moebench_kernels.plan import Plan
from moebench_kernels.runtime import cdiv, jit, next_power_of_2, on_device, tl


def permute_torch(x: Tensor, plan: Plan) -> Tensor:
    """Reference of `permute`; runs on any device."""
    token = plan.row2token.long()
    return torch.where((token >= 0)[:, None], x[token.clamp(min=0)], 0)


@dataclass(frozen=True)
class PermuteConfig:
    """Rows and columns a program copies."""

    block_r: int
    block_d: int
    num_warps: int = 4


def permute_config(D: int) -> PermuteConfig:
    """4096 elements a program, as wide as a row allows."""
    block_d = min(1024, next_power_of_2(D))
    return PermuteConfig(block_r=4096 // block_d, block_d=block_d)


@jit
def _permute_kernel(
    x_ptr, row2assignment_ptr, rows_ptr, n_rows, D, TOP_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    column_blocks = tl.cdiv(D, BLOCK_D)
    row = tl.program_id(0) // column_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.program_id(0) % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    assignment = tl.load(row2assignment_ptr + row, mask=row < n_rows, other=-1)
    kept = (assignment >= 0)[:, None] & (col < D)[None, :]
    token = (assignment // TOP_K).to(tl.int64)
    value = tl.load(x_ptr + token[:, None] * D + col[None, :], mask=kept, other=0.0)
    exists = (row < n_rows)[:, None] & (col < D)[None, :]
    tl.store(rows_ptr + row.to(tl.int64)[:, None] * D + col[None, :], value, mask=exists)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        rows = x.new_empty(plan.n_rows, x.shape[1])
        config = permute_config(x.shape[1])
        if plan.n_rows:
            with on_device(x):
                _permute_kernel[(cdiv(plan.n_rows, config.block_r) * cdiv(x.shape[1], config.block_d),)](
                    x, plan.row2assignment, rows, plan.n_rows, x.shape[1], TOP_K=plan.top_k,
                    BLOCK_R=config.block_r, BLOCK_D=config.block_d, num_warps=config.num_warps,
                )  # fmt: skip
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None]:
        return launch_gather_sum(d_rows.contiguous(), None, ctx.plan), None


def permute(x: Tensor, plan: Plan) -> Tensor:
    """Copy hidden states into rows grouped by expert. Differentiable in `x`.

    Args:
        x: [T, D], float32, float16 or bfloat16, contiguous.
        plan: of these T tokens.

    Returns:
        rows [T*K, D] of x's dtype; zero from offsets[E] on.

    Raises:
        TypeError, ValueError: before any launch.

    Source: MegaBlocks, arXiv 2211.15841, section 5.4 (padded gather), here without padding.
    """
    check_tensor("x", x, (plan.n_tokens, "D"), FLOATS)
    check_launch(x=x, plan=plan.counts)
    return _Permute.apply(x, plan)
