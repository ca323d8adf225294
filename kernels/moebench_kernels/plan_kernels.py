"""Plan kernels: a stable counting sort of the assignments by expert, in one launch or in three.

Small (at most 1024 assignments, fewer than 1024 experts): one launch, whose programs share nothing. Each row
program counts for its own few assignments the rows before them, over all assignments; one program more makes the maps
of the experts.

Large: assignments are taken in chunks.

    count   blocks [n_chunks, E]  how many assignments of a chunk go to an expert; ids as int32, -1 where dropped
    scan    blocks [n_chunks, E]  the same, summed over the chunks before; what precedes an expert within its group
    rank    row(a) = rows of groups before + of experts before in the group + of chunks before + before a in its chunk

A group is what one program of the scan takes; nobody waits for anybody within a launch, hence no atomics. `blocks`
takes 4E/chunk bytes an assignment: at most 16 while E <= 4096.

Shapes: ids [T, K], n = T*K; `by_expert` [n] is row2assignment before anything is dropped for lack of priority.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moebench_kernels.build import Build, signature
from moebench_kernels.runtime import cdiv, jit, next_power_of_2, on_device, tl

MAX_ASSIGNMENTS = 2**31 - 2048  # exclusive; beyond, the last block's positions would wrap in 32 bits
SMALL = 1024


@dataclass(frozen=True)
class SmallConfig:
    """Assignments a program ranks, against how many it compares them (all there are)."""

    block_a: int = 32
    block_n: int = 1024
    num_warps: int = 4


def small_config(n: int) -> SmallConfig:
    """Two kernels, so that a server compiles little. The larger spills with four warps on triton 3.6."""
    return SmallConfig(block_n=128) if n <= 128 else SmallConfig(num_warps=8)


@dataclass(frozen=True)
class LargeConfig:
    """Tiles of the three launches.

    Attributes:
        chunk: assignments counted together; ranking compares an assignment with half of them on average.
        bins: experts counted at a time.
        block_e: experts of a group, scanned by one program.
        block_b: chunks scanned at a time.
        block_a: assignments a program ranks.
        block_r: assignments it compares them with at a time; with 64 the compiler needs 255 registers.
        rank_warps: of those programs.
    """

    chunk: int
    bins: int
    block_e: int
    block_b: int
    block_a: int = 128
    num_warps: int = 4
    block_r: int = 32
    rank_warps: int = 2


def large_config(n: int, E: int) -> LargeConfig:
    """Short chunks, so that ranking compares little, while `blocks` stays within 16 MB; at most 128 groups."""
    block_e = max(8, next_power_of_2(cdiv(E + 1, 128)))
    return LargeConfig(
        chunk=256 if n <= 2**18 and E <= 1024 else 512 if E <= 1024 else 1024,
        bins=min(1024, next_power_of_2(E)),
        block_e=block_e,
        block_b=max(1, 4096 // block_e),
    )


@jit
def _load_ids(ids_ptr, at, n, E):
    """Expert ids int32, -1 where dropped or past the end. Judged before narrowing, as an int64 id may wrap."""
    ids = tl.load(ids_ptr + at, mask=at < n, other=-1)
    return tl.where((ids >= 0) & (ids < E), ids, -1).to(tl.int32)


@jit
def _small_plan_kernel(
    ids_ptr, counts_ptr, offsets_ptr, all_offsets_ptr, row2assignment_ptr, by_expert_ptr, token2row_ptr,
    tile_offsets_ptr, tile2expert_ptr, n, E, n_tiles, capacity,
    CAPPED: tl.constexpr, BY_PRIORITY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    every = tl.arange(0, BLOCK_N)
    every_id = _load_ids(ids_ptr, every, n, E)
    expert = tl.arange(0, BLOCK_E)
    if tl.program_id(0) == 0:
        count = tl.histogram(every_id, BLOCK_E, mask=every_id >= 0)
        if BY_PRIORITY:
            tl.store(all_offsets_ptr + expert, tl.cumsum(count) - count, mask=expert <= E)
        if CAPPED:
            count = tl.minimum(count, capacity)
        n_kept = tl.sum(count)
        tl.store(counts_ptr + expert, count, mask=expert < E)
        tl.store(offsets_ptr + expert, tl.cumsum(count) - count, mask=expert <= E)
        tl.store(row2assignment_ptr + every, tl.full([BLOCK_N], -1, tl.int32), mask=(every >= n_kept) & (every < n))
        tiles = tl.cdiv(tl.where(expert == E, n - n_kept, count), BLOCK_M)
        n_used, first_tile = tl.sum(tiles), tl.cumsum(tiles) - tiles
        tl.store(tile_offsets_ptr + expert, first_tile, mask=expert <= E)
        tl.store(tile_offsets_ptr + E + 1, n_used)
        for i in range(tl.max(tiles)):
            tl.store(tile2expert_ptr + first_tile + i, expert, mask=i < tiles)
        for first in range(0, n_tiles, BLOCK_N):
            tile = first + every
            past = (tile >= n_used) & (tile < n_tiles)
            tl.store(tile2expert_ptr + tile, tl.full([BLOCK_N], -1, tl.int32), mask=past)
    else:
        at = (tl.program_id(0) - 1) * BLOCK_A + tl.arange(0, BLOCK_A)
        ids = _load_ids(ids_ptr, at, n, E)
        kept = ids >= 0
        if CAPPED and not BY_PRIORITY:
            count = tl.minimum(tl.histogram(every_id, BLOCK_E, mask=every_id >= 0), capacity)
            earlier = (every_id[None, :] == ids[:, None]) & (every[None, :] < at[:, None])
            rank = tl.sum(earlier.to(tl.int32), axis=1)
            kept = kept & (rank < capacity)
            row = rank + tl.sum(tl.where(expert[None, :] < ids[:, None], count[None, :], 0), axis=1)
        else:
            # One number that orders by expert, then by place; at most 2**20 + 2**10.
            order = tl.where(every_id >= 0, every_id * BLOCK_N + every, 2147483647)
            row = tl.sum((order[None, :] < (ids * BLOCK_N + at)[:, None]).to(tl.int32), axis=1)
        tl.store(by_expert_ptr + row, at, mask=kept)
        tl.store(token2row_ptr + at, tl.where(kept, row, -1), mask=at < n)


@jit
def _count_kernel(ids_ptr, experts_ptr, blocks_ptr, n, E, CHUNK: tl.constexpr, BINS: tl.constexpr):
    chunk = tl.program_id(0)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = _load_ids(ids_ptr, at, n, E)
    tl.store(experts_ptr + at, ids, mask=at < n)
    for first in range(0, E, BINS):
        # Masked, as what lies outside the bins counts differently on each backend.
        bin = ids - first
        count = tl.histogram(bin, BINS, mask=(bin >= 0) & (bin < BINS))
        expert = first + tl.arange(0, BINS)
        tl.store(blocks_ptr + chunk.to(tl.int64) * E + expert, count, mask=expert < E)


@jit
def _scan_kernel(
    blocks_ptr, counts_ptr, before_ptr, totals_ptr, n_chunks, E, n_groups, capacity,
    CAPPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """`blocks` in place. before [3, n_groups * BLOCK_E] and totals [3, n_groups]: kept rows, tiles, all rows."""
    group = tl.program_id(0)
    expert = group * BLOCK_E + tl.arange(0, BLOCK_E)
    count = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, n_chunks, BLOCK_B):
        chunk = first + tl.arange(0, BLOCK_B)
        at = blocks_ptr + chunk.to(tl.int64)[:, None] * E + expert[None, :]
        exists = (chunk < n_chunks)[:, None] & (expert < E)[None, :]
        block = tl.load(at, mask=exists, other=0)
        tl.store(at, count[None, :] + tl.cumsum(block, axis=0) - block, mask=exists)
        count += tl.sum(block, axis=0)
    width = n_groups * BLOCK_E
    tl.store(before_ptr + 2 * width + expert, tl.cumsum(count) - count)
    tl.store(totals_ptr + 2 * n_groups + group, tl.sum(count))
    if CAPPED:
        count = tl.minimum(count, capacity)
    tl.store(counts_ptr + expert, count, mask=expert < E)
    tl.store(before_ptr + expert, tl.cumsum(count) - count)
    tl.store(totals_ptr + group, tl.sum(count))
    tiles = tl.cdiv(count, BLOCK_M)
    tl.store(before_ptr + width + expert, tl.cumsum(tiles) - tiles)
    tl.store(totals_ptr + n_groups + group, tl.sum(tiles))


@jit
def _rank_kernel(
    experts_ptr, blocks_ptr, before_ptr, totals_ptr, offsets_ptr, all_offsets_ptr, row2assignment_ptr, by_expert_ptr,
    token2row_ptr, tile_offsets_ptr, tile2expert_ptr, n, E, n_groups, n_tiles, capacity,
    CAPPED: tl.constexpr, BY_PRIORITY: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Program p ranks assignments p*BLOCK_A .. and finishes the same numbers of rows and of tiles, and group p."""
    program = tl.program_id(0)
    width = n_groups * BLOCK_E
    group = tl.arange(0, BLOCK_G)
    group_rows = tl.load(totals_ptr + group, mask=group < n_groups, other=0)
    group_tiles = tl.load(totals_ptr + n_groups + group, mask=group < n_groups, other=0)
    group_all = tl.load(totals_ptr + 2 * n_groups + group, mask=group < n_groups, other=0)
    n_kept, n_filled = tl.sum(group_rows), tl.sum(group_tiles)
    n_used = n_filled + tl.cdiv(n - n_kept, BLOCK_M)

    if program < n_groups:
        expert = program * BLOCK_E + tl.arange(0, BLOCK_E)
        exists, past = expert <= E, group < program
        start = tl.sum(tl.where(past, group_rows, 0)) + tl.load(before_ptr + expert)
        tl.store(offsets_ptr + expert, start, mask=exists)
        first_tile = tl.sum(tl.where(past, group_tiles, 0)) + tl.load(before_ptr + width + expert)
        tl.store(tile_offsets_ptr + expert, first_tile, mask=exists)
        if BY_PRIORITY:
            start = tl.sum(tl.where(past, group_all, 0)) + tl.load(before_ptr + 2 * width + expert)
            tl.store(all_offsets_ptr + expert, start, mask=exists)
    if program == 0:
        tl.store(tile_offsets_ptr + E + 1, n_used)

    at = program * BLOCK_A + tl.arange(0, BLOCK_A)
    ids = tl.load(experts_ptr + at, mask=at < n, other=-1)
    kept = ids >= 0
    # Own assignments lie along the lanes and the earlier ones in registers: sums need no other lane.
    inside = tl.arange(0, BLOCK_R)
    chunk = program * BLOCK_A // CHUNK
    rank = tl.load(blocks_ptr + chunk.to(tl.int64) * E + ids, mask=kept, other=0)
    for first in range(chunk * CHUNK, program * BLOCK_A, BLOCK_R):
        other = tl.load(experts_ptr + first + inside, mask=first + inside < n, other=-1)
        rank += tl.sum((other[:, None] == ids[None, :]).to(tl.int32), axis=0)
    for first in range(program * BLOCK_A, (program + 1) * BLOCK_A, BLOCK_R):
        other = tl.load(experts_ptr + first + inside, mask=first + inside < n, other=-1)
        earlier = (other[:, None] == ids[None, :]) & ((first + inside)[:, None] < at[None, :])
        rank += tl.sum(earlier.to(tl.int32), axis=0)

    its_group = tl.maximum(ids, 0) // BLOCK_E
    if BY_PRIORITY:
        row = tl.gather(tl.cumsum(group_all) - group_all, its_group, 0) + rank
        row += tl.load(before_ptr + 2 * width + ids, mask=kept, other=0)
        placed = kept
    else:
        row = tl.gather(tl.cumsum(group_rows) - group_rows, its_group, 0) + rank
        row += tl.load(before_ptr + ids, mask=kept, other=0)
        placed = kept & (rank < capacity) if CAPPED else kept
    tl.store(by_expert_ptr + row, at, mask=placed)
    tl.store(token2row_ptr + at, tl.where(placed, row, -1), mask=at < n)

    # Whoever is first in a tile names its expert; what an expert keeps fills its first tiles, whichever rows it keeps.
    heads = kept & (rank % BLOCK_M == 0)
    if CAPPED:
        heads = heads & (rank < capacity)
    tile = tl.gather(tl.cumsum(group_tiles) - group_tiles, its_group, 0) + rank // BLOCK_M
    tile += tl.load(before_ptr + width + ids, mask=heads, other=0)
    tl.store(tile2expert_ptr + tile, ids, mask=heads)
    nobodys = (at >= n_kept) & (at < n)
    nothing = tl.full([BLOCK_A], -1, tl.int32)
    tl.store(row2assignment_ptr + at, nothing, mask=nobodys)
    heads = nobodys & ((at - n_kept) % BLOCK_M == 0)
    tl.store(tile2expert_ptr + n_filled + (at - n_kept) // BLOCK_M, nothing + E + 1, mask=heads)
    tl.store(tile2expert_ptr + at, nothing, mask=(at >= n_used) & (at < n_tiles))


@dataclass(frozen=True)
class Outputs:
    """What the launches fill: the Plan's tensors, and two more for a choice by priority (else the same as others)."""

    counts: Tensor
    offsets: Tensor
    row2assignment: Tensor
    token2row: Tensor
    tile_offsets: Tensor
    tile2expert: Tensor
    all_offsets: Tensor
    by_expert: Tensor


def launch_plan(ids: Tensor, out: Outputs, block_m: int, capacity: int | None, by_priority: bool) -> None:
    """Fill `out` for contiguous `ids`, unchecked."""
    # E + 1 groups must stand in a tile of SMALL.
    launch = _launch_small if ids.numel() <= SMALL and out.counts.numel() < SMALL else _launch_large
    with on_device(ids):
        launch(ids, out, block_m, capacity, by_priority)


def _launch_small(ids: Tensor, out: Outputs, block_m: int, capacity: int | None, by_priority: bool) -> None:
    n, E = ids.numel(), out.counts.numel()
    c = small_config(n)
    _small_plan_kernel[(1 + cdiv(n, c.block_a),)](
        ids, out.counts, out.offsets, out.all_offsets, out.row2assignment, out.by_expert, out.token2row,
        out.tile_offsets, out.tile2expert, n, E, out.tile2expert.numel(), capacity or 0,
        CAPPED=capacity is not None, BY_PRIORITY=by_priority, BLOCK_M=block_m, BLOCK_A=c.block_a,
        BLOCK_N=c.block_n, BLOCK_E=next_power_of_2(E + 1), num_warps=c.num_warps,
    )  # fmt: skip


def _launch_large(ids: Tensor, out: Outputs, block_m: int, capacity: int | None, by_priority: bool) -> None:
    n, E, n_tiles = ids.numel(), out.counts.numel(), out.tile2expert.numel()
    c = large_config(n, E)
    n_chunks, n_groups = cdiv(n, c.chunk), cdiv(E + 1, c.block_e)
    experts, blocks, before, totals = (
        torch.empty(size, dtype=torch.int32, device=ids.device)
        for size in (n, n_chunks * E, 3 * n_groups * c.block_e, 3 * n_groups)
    )
    if n:
        _count_kernel[(n_chunks,)](ids, experts, blocks, n, E, CHUNK=c.chunk, BINS=c.bins, num_warps=c.num_warps)
    shared = {"CAPPED": capacity is not None, "BLOCK_M": block_m, "BLOCK_E": c.block_e}
    _scan_kernel[(n_groups,)](
        blocks,
        out.counts,
        before,
        totals,
        n_chunks,
        E,
        n_groups,
        capacity or 0,
        BLOCK_B=c.block_b,
        num_warps=c.num_warps,
        **shared,
    )
    _rank_kernel[(max(cdiv(n, c.block_a), n_groups, cdiv(n_tiles, c.block_a)),)](
        experts, blocks, before, totals, out.offsets, out.all_offsets, out.row2assignment, out.by_expert, out.token2row,
        out.tile_offsets, out.tile2expert, n, E, n_groups, n_tiles, capacity or 0, BY_PRIORITY=by_priority,
        CHUNK=c.chunk, BLOCK_A=c.block_a, BLOCK_R=c.block_r, BLOCK_G=next_power_of_2(n_groups),
        num_warps=c.rank_warps, **shared,
    )  # fmt: skip


MODES = {"": (False, False), " capacity": (True, False), " priority": (True, True)}


def _build(name: str, kernel: Any, constants: dict[str, Any], num_warps: int) -> Build:
    return Build(name, kernel, signature(kernel, "i32", constants, ids_ptr="*i64"), constants, num_warps=num_warps)


def builds() -> list[Build]:
    """Each kernel by mode where modes differ; the small one at three sizes, the others for E = 64, 256 and 4096."""
    found = []
    for n, E in ((1024, 256), (128, 64), (1024, 1023)):
        c = small_config(n)
        tile = {"BLOCK_A": c.block_a, "BLOCK_N": c.block_n, "BLOCK_E": next_power_of_2(E + 1)}
        for mode, (capped, by_priority) in MODES.items():
            flags = {"CAPPED": capped, "BY_PRIORITY": by_priority, "BLOCK_M": 16}
            found.append(_build(f"small plan n{n} E{E}{mode}", _small_plan_kernel, flags | tile, c.num_warps))
    for n, E in ((2**20, 256), (2**15, 64), (2**20, 4096)):
        c, name = large_config(n, E), f"E{E} n{n}"
        found.append(_build(f"count {name}", _count_kernel, {"CHUNK": c.chunk, "BINS": c.bins}, c.num_warps))
        scan = {"CAPPED": True, "BLOCK_M": 128, "BLOCK_B": c.block_b, "BLOCK_E": c.block_e}
        found.append(_build(f"scan {name}", _scan_kernel, scan, c.num_warps))
        tile = {"CHUNK": c.chunk, "BLOCK_A": c.block_a, "BLOCK_R": c.block_r, "BLOCK_E": c.block_e, "BLOCK_M": 128}
        tile["BLOCK_G"] = next_power_of_2(cdiv(E + 1, c.block_e))
        for mode, (capped, by_priority) in MODES.items():
            flags = {"CAPPED": capped, "BY_PRIORITY": by_priority}
            found.append(_build(f"rank {name}{mode}", _rank_kernel, flags | tile, c.rank_warps))
    return found
