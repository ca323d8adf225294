"""Tile configurations of the grouped GEMMs: frozen data, picked by shape and device by one function.

No autotuner in the hot path. `tuned_tiles.pick_config` asks here, with the tuned file in use on the device, if any.

kind: "rows" (plain), "gather" (rows gathered while loaded), "gated" and "gated_gather" (gate and up in one tile),
"rows_t" and "gather_t" (weights transposed). N is a map's columns (F for a gated kind), K the inner size.
"""

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any, Protocol

import torch

from moebench_kernels.runtime import next_power_of_2

KINDS = ("rows", "gather", "gated", "gated_gather", "rows_t", "gather_t")
FAMILIES = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950", "interpreter")
BLOCK_MS = (16, 32, 64, 128)
SHARED_KB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64, "gfx950": 160, "interpreter": 227}
# The interpreter shows TMA's results too. AMD has no such unit, sm_80 none yet.
TMA_FAMILIES = ("sm_90", "sm_100", "interpreter")


@dataclass(frozen=True)
class GemmConfig:
    """A tile of block_m rows (the plan's) by block_n columns, and how its program runs.

    Attributes:
        block_n: columns of the accumulator; a gated tile holds block_n / 2 of gate and as many of up.
        block_k: of the inner size at a time.
        num_warps, num_stages: Triton's.
        group_m: row tiles of an expert that run beside each other before the next column: L2 reuse of the weights.
        swap: multiply transposed, weights @ rows.T, so that the columns fill the tensor core's 64 rows.
        flatten: one software pipeline over all tiles, so a tile's loads start during the epilogue of the last.
        halves: the epilogue in two halves of the columns: half the registers.
        tma: operands by tensor descriptors, where they are aligned.
        ctas_per_sm: programs for each multiprocessor.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    swap: bool = False
    flatten: bool = True
    halves: bool = False
    tma: bool = False
    ctas_per_sm: int = 1


# Chosen by the compiler's report: no spill in any kind, within the shared memory, and in sm_90's large tiles one WGMMA
# in flight while the next is issued. None of it is measured. Family -> block_m -> tile:
_HOPPER = {
    # Weights fill WGMMA's 64 rows. Loads of weights are the limit: six stages keep 192 KB of them in flight.
    16: GemmConfig(128, 128, 4, 6, swap=True, tma=True),
    32: GemmConfig(128, 128, 4, 5, swap=True, tma=True),
    64: GemmConfig(256, 64, 8, 4, tma=True),
    # The largest accumulator that does not spill; four stages and the epilogue's half tile take 224 of 227 KB.
    128: GemmConfig(256, 64, 8, 4, halves=True, tma=True),
}
SHIPPED = {
    "sm_80": {
        # No flattening: two programs a multiprocessor cover each other's epilogue with fewer registers.
        16: GemmConfig(128, 64, 4, 4, flatten=False, ctas_per_sm=2),
        32: GemmConfig(128, 64, 4, 4, flatten=False, ctas_per_sm=2),
        64: GemmConfig(128, 64, 4, 4, flatten=False, ctas_per_sm=2),
        # 64 sums a thread; with eight warps a second program has no registers, so the pipeline spans tiles.
        128: GemmConfig(128, 64, 8, 4, halves=True),
    },
    "sm_90": _HOPPER,
    "sm_100": {
        # tcgen05 takes 128 rows: the weights fill them.
        16: GemmConfig(128, 128, 4, 5, swap=True, tma=True),
        32: GemmConfig(128, 128, 4, 4, swap=True, tma=True),  # a fifth stage makes gathered rows spill
        64: GemmConfig(128, 128, 4, 4, swap=True, tma=True),
        # The sums lie in tensor memory; read in halves, or the epilogue spills.
        128: GemmConfig(256, 64, 8, 4, halves=True, tma=True),
    },
    "gfx942": {
        # 64 KB of local memory: one tile of each operand, the next one in registers.
        16: GemmConfig(128, 64, 4, 2, flatten=False, ctas_per_sm=2),
        32: GemmConfig(128, 64, 4, 2, flatten=False, halves=True, ctas_per_sm=2),
        64: GemmConfig(128, 64, 4, 2, flatten=False, halves=True, ctas_per_sm=2),
        128: GemmConfig(128, 64, 8, 2, flatten=False, halves=True),
    },
    "gfx950": {
        # 160 KB of local memory: twice the inner block for the small tiles, twice the columns for the large one.
        16: GemmConfig(128, 128, 4, 2, flatten=False, ctas_per_sm=2),
        32: GemmConfig(128, 128, 4, 2, flatten=False, ctas_per_sm=2),
        64: GemmConfig(128, 64, 4, 2, flatten=False, ctas_per_sm=2),
        128: GemmConfig(256, 64, 8, 2, flatten=False, halves=True),
    },
    "interpreter": _HOPPER,  # what tests run is what Hopper runs
}
# float32 is multiplied in IEEE float32, on FMA units: operands and sums live in registers, so tiles are small.
_FP32 = {
    16: GemmConfig(64, 32, 4, 3, flatten=False, ctas_per_sm=2),
    32: GemmConfig(64, 32, 4, 3, flatten=False, ctas_per_sm=2),
    64: GemmConfig(64, 32, 4, 3, flatten=False, ctas_per_sm=2),
    128: GemmConfig(32, 32, 4, 3, flatten=False, ctas_per_sm=2),  # 64 columns spill on sm_100
}


def tile_rows(rows_per_expert: float) -> int:
    """block_m of a plan, by mean load: twice the load, so that most experts are one tile and read their weights once.

    16 (HMMA's least) to 128. Below 128 rows an expert the weights' traffic is the limit (some 180 operations a byte
    on H200), so that the empty rows of a tile cost little.
    """
    # By comparisons: under torch.compile the load may be symbolic, and anything else would fix it to one number.
    return next((m for m in BLOCK_MS if 2 * rows_per_expert <= m), BLOCK_MS[-1])


def gemm_kind(gather: bool, gated: bool, transpose: bool) -> str:
    """The name under which tiles are listed."""
    if gated and transpose:
        raise ValueError("a gated product has no transposed form")
    base = ("gated_gather" if gather else "gated") if gated else ("gather" if gather else "rows")
    return base + "_t" * transpose


def shipped_config(kind: str, block_m: int, N: int, K: int, dtype: torch.dtype, family: str) -> GemmConfig:
    """The frozen tile, never wider than the matrix. N: a map's columns."""
    if block_m not in BLOCK_MS:
        raise ValueError(f"the plan's block_m is {block_m}; the grouped GEMM has tiles for {BLOCK_MS}")
    table = _FP32 if dtype == torch.float32 and family != "interpreter" else SHIPPED[family]
    return _fit(table[block_m], kind, N, K)


def _fit(c: GemmConfig, kind: str, N: int, K: int) -> GemmConfig:
    """No wider than the matrix, but for 16, the least of a product."""
    block_n = min(c.block_n, max(16, next_power_of_2(N)) * (2 if kind.startswith("gated") else 1))
    block_k = min(c.block_k, max(16, next_power_of_2(K)))
    return replace(c, block_n=block_n, block_k=block_k, halves=c.halves and block_n >= 64)


def shared_bytes(c: GemmConfig, block_m: int, itemsize: int, family: str) -> int:
    """Estimate of a tile's shared memory: its stages, and the epilogue's change of layout."""
    stage = (block_m + c.block_n) * c.block_k * itemsize
    epilogue = block_m * c.block_n * itemsize // (2 if c.halves else 1)
    if family.startswith("gfx"):  # one stage is in registers, and the epilogue reuses the stages' memory
        return max(max(1, c.num_stages - 1) * stage, epilogue)
    return c.num_stages * stage + epilogue + 1024


class Tuned(Protocol):
    """What a tuned file answers; see tuned_tiles.py."""

    def nearest(self, kind: str, dtype: torch.dtype, block_m: int, N: int, K: int) -> Any:
        """Its tile for this shape, of the class that its kind has, or None."""


def gemm_config(
    kind: str, block_m: int, N: int, K: int, dtype: torch.dtype, family: str, tuned: Tuned | None = None
) -> GemmConfig:
    """The tile of a grouped GEMM: the tuned file's, if it has this shape or one within a factor of two, else shipped.

    Args:
        kind: see the module.
        block_m: the plan's.
        N, K: columns of a map, inner size.
        family: of the device, one of FAMILIES.
        tuned: from `load_tuned`.
    """
    found = tuned.nearest(kind, dtype, block_m, N, K) if tuned else None
    return _fit(found, kind, N, K) if found else shipped_config(kind, block_m, N, K, dtype, family)


def candidates(kind: str, block_m: int, N: int, K: int, dtype: torch.dtype, family: str) -> list[GemmConfig]:
    """What a tuner may try: the shipped tile first, then others that fit the family's shared memory and registers."""
    first = shipped_config(kind, block_m, N, K, dtype, family)
    tma = family in TMA_FAMILIES and dtype != torch.float32
    amd = family.startswith("gfx")
    found = [first]
    for block_n, block_k, warps, swap, flatten, ctas in product(
        (32, 64, 128, 256), (32, 64, 128), (4, 8), (False, True), (False, True), (1, 2)
    ):
        for stages in (1, 2, 3) if amd else (2, 3, 4, 5, 6):
            c = GemmConfig(
                block_n, block_k, warps, stages, first.group_m, swap, flatten,
                halves=block_m * block_n >= 128 * 128, tma=tma, ctas_per_sm=ctas,
            )  # fmt: skip
            wide = c == _fit(c, kind, N, K) and (not swap or block_m <= 64 <= block_n)
            sums = block_m * block_n / (warps * (64 if amd else 32))
            fits = shared_bytes(c, block_m, dtype.itemsize, family) * ctas <= SHARED_KB[family] * 1024
            if wide and fits and 4 <= sums <= 128 and c != first:
                found.append(c)
    return found


@cache
def device_family(device: torch.device) -> str:
    """Which tiles a device takes; "interpreter" on the CPU. Devices without tiles of their own take their kin's."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "gfx950" if properties.gcnArchName.startswith("gfx95") else "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(properties.major, "sm_80")


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors (compute units) of a device; 4 in the interpreter, so that programs go over several tiles."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
