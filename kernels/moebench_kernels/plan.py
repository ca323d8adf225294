"""Plan: group the T*K assignments by expert.

An assignment is a pair (t, k), numbered a = t*K + k; it is kept when
0 <= ids[t, k] < E. Rows are the kept assignments sorted by expert and, within
an expert, by a (so by token): a stable counting sort, with the same answer every time.

    count   blocks [B, E]   how many of each block of assignments go to each expert
    scan    starts [B, E]   the same, summed over the blocks before; counts [E]
    rank    row(a) = offsets[e] + starts[block, e] + how many before a in its block go to e

No atomics and no host synchronisation. There are always R = T*K rows; those from
offsets[E] on belong to no expert.

Shapes: ids [T, K], counts [E], offsets [E + 1], row2assignment [T*K], token2row [T, K].
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moebench_kernels.checks import INTEGERS, check_launch, check_tensor
from moebench_kernels.runtime import cdiv, jit, on_device, tl
from moebench_kernels.tiles import tile_rows


class Plan(NamedTuple):
    """Where each assignment goes. All tensors on one device.

    The tile map cuts each expert's rows into tiles of block_m, none across two experts; the rows that belong to
    no expert come last, as group E. Its length is an upper bound, since the device alone knows the counts.

    Attributes:
        counts: int32 [E], rows of each expert.
        offsets: int32 [E + 1]; the rows of expert e are offsets[e] .. offsets[e + 1] - 1.
        row2assignment: int32 [T*K], the flat assignment t*K + k of each row; -1 from offsets[E] on.
        token2row: int32 [T, K], the row of assignment (t, k); -1 where dropped.
        tile_offsets: int32 [E + 2]; the row tiles of group e are tile_offsets[e] .. tile_offsets[e + 1] - 1.
        tile2expert: int32 [n_row_tiles], the group of each row tile; -1 from tile_offsets[E + 1] on.
        block_m: rows of a tile.
    """

    counts: Tensor
    offsets: Tensor
    row2assignment: Tensor
    token2row: Tensor
    tile_offsets: Tensor
    tile2expert: Tensor
    block_m: int

    @property
    def n_experts(self) -> int:
        """E."""
        return self.counts.shape[0]

    @property
    def n_tokens(self) -> int:
        """T."""
        return self.token2row.shape[0]

    @property
    def top_k(self) -> int:
        """K."""
        return self.token2row.shape[1]

    @property
    def n_rows(self) -> int:
        """R = T*K, kept or not (how many are kept is known to the device only)."""
        return self.row2assignment.shape[0]

    @property
    def n_row_tiles(self) -> int:
        """Upper bound of the row tiles."""
        return self.tile2expert.shape[0]

    @property
    def row2token(self) -> Tensor:
        """int32 [T*K], the token of each row; -1 from offsets[E] on."""
        return torch.div(self.row2assignment, self.top_k, rounding_mode="floor")

    @property
    def row2expert(self) -> Tensor:
        """int32 [T*K], the expert of each row; -1 from offsets[E] on."""
        row = torch.arange(self.n_rows, dtype=torch.int32, device=self.offsets.device)
        expert = torch.searchsorted(self.offsets[1:], row, right=True, out_int32=True)
        return expert.masked_fill(self.row2assignment < 0, -1)


def routing_plan_torch(ids: Tensor, n_experts: int) -> Plan:
    """Reference of `routing_plan`; runs on any device."""
    _check_n_experts(n_experts)
    flat = ids.flatten().long()
    dropped = (flat < 0) | (flat >= n_experts)
    group = flat.masked_fill(dropped, n_experts)
    order = torch.sort(group, stable=True).indices
    counts = torch.bincount(group, minlength=n_experts + 1)[:n_experts].int()
    row = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=ids.device))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)])
    block_m = tile_rows(len(flat) / n_experts)
    tile_offsets, tile2expert = tile_map_torch(offsets, len(flat), block_m)
    return Plan(
        counts=counts,
        offsets=offsets,
        row2assignment=order.masked_fill(dropped[order], -1).int(),
        token2row=row.masked_fill(dropped, -1).int().view(ids.shape),
        tile_offsets=tile_offsets,
        tile2expert=tile2expert,
        block_m=block_m,
    )


def tile_map_torch(offsets: Tensor, n_rows: int, block_m: int) -> tuple[Tensor, Tensor]:
    """Reference of the tile map: offsets [E + 1] -> tile_offsets [E + 2], tile2expert [n_row_tiles]."""
    ends = torch.cat([offsets, offsets.new_full((1,), n_rows)])
    tiles = (ends.diff() + block_m - 1) // block_m
    tile_offsets = torch.cat([offsets.new_zeros(1), tiles.cumsum(0, dtype=torch.int32)])
    bound = n_rows // block_m + min(len(offsets), n_rows)
    tile = torch.arange(bound, dtype=torch.int32, device=offsets.device)
    group = torch.searchsorted(tile_offsets[1:], tile, right=True, out_int32=True)
    return tile_offsets, group.masked_fill(tile >= tile_offsets[-1], -1)


@dataclass(frozen=True)
class PlanConfig:
    """Tiles of the plan kernels.

    Attributes:
        block_a: assignments a program takes; ranking compares all pairs of them.
        block_e: experts compared at a time.
        block_b: blocks of assignments scanned at a time.
    """

    block_a: int = 128
    block_e: int = 32
    block_b: int = 64
    num_warps: int = 4


CONFIG = PlanConfig()


@jit
def _load_ids(ids_ptr, at, n, E):
    """Expert ids int32, -1 where dropped or past the end. Judged before narrowing, as an int64 id may wrap."""
    ids = tl.load(ids_ptr + at, mask=at < n, other=-1)
    return tl.where((ids >= 0) & (ids < E), ids, -1).to(tl.int32)


@jit
def _count_kernel(ids_ptr, blocks_ptr, n, E, BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr):
    block = tl.program_id(0)
    ids = _load_ids(ids_ptr, block * BLOCK_A + tl.arange(0, BLOCK_A), n, E)
    for first in range(0, E, BLOCK_E):
        expert = first + tl.arange(0, BLOCK_E)
        count = tl.sum((ids[:, None] == expert[None, :]).to(tl.int32), axis=0)
        tl.store(blocks_ptr + block.to(tl.int64) * E + expert, count, mask=expert < E)


@jit
def _scan_kernel(blocks_ptr, counts_ptr, n_blocks, E, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr):
    """In place: each block's count becomes the sum over the blocks before it."""
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    before = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, n_blocks, BLOCK_B):
        block = first + tl.arange(0, BLOCK_B)
        at = blocks_ptr + block.to(tl.int64)[:, None] * E + expert[None, :]
        exists = (block < n_blocks)[:, None] & (expert < E)[None, :]
        count = tl.load(at, mask=exists, other=0)
        tl.store(at, before[None, :] + tl.cumsum(count, axis=0) - count, mask=exists)
        before += tl.sum(count, axis=0)
    tl.store(counts_ptr + expert, before, mask=expert < E)


