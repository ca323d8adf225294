"""Tiles of the weight gradient (ragged_gemm): frozen data, picked by shape and device family by one function.

kind: "dw" (both operands in the plan's order), "dw_gather_left", "dw_gather_right", "dw_gather_both".
M, N: rows and columns of a dW.
"""

from dataclasses import dataclass, replace
from itertools import product

import torch

from moebench_kernels.runtime import next_power_of_2
from moebench_kernels.tiles import SHARED_KB, Tuned

RAGGED_KINDS = ("dw", "dw_gather_left", "dw_gather_right", "dw_gather_both")


@dataclass(frozen=True)
class RaggedConfig:
    """Tile of a dW: block_m by block_n of it, block_r rows of the sum at a time.

    Attributes:
        per_unit: programs on each multiprocessor, as many as its registers and shared memory hold.
        group_m: row tiles walked together, so that a strip of `right` is read once for all of them.
    """

    block_m: int
    block_n: int
    block_r: int
    num_warps: int
    num_stages: int
    per_unit: int = 1
    group_m: int = 8


# Chosen by the compiler's report (no spill, fits the shared memory, every load asynchronous); not measured on a GPU.
# The wide side is block_n; it is mirrored where `right` is gathered, so that the wide side comes by TMA or by rows.
TILES = {
    "sm_80": RaggedConfig(128, 128, 64, 8, 4),  # 96 KB; 128 x 256 leaves no register free
    "sm_90": RaggedConfig(128, 256, 64, 8, 4),  # 192 KB: L2 feeds WGMMA best with the largest tile that does not spill
    "sm_100": RaggedConfig(128, 256, 64, 8, 4),  # sums in tensor memory, 192 KB of operands
    "gfx942": RaggedConfig(128, 128, 64, 8, 2),  # 32 of 64 KB; its registers fill a unit
    "gfx950": RaggedConfig(128, 256, 64, 8, 3),  # 96 of 160 KB
    "interpreter": RaggedConfig(64, 128, 32, 4, 1),  # small enough for tests to cross tiles in every direction
}
FP32 = RaggedConfig(64, 64, 16, 4, 3, per_unit=2)  # FMA units: 32 rows at a time spill


def ragged_kind(gather_left: bool, gather_right: bool) -> str:
    """The name under which tiles are listed."""
    return RAGGED_KINDS[gather_left + 2 * gather_right]


def ragged_config(
    kind: str, M: int, N: int, dtype: torch.dtype, family: str, *, load: int = 128, tuned: Tuned | None = None
) -> RaggedConfig:
    """The tile of a dW [E, M, N], never wider than the matrix: the tuned file's where it has one, else shipped.

    Args:
        kind: one of RAGGED_KINDS.
        family: of the device.
        load: the mean rows of an expert as `tile_rows` rounds them, by which tuned files tell loads apart.
        tuned: from `load_tuned`.
    """
    c = tuned.nearest(kind, dtype, load, N, M) if tuned else None
    if c is None:
        c = FP32 if dtype == torch.float32 and family != "interpreter" else TILES[family]
        if kind in ("dw_gather_right", "dw_gather_both"):
            c = replace(c, block_m=c.block_n, block_n=c.block_m)
    return _fit(c, M, N)


def _fit(c: RaggedConfig, M: int, N: int) -> RaggedConfig:
    block_m, block_n = min(c.block_m, _side(M)), min(c.block_n, _side(N))
    return replace(c, block_m=block_m, block_n=block_n, num_warps=c.num_warps if block_m * block_n > 8192 else 4)


def _side(size: int) -> int:
    return max(16, next_power_of_2(size))  # tl.dot takes no less than 16


def ragged_shared_bytes(c: RaggedConfig, itemsize: int, family: str) -> int:
    """Estimate of a tile's shared memory: the stages of both operands; on AMD one of them is in registers."""
    stages = max(1, c.num_stages - 1) if family.startswith("gfx") else c.num_stages
    return stages * (c.block_m + c.block_n) * c.block_r * itemsize


def ragged_candidates(kind: str, M: int, N: int, dtype: torch.dtype, family: str) -> list[RaggedConfig]:
    """What a tuner may try: the shipped tile first, then others that fit the family's shared memory and registers."""
    first = ragged_config(kind, M, N, dtype, family)
    found, lanes = [first], 64 if family.startswith("gfx") else 32
    sides = (64, 128, 256)
    for block_m, block_n, block_r, warps, stages, units in product(
        sides, sides, (16, 32, 64, 128), (4, 8), (2, 3, 4, 5), (1, 2)
    ):
        c = RaggedConfig(block_m, block_n, block_r, warps, stages, units, first.group_m)
        sums = block_m * block_n / (warps * lanes)
        fits = ragged_shared_bytes(c, dtype.itemsize, family) * units <= SHARED_KB[family] * 1024
        if c == _fit(c, M, N) and fits and 16 <= sums * units <= 128 and c != first:
            found.append(c)
    return found
