"""Combine: a token's weighted sum of its experts' answers.

    y[t] = sum over kept k of weights[t, k] * rows[token2row[t, k]]       added in float32, k rising

Backward: d_rows[r] = w[a] * dy[t] and d_weights[a] = <dy[t], rows[r]>, a = t*K + k, r = token2row[t, k];
0 for dropped assignments and for rows that belong to no expert.

Both go by token, so that dy is read once and not once an expert: 1 + 2K rows move in backward, where a walk over the
rows in their own order would move 3K. Rows are 64-bit offsets apart, and their numbers are read once a program.

Shapes: rows [T*K, D], weights [T, K], y [T, D].
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moebench_kernels.build import Build, signature
from moebench_kernels.checks import FLOATS, check_launch, check_one_device, check_tensor
from moebench_kernels.plan import Plan, check_plan
from moebench_kernels.runtime import cdiv, jit, next_power_of_2, on_device, tl


def combine_torch(rows: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    """Reference of `combine`; runs on any device. In float64 it computes in float64."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    row = plan.token2row.long()
    kept = (row >= 0)[:, :, None]
    picked = torch.where(kept, rows[row.clamp(min=0)].to(wide), 0)
    return (picked * torch.where(kept, weights[:, :, None], 0)).sum(1).to(rows.dtype)


@dataclass(frozen=True)
class CopyConfig:
    """Tokens and columns of a program, and how many of a token's rows it has in flight."""

    block_t: int
    block_d: int
    unroll: int
    num_warps: int