@jit
def _rank_kernel(
    ids_ptr, offsets_ptr, blocks_ptr, row2assignment_ptr, token2row_ptr, n, E, BLOCK_A: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0)
    inside = tl.arange(0, BLOCK_A)
    at = block * BLOCK_A + inside
    ids = _load_ids(ids_ptr, at, n, E)
    kept = ids >= 0
    earlier = (ids[:, None] == ids[None, :]) & (inside[None, :] < inside[:, None])
    rank = tl.sum(earlier.to(tl.int32), axis=1)
    start = tl.load(offsets_ptr + ids, mask=kept, other=0)
    start += tl.load(blocks_ptr + block.to(tl.int64) * E + ids, mask=kept, other=0)
    row = start + rank
    tl.store(row2assignment_ptr + row, at, mask=kept)
    tl.store(token2row_ptr + at, tl.where(kept, row, -1), mask=at < n)


def routing_plan(ids: Tensor, n_experts: int) -> Plan:
    """Group assignments by expert, stably, without atomics and without asking the host.

    Args:
        ids: int32 or int64 [T, K]; -1, and any id outside 0..E-1, is a dropped assignment. T may be 0; T*K < 2**31.
            Any strides.
        n_experts: E >= 1.

    Returns:
        The `Plan`; equal to `routing_plan_torch` bit for bit.

    Raises:
        TypeError, ValueError: before any launch.

    Source: counting sort as in Knuth, TAOCP vol. 3, 5.2 algorithm D, over blocks.
    """
    _check_n_experts(n_experts)
    check_tensor("ids", ids, ("T", "K"), INTEGERS, strided=True)
    check_launch(ids=ids)
    ids, n = ids.contiguous(), ids.numel()
    if n >= 2**31 - CONFIG.block_a:
        raise ValueError(f"ids has {n} assignments; fewer than 2**31 - {CONFIG.block_a} are supported")
    n_blocks = cdiv(n, CONFIG.block_a)
    integers = {"dtype": torch.int32, "device": ids.device}
    counts = torch.zeros(n_experts, **integers)
    offsets = torch.zeros(n_experts + 1, **integers)
    row2assignment, token2row = torch.full((n,), -1, **integers), torch.empty(ids.shape, **integers)
    block_m = tile_rows(n / n_experts)
    if n == 0:
        return Plan(counts, offsets, row2assignment, token2row, *tile_map_torch(offsets, n, block_m), block_m)
    blocks = torch.empty(n_blocks, n_experts, **integers)
    c = CONFIG
    with on_device(ids):
        _count_kernel[(n_blocks,)](
            ids, blocks, n, n_experts, BLOCK_A=c.block_a, BLOCK_E=c.block_e, num_warps=c.num_warps
        )
        _scan_kernel[(cdiv(n_experts, c.block_e),)](
            blocks, counts, n_blocks, n_experts, BLOCK_B=c.block_b, BLOCK_E=c.block_e, num_warps=c.num_warps
        )
        torch.cumsum(counts, 0, dtype=torch.int32, out=offsets[1:])
        _rank_kernel[(n_blocks,)](
            ids, offsets, blocks, row2assignment, token2row, n, n_experts,
            BLOCK_A=c.block_a, num_warps=c.num_warps,
        )  # fmt: skip
    return Plan(counts, offsets, row2assignment, token2row, *tile_map_torch(offsets, n, block_m), block_m)


def _check_n_experts(n_experts: int) -> None:
    if n_experts < 1:
        raise ValueError(f"n_experts is {n_experts}; it must be at least 1")
