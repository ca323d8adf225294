"""Tiles of the quantised GEMMs: frozen data, picked by kind, rows of a tile and device family by one function."""

from dataclasses import dataclass, replace

from moebench_kernels.quantise import group_of


@dataclass(frozen=True)
class QuantisedTile:
    """Tile of a quantised GEMM: plan.block_m rows by block_n columns, block_k of the sum at a time.

    Attributes:
        block_k: columns of the sum; "w4a16" takes at most this many, within a group.
        per_sm: programs of the grid for each multiprocessor.
        group_m: row tiles of one expert that go together over its columns.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    per_sm: int = 1
    group_m: int = 8


T = QuantisedTile
# By class of kinds and whether there are two sums; then by the rows of a tile, at most. Chosen by the compiler's
# report (no spill, shared memory, matrix instruction), not measured on a GPU yet. Wide where the sums leave
# registers: a gated tile has two, a blocked one holds a third while it adds, and nibbles become 16-bit integers in
# registers. Few rows read little but weights, so several programs share a multiprocessor to keep more loads in
# flight.
_HOPPER = {
    ("row", False): {16: T(128, 128, 4, 4, 3), 64: T(128, 128, 4, 4, 2), 128: T(256, 128, 8, 4)},
    ("row", True): {16: T(64, 128, 4, 4, 3), 64: T(64, 128, 4, 4, 2), 128: T(128, 128, 8, 4)},
    ("block", False): {16: T(128, 128, 4, 4, 3), 64: T(128, 128, 4, 4, 2), 128: T(128, 128, 8, 4)},
    ("block", True): {16: T(64, 128, 4, 4, 3), 64: T(64, 128, 4, 4, 2), 128: T(64, 128, 8, 4)},
    ("w4a16", False): {16: T(128, 128, 4, 4, 3), 64: T(64, 128, 4, 4, 2), 128: T(128, 128, 8, 4)},
    ("w4a16", True): {16: T(64, 128, 4, 4, 4), 64: T(64, 64, 4, 4, 2), 128: T(64, 64, 8, 4)},
}
# int8 has no unit in tensor memory here: its sums stay in registers.
_BLACKWELL = _HOPPER | {
    ("row", True): _HOPPER["row", True] | {128: T(64, 128, 8, 4)},
    ("int8", False): _HOPPER["row", False] | {128: T(128, 128, 8, 4)},
    ("block", True): _HOPPER["block", True] | {32: T(128, 128, 8, 4)},
}
_PLAIN = {
    ("row", False): {16: T(128, 128, 4, 4, 2), 64: T(64, 128, 4, 3, 2), 128: T(128, 64, 8, 4)},
    ("row", True): {16: T(64, 128, 4, 4, 2), 64: T(64, 128, 4, 3, 2), 128: T(64, 64, 8, 4)},
    ("block", False): {16: T(64, 128, 4, 3, 2), 64: T(64, 128, 4, 3, 2), 128: T(64, 128, 8, 3)},
    ("block", True): {16: T(64, 128, 4, 3, 2), 64: T(64, 128, 4, 3, 2), 128: T(64, 128, 8, 3)},
    ("w4a16", False): {16: T(64, 128, 4, 4, 2), 64: T(64, 64, 4, 3, 2), 128: T(64, 64, 8, 3)},
    ("w4a16", True): {16: T(64, 128, 4, 4, 2), 32: T(64, 64, 4, 4, 2), 64: T(64, 64, 4, 3, 2), 128: T(64, 64, 8, 3)},
}


def quantised_tile(kind: str, block_m: int, gated: bool, family: str) -> QuantisedTile:
    """The tile for a plan's block_m on a device family ("sm_90", "gfx942", "interpreter", ..)."""
    table = {"sm_90": _HOPPER, "interpreter": _HOPPER, "sm_100": _BLACKWELL}.get(family, _PLAIN)
    name = "w4a16" if group_of(kind) else {"fp8:128": "block", "fp8:row": "row"}.get(kind, kind)
    name = name if (name, gated) in table else "row"
    tiles = table[name, gated]
    tile = tiles[min(rows for rows in tiles if rows >= min(block_m, 128))]
    # AMD's 64 KiB of shared memory (gfx942) hold two stages.
    return replace(tile, num_stages=2) if family.startswith("gfx") else tile