def copy_config(T: int, D: int, K: int, elements: int, few: int, num_warps: int) -> CopyConfig:
    """Tiles of `elements`, or of `few` where that would leave many of a GPU's 132 or so multiprocessors idle."""
    size = few if 512 * elements > T * D else elements
    # As wide as a row allows, unless narrower blocks waste less of the last one.
    widths = [width for width in (2048, 1024, 512, 256) if width <= size]
    block_d = min(widths, key=lambda width: cdiv(D, width) * width)
    block_d = min(block_d, next_power_of_2(D))
    return CopyConfig(size // block_d, block_d, cdiv(K, cdiv(K, 8)), num_warps)


def combine_config(T: int, D: int, K: int, dtype: torch.dtype) -> CopyConfig:
    """Two loads of 16 bytes a thread and row, with 8 rows in flight; one where tokens are few."""
    elements = 4096 // dtype.itemsize
    return copy_config(T, D, K, elements, elements // 2, num_warps=4)


def combine_backward_config(D: int, K: int) -> CopyConfig:
    """One warp: its sums over D need no shared memory and wait for no other warp."""
    return copy_config(0, D, K, 512, 512, num_warps=1)


@jit
def load_row(token2row_ptr, token, k, T, TOP_K: tl.constexpr):
    """Row of assignment (token, k) as int64; -1 where there is none."""
    exists = (token < T) & (k < TOP_K)
    return tl.load(token2row_ptr + token * TOP_K + k, mask=exists, other=-1).to(tl.int64)


@jit
def clear_rows(rows_ptr, n_kept, token, col, T, D, TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Zero those of rows token*K .. token*K + K - 1 that belong to no expert: all from n_kept on."""
    nothing = tl.zeros([BLOCK_T, BLOCK_D], rows_ptr.dtype.element_ty)
    for k in range(TOP_K):
        row = token * TOP_K + k
        lost = ((row >= n_kept) & (token < T))[:, None] & (col < D)[None, :]
        tl.store(rows_ptr + row[:, None] * D + col[None, :], nothing, mask=lost)


@jit
def _gather_sum_kernel(
    rows_ptr, weights_ptr, token2row_ptr, y_ptr, T, D,
    TOP_K: tl.constexpr, UNROLL: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    column_blocks = tl.cdiv(D, BLOCK_D)
    token = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    col = tl.program_id(0) % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for first in range(0, TOP_K, UNROLL):
        for i in tl.static_range(UNROLL):
            row = load_row(token2row_ptr, token, first + i, T, TOP_K)
            kept = (row >= 0)[:, None] & (col < D)[None, :]
            value = tl.load(rows_ptr + row[:, None] * D + col[None, :], mask=kept, other=0.0).to(tl.float32)
            if WEIGHTED:
                value *= tl.load(weights_ptr + token * TOP_K + first + i, mask=row >= 0, other=0.0)[:, None]
            total += value
    exists = (token < T)[:, None] & (col < D)[None, :]
    tl.store(y_ptr + token[:, None] * D + col[None, :], total.to(y_ptr.dtype.element_ty), mask=exists)


@jit
def _combine_backward_kernel(
    dy_ptr, rows_ptr, weights_ptr, token2row_ptr, offsets_ptr, d_rows_ptr, d_weights_ptr, T, D, E,
    TOP_K: tl.constexpr, UNROLL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    n_kept = tl.load(offsets_ptr + E)
    some_lost = (tl.program_id(0).to(tl.int64) + 1) * BLOCK_T * TOP_K > n_kept
    place = tl.arange(0, BLOCK_K)
    d_weight = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for left in range(0, D, BLOCK_D):
        col = left + tl.arange(0, BLOCK_D)
        exists = (token < T)[:, None] & (col < D)[None, :]
        dy = tl.load(dy_ptr + token[:, None] * D + col[None, :], mask=exists, other=0.0).to(tl.float32)
        for first in range(0, TOP_K, UNROLL):
            # Loads first, since none may be moved past a store that might be to the same place.
            for i in tl.static_range(UNROLL):
                row = load_row(token2row_ptr, token, first + i, T, TOP_K)
                kept = (row >= 0)[:, None] & (col < D)[None, :]
                value = tl.load(rows_ptr + row[:, None] * D + col[None, :], mask=kept, other=0.0).to(tl.float32)
                share = tl.where(row >= 0, tl.sum(dy * value, axis=1), 0.0)  # an infinite dy times 0 would be NaN
                d_weight += tl.where(place[None, :] == first + i, share[:, None], 0.0)
            for i in tl.static_range(UNROLL):
                row = load_row(token2row_ptr, token, first + i, T, TOP_K)
                kept = (row >= 0)[:, None] & (col < D)[None, :]
                weight = tl.load(weights_ptr + token * TOP_K + first + i, mask=row >= 0, other=0.0)
                d_row = (weight[:, None] * dy).to(d_rows_ptr.dtype.element_ty)
                tl.store(d_rows_ptr + row[:, None] * D + col[None, :], d_row, mask=kept)
        if some_lost:
            clear_rows(d_rows_ptr, n_kept, token, col, T, D, TOP_K, BLOCK_T, BLOCK_D)
    exists = (token < T)[:, None] & (place < TOP_K)[None, :]
    tl.store(d_weights_ptr + token[:, None] * TOP_K + place[None, :], d_weight, mask=exists)


@torch.library.custom_op("moebench::gather_sum", mutates_args=())
def _gather_sum(rows: Tensor, weights: Tensor | None, token2row: Tensor, offsets: Tensor) -> Tensor:
    """y [T, D]; weights None: all one. `offsets` is for the backward."""
    check_launch(rows=rows, plan=token2row, weights=rows if weights is None else weights)
    (T, K), D = token2row.shape, rows.shape[1]
    y = rows.new_empty(T, D)
    c = combine_config(T, D, K, rows.dtype)
    if T:
        with on_device(rows):
            _gather_sum_kernel[(cdiv(T, c.block_t) * cdiv(D, c.block_d),)](
                rows, weights, token2row, y, T, D, TOP_K=K, UNROLL=c.unroll, WEIGHTED=weights is not None,
                BLOCK_T=c.block_t, BLOCK_D=c.block_d, num_warps=c.num_warps,
            )  # fmt: skip
    return y


@_gather_sum.register_fake
def _(rows, weights, token2row, offsets):
    return rows.new_empty(token2row.shape[0], rows.shape[1])


@torch.library.custom_op("moebench::combine_backward", mutates_args=())
def _combine_backward(
    dy: Tensor, rows: Tensor, weights: Tensor, token2row: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """d_rows and d_weights, each whole."""
    check_launch(dy=dy, rows=rows, weights=weights, plan=token2row)
    (T, K), D = token2row.shape, rows.shape[1]
    d_rows, d_weights = torch.empty_like(rows), torch.empty_like(weights)
    c = combine_backward_config(D, K)
    if T:
        with on_device(rows):
            _combine_backward_kernel[(cdiv(T, c.block_t),)](
                dy, rows, weights, token2row, offsets, d_rows, d_weights, T, D, offsets.shape[0] - 1, TOP_K=K,
                UNROLL=c.unroll, BLOCK_T=c.block_t, BLOCK_D=c.block_d, BLOCK_K=next_power_of_2(K),
                num_warps=c.num_warps,
            )  # fmt: skip
    return d_rows, d_weights


@_combine_backward.register_fake
def _(dy, rows, weights, token2row, offsets):
    return torch.empty_like(rows), torch.empty_like(weights)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, token2row, offsets = inputs
    ctx.save_for_backward(*((token2row, offsets) if weights is None else (token2row, offsets, rows, weights)))


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
    token2row, offsets, *weighted = ctx.saved_tensors
    if not weighted:
        return torch.ops.moebench.permute(dy.contiguous(), token2row, offsets), None, None, None
    d_rows, d_weights = _combine_backward(dy.contiguous(), *weighted, token2row, offsets)
    return d_rows, d_weights, None, None


_gather_sum.register_autograd(_backward, setup_context=_setup)


def launch_gather_sum(rows: Tensor, weights: Tensor | None, plan: Plan) -> Tensor:
    """y [T, D] of rows [T*K, D], shapes unchecked; weights None: all one. Differentiable."""
    return _gather_sum(rows, weights, plan.token2row, plan.offsets)


def combine(rows: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    """Weighted gather-and-sum of the experts' answers. Differentiable in `rows` and `weights`, once.

    Args:
        rows: [T*K, D], float32, float16 or bfloat16, contiguous, in the plan's order; not read from offsets[E] on.
        weights: float32 [T, K]; any strides; those of dropped assignments are not read.
        plan: of these T tokens.

    Returns:
        y [T, D] of rows' dtype, summed in float32, k rising; zero for a token all of whose assignments were dropped.

    Raises:
        TypeError, ValueError: before any launch.

    Source: Shazeer 2017, arXiv 1701.06538, eq. 1.
    """
    check_plan(plan)
    check_tensor("rows", rows, (plan.n_rows, "D"), FLOATS)
    check_tensor("weights", weights, tuple(plan.token2row.shape), (torch.float32,), strided=True)
    check_one_device(rows=rows, weights=weights, plan=plan.counts)
    return _gather_sum(rows, weights.contiguous(), plan.token2row, plan.offsets)


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INT32 = {"token2row_ptr": "*i32", "offsets_ptr": "*i32"}


def builds() -> list[Build]:
    """Both kernels at D = 2048 and K = 8; the sum also without weights, for few tokens and for K = 10."""
    found = []
    for name, dtype in DTYPES.items():
        for T, K, weighted in ((2**15, 8, True), (2**15, 8, False), (128, 8, True), (2**15, 10, True)):
            c = combine_config(T, 2048, K, dtype)
            tile = {"TOP_K": K, "UNROLL": c.unroll, "BLOCK_T": c.block_t, "BLOCK_D": c.block_d, "WEIGHTED": weighted}
            constants = tile if weighted else tile | {"weights_ptr": None}
            types = signature(_gather_sum_kernel, name, constants, weights_ptr="*fp32", **INT32)
            label = f"gather_sum {name} T{T} K{K}{' weighted' * weighted}"
            found.append(Build(label, _gather_sum_kernel, types, constants, num_warps=c.num_warps))
        c = combine_backward_config(2048, 8)
        constants = {
            "TOP_K": 8, "UNROLL": c.unroll, "BLOCK_T": c.block_t, "BLOCK_D": c.block_d, "BLOCK_K": 8
        }  # fmt: skip
        fp32 = {"weights_ptr": "*fp32", "d_weights_ptr": "*fp32"}
        types = signature(_combine_backward_kernel, name, constants, **INT32, **fp32)
        label = f"combine_backward {name}"
        found.append(Build(label, _combine_backward_kernel, types, constants, num_warps=c.num_warps))
    return found
