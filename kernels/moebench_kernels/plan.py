"""Plan: group the T*K assignments by expert.

An assignment is a pair (t, k), numbered a = t*K + k; it is kept when 0 <= ids[t, k] < E and, where experts have a
capacity C, when it is among the C of its expert that come first or, given priorities, that have the highest. Rows are
the kept assignments sorted by expert and, within an expert, by a (so by token): a stable counting sort, with the same
answer every time.

    row(a) = offsets[e] + how many kept assignments of e come before a
    row tiles of e: ceil(counts[e] / block_m), the first at tile_offsets[e]

No sort, no atomics and no host synchronisation. There are always R = T*K rows; those from offsets[E] on belong to no
expert. The kernels are in plan_kernels.py and capacity.py.

Shapes: ids [T, K], counts [E], offsets [E + 1], row2assignment [T*K], token2row [T, K], tile_offsets [E + 2].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moebench_kernels.capacity import launch_select, within_capacity_torch
from moebench_kernels.checks import INTEGERS, check_int, check_launch, check_one_device, check_tensor
from moebench_kernels.plan_kernels import MAX_ASSIGNMENTS, Outputs, launch_plan
from moebench_kernels.tiles import tile_rows

MAX_EXPERTS = 2**20


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
        block_m: rows of a tile; by the mean load, or by the capacity where that is less.
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


def check_plan(plan: object) -> None:
    """Raise TypeError unless it is a Plan."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan is a {type(plan).__name__}; a Plan is needed (see routing_plan)")


def check_plan_of(plan: object, ids: Tensor, n_experts: int) -> None:
    """Raise unless it is a Plan that may be of these ids; whether it is, only the device knows."""
    check_plan(plan)
    assert isinstance(plan, Plan)
    check_tensor("ids", ids, ("T", "K"), INTEGERS, strided=True)
    check_one_device(plan=plan.counts, ids=ids)
    if plan.token2row.shape != ids.shape or plan.n_experts != n_experts:
        raise ValueError(
            f"the plan is of ids {list(plan.token2row.shape)} and {plan.n_experts} experts; "
            f"ids has shape {list(ids.shape)}, and there are {n_experts} experts"
        )


def routing_plan_torch(
    ids: Tensor, n_experts: int, *, capacity: int | None = None, priority: Tensor | None = None
) -> Plan:
    """Reference of `routing_plan`; runs on any device."""
    _check_options(ids, n_experts, capacity, priority)
    if capacity is not None:
        ids = ids.masked_fill(~within_capacity_torch(ids, n_experts, capacity, priority), -1)
    flat = ids.flatten().long()
    dropped = (flat < 0) | (flat >= n_experts)
    group = flat.masked_fill(dropped, n_experts)
    order = torch.sort(group, stable=True).indices
    counts = torch.bincount(group, minlength=n_experts + 1)[:n_experts].int()
    row = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=ids.device))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)])
    block_m = _block_m(len(flat), n_experts, capacity)
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
    bound = _row_tile_bound(n_rows, len(offsets) - 1, block_m)
    tile = torch.arange(bound, dtype=torch.int32, device=offsets.device)
    group = torch.searchsorted(tile_offsets[1:], tile, right=True, out_int32=True)
    return tile_offsets, group.masked_fill(tile >= tile_offsets[-1], -1)


def _row_tile_bound(n_rows: int, n_experts: int, block_m: int) -> int:
    """Each group, that of no expert included, wastes less than a tile."""
    return n_rows // block_m + min(n_experts + 1, n_rows)


def _block_m(n_rows: int, n_experts: int, capacity: int | None) -> int:
    load = n_rows / n_experts
    return tile_rows(load if capacity is None else min(load, capacity))


