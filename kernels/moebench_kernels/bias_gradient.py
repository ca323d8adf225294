"""Gradient of an expert's bias: the sum of its rows.

    d_bias[e] = sum over offsets[e] <= r < offsets[e + 1] of d_rows[r]

One program sums one expert's rows in their order: no atomics, the same bits every time.

Shapes: d_rows [R, N], d_bias [E, N].
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from moebench_kernels.build import Build, signature
from moebench_kernels.checks import check_launch
from moebench_kernels.runtime import cdiv, jit, next_power_of_2, on_device, tl


def bias_gradient_torch(d_rows: Tensor, offsets: Tensor) -> Tensor:
    """Reference of `bias_gradient`; runs on any device; float64 for float64."""
    wide = torch.promote_types(d_rows.dtype, torch.float32)
    bounds = offsets.tolist()
    sums = [d_rows[start:end].sum(0, dtype=wide) for start, end in pairwise(bounds)]
    return torch.stack(sums)


@dataclass(frozen=True)
class BiasConfig:
    """Rows at a time, and columns of a program."""

    block_r: int
    block_n: int
    num_warps: int = 4


def bias_config(N: int) -> BiasConfig:
    """128 columns (a full memory line of 16-bit values for each half warp), and 4096 values in flight."""
    block_n = min(128, next_power_of_2(N))
    return BiasConfig(block_r=4096 // block_n, block_n=block_n)


@jit
def _bias_gradient_kernel(d_rows_ptr, offsets_ptr, d_bias_ptr, N, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    column_blocks = tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // column_blocks
    col = tl.program_id(0) % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(offsets_ptr + expert + 1)
    total = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for first in range(tl.load(offsets_ptr + expert), end, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        at = d_rows_ptr + row.to(tl.int64)[:, None] * N + col[None, :]
        total += tl.load(at, mask=(row < end)[:, None] & (col < N)[None, :], other=0.0).to(tl.float32)
    tl.store(d_bias_ptr + expert.to(tl.int64) * N + col, tl.sum(total, axis=0), mask=col < N)


@torch.library.custom_op("moebench::bias_gradient", mutates_args=())
def bias_gradient(d_rows: Tensor, offsets: Tensor) -> Tensor:
    """float32 [E, N] from d_rows [R, N] (float32, float16 or bfloat16, contiguous) and the plan's offsets [E + 1].

    Unchecked but for the device; exact zeros for an expert without rows. Not differentiable.
    """
    check_launch(d_rows=d_rows, offsets=offsets)
    E, N = offsets.shape[0] - 1, d_rows.shape[1]
    d_bias = d_rows.new_empty(E, N, dtype=torch.float32)
    c = bias_config(N)
    with on_device(d_rows):
        _bias_gradient_kernel[(E * cdiv(N, c.block_n),)](
            d_rows, offsets, d_bias, N, BLOCK_R=c.block_r, BLOCK_N=c.block_n, num_warps=c.num_warps
        )
    return d_bias


@bias_gradient.register_fake
def _(d_rows: Tensor, offsets: Tensor) -> Tensor:
    return d_rows.new_empty(offsets.shape[0] - 1, d_rows.shape[1], dtype=torch.float32)


def builds() -> list[Build]:
    """The kernel at N = 2048 in each dtype."""
    c = bias_config(2048)
    constants = {"BLOCK_R": c.block_r, "BLOCK_N": c.block_n}
    types = {"offsets_ptr": "*i32", "d_bias_ptr": "*fp32"}
    return [
        Build(
            name=f"bias_gradient {dtype}",
            kernel=_bias_gradient_kernel,
            signature=signature(_bias_gradient_kernel, dtype, constants, **types),
            constants=constants,
            num_warps=c.num_warps,
        )
        for dtype in ("fp32", "fp16", "bf16")
    ]
