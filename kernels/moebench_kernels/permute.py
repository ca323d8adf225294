"""Permute: copy hidden states into rows grouped by expert.

    rows[token2row[t, k]] = x[t]        0 for rows that belong to no expert

Goes by token: each is read once and written to its K rows. To walk the rows in their own order would read it K times,
far apart, and 1 + K rows would move as 2K where x does not stay in L2.

Backward sums what a token's rows received: dx[t] = sum over kept k of d_rows[token2row[t, k]].

Shapes: x [T, D], rows [T*K, D].
"""

from typing import Any

import torch
from torch import Tensor

from moebench_kernels.build import Build, signature
from moebench_kernels.checks import FLOATS, check_launch, check_one_device, check_tensor
from moebench_kernels.combine import (
    DTYPES,
    INT32,
    CopyConfig,
    _gather_sum,
    clear_rows,
    copy_config,
    load_row,
)
from moebench_kernels.plan import Plan, check_plan
from moebench_kernels.runtime import cdiv, jit, on_device, tl


def permute_torch(x: Tensor, plan: Plan) -> Tensor:
    """Reference of `permute`; runs on any device."""
    token = plan.row2token.long()
    return torch.where((token >= 0)[:, None], x[token.clamp(min=0)], 0)


def permute_config(T: int, D: int, K: int, dtype: torch.dtype) -> CopyConfig:
    """Four loads of 16 bytes a thread, each written K times; one where tokens are few."""
    elements = 8192 // dtype.itemsize
    return copy_config(T, D, K, elements, elements // 4, num_warps=4)


@jit
def _permute_kernel(
    x_ptr, token2row_ptr, offsets_ptr, rows_ptr, T, D, E,
    TOP_K: tl.constexpr, UNROLL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    column_blocks = tl.cdiv(D, BLOCK_D)
    begin = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_T
    token = begin + tl.arange(0, BLOCK_T)
    col = tl.program_id(0) % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    n_kept = tl.load(offsets_ptr + E)
    exists = (token < T)[:, None] & (col < D)[None, :]
    value = tl.load(x_ptr + token[:, None] * D + col[None, :], mask=exists)
    for first in range(0, TOP_K, UNROLL):
        for i in tl.static_range(UNROLL):
            row = load_row(token2row_ptr, token, first + i, T, TOP_K)
            kept = (row >= 0)[:, None] & (col < D)[None, :]
            tl.store(rows_ptr + row[:, None] * D + col[None, :], value, mask=kept)
    if (begin + BLOCK_T) * TOP_K > n_kept:
        clear_rows(rows_ptr, n_kept, token, col, T, D, TOP_K, BLOCK_T, BLOCK_D)


@torch.library.custom_op("moebench::permute", mutates_args=())
def _permute(x: Tensor, token2row: Tensor, offsets: Tensor) -> Tensor:
    check_launch(x=x, plan=token2row)
    (T, K), D = token2row.shape, x.shape[1]
    rows = x.new_empty(T * K, D)
    c = permute_config(T, D, K, x.dtype)
    if T:
        with on_device(x):
            _permute_kernel[(cdiv(T, c.block_t) * cdiv(D, c.block_d),)](
                x, token2row, offsets, rows, T, D, offsets.shape[0] - 1, TOP_K=K, UNROLL=c.unroll,
                BLOCK_T=c.block_t, BLOCK_D=c.block_d, num_warps=c.num_warps,
            )  # fmt: skip
    return rows


@_permute.register_fake
def _(x, token2row, offsets):
    return x.new_empty(token2row.shape[0] * token2row.shape[1], x.shape[1])


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None, None]:
    return _gather_sum(d_rows.contiguous(), None, *ctx.saved_tensors), None, None


_permute.register_autograd(_backward, setup_context=_setup)


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
    check_plan(plan)
    check_tensor("x", x, (plan.n_tokens, "D"), FLOATS)
    check_one_device(x=x, plan=plan.counts)
    return _permute(x, plan.token2row, plan.offsets)


def builds() -> list[Build]:
    """At D = 2048 and K = 8, for many tokens and for few."""
    found = []
    for name, dtype in DTYPES.items():
        for T in (2**15, 128):
            c = permute_config(T, 2048, 8, dtype)
            constants = {"TOP_K": 8, "UNROLL": c.unroll, "BLOCK_T": c.block_t, "BLOCK_D": c.block_d}
            types = signature(_permute_kernel, name, constants, **INT32)
            found.append(Build(f"permute {name} T{T}", _permute_kernel, types, constants, num_warps=c.num_warps))
    return found