def _empty_plan(ids: Tensor, n_experts: int, block_m: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The Plan's tensors, not filled in."""
    n = ids.numel()
    sizes = (n_experts, n_experts + 1, n, tuple(ids.shape), n_experts + 2, _row_tile_bound(n, n_experts, block_m))
    counts, offsets, row2assignment, token2row, tile_offsets, tile2expert = (
        torch.empty(size, dtype=torch.int32, device=ids.device) for size in sizes
    )
    return counts, offsets, row2assignment, token2row, tile_offsets, tile2expert


@torch.library.custom_op("moebench::routing_plan", mutates_args=())
def _routing_plan(
    ids: Tensor, n_experts: int, block_m: int, capacity: int | None, priority: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_launch(ids=ids, **({} if priority is None else {"priority": priority}))
    plan = _empty_plan(ids, n_experts, block_m)
    _counts, offsets, row2assignment, token2row, _, _ = plan
    if capacity is None or priority is None:
        launch_plan(ids.contiguous(), Outputs(*plan, offsets, row2assignment), block_m, capacity, False)
        return plan
    all_offsets, by_expert = torch.empty_like(offsets), torch.empty_like(row2assignment)
    launch_plan(ids.contiguous(), Outputs(*plan, all_offsets, by_expert), block_m, capacity, True)
    launch_select(priority.contiguous(), by_expert, all_offsets, offsets, row2assignment, token2row, capacity)
    return plan


@_routing_plan.register_fake
def _(ids, n_experts, block_m, capacity, priority):
    return _empty_plan(ids, n_experts, block_m)


def routing_plan(ids: Tensor, n_experts: int, *, capacity: int | None = None, priority: Tensor | None = None) -> Plan:
    """Group assignments by expert, stably, without atomics and without asking the host.

    Args:
        ids: int32 or int64 [T, K]; -1, and any id outside 0..E-1, is a dropped assignment. T may be 0;
            T*K < 2**31 - 2048. Any strides. An expert may stand twice in a row.
        n_experts: E, 1 to 2**20.
        capacity: C >= 0, the most assignments an expert keeps; None: all.
        priority: float32 [T, K], any strides: those of highest priority stay, of equals the first; NaN is lowest.
            None: the first C stay, in the order t*K + k. The rows of an expert are in that order either way.

    Returns:
        The `Plan`; equal to `routing_plan_torch` bit for bit.

    Raises:
        TypeError, ValueError: before any launch.

    Source: counting sort as in Knuth, TAOCP vol. 3, 5.2 algorithm D, over blocks; capacity as in Switch Transformer,
    arXiv 2101.03961, section 2.2; priorities as in batch prioritised routing, Riquelme 2021, arXiv 2106.05974.
    """
    check_tensor("ids", ids, ("T", "K"), INTEGERS, strided=True)
    _check_options(ids, n_experts, capacity, priority)
    n = ids.numel()
    if n >= MAX_ASSIGNMENTS:
        raise ValueError(f"ids has {n} assignments; fewer than {MAX_ASSIGNMENTS} (2**31 - 2048) are supported")
    block_m = _block_m(n, n_experts, capacity)
    if capacity is not None and capacity >= n:
        capacity = None  # drops nothing
    return Plan(*_routing_plan(ids, n_experts, block_m, capacity, priority), block_m)


def _check_options(ids: Tensor, n_experts: int, capacity: int | None, priority: Tensor | None) -> None:
    check_int("n_experts", n_experts)
    if not 1 <= n_experts <= MAX_EXPERTS:
        raise ValueError(f"n_experts is {n_experts}; it must be between 1 and {MAX_EXPERTS}")
    if capacity is None and priority is not None:
        raise ValueError("priority is given without a capacity; it decides which assignments a full expert drops")
    if capacity is not None:
        check_int("capacity", capacity, needed="an int or None")
        if capacity < 0:
            raise ValueError(f"capacity is {capacity}; it must be at least 0")
    if priority is not None:
        check_tensor("priority", priority, tuple(ids.shape), (torch.float32,), strided=True)
        check_one_device(ids=ids, priority=priority)
