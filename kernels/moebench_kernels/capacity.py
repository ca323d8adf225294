"""Capacity: of the assignments of an expert at most C stay, those of highest priority.

Without priorities the first C stay, which the plan's own kernels see to. With them, the plan first groups all
assignments by expert; then one program an expert finds its C-th highest priority, digit by digit, and moves what stays
together, in the order it had:

    bits(p)    a float's bits as an unsigned number of the same order; NaN 0, below -inf; -0 = +0
    threshold  the largest b such that at least C of the expert's assignments have bits >= b (four digits of 8 bits)
    stays      bits > threshold, or bits = threshold and among the first (C - how many are above) of those

Shapes: priority [T, K], by_expert [T*K], all_offsets and offsets [E + 1] (before and after dropping).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebench_kernels.build import Build, signature
from moebench_kernels.runtime import jit, on_device, tl


def within_capacity_torch(ids: Tensor, n_experts: int, capacity: int, priority: Tensor | None = None) -> Tensor:
    """Reference: bool [T, K], which assignments stay; runs on any device."""
    group = ids.flatten().long()
    group = group.masked_fill((group < 0) | (group >= n_experts), n_experts)
    order = torch.arange(len(group), device=ids.device)
    if priority is not None:
        p = priority.flatten() + 0.0  # makes -0 a 0, whatever the device's sort thinks of it
        order = torch.sort(p.masked_fill(p.isnan(), -torch.inf), descending=True, stable=True).indices
        order = order[torch.sort(p.isnan()[order].int(), stable=True).indices]
    order = order[torch.sort(group[order], stable=True).indices]
    counts = torch.bincount(group, minlength=n_experts + 1)
    rank = torch.arange(len(group), device=ids.device) - (counts.cumsum(0) - counts)[group[order]]
    stays = (rank < capacity) & (group[order] < n_experts)
    return torch.empty_like(stays).scatter_(0, order, stays).view(ids.shape)


@dataclass(frozen=True)
class SelectConfig:
    """Rows a program takes at a time: 8 a thread."""

    block_r: int = 2048
    num_warps: int = 8


CONFIG = SelectConfig()


@jit
def _load_bits(priority_ptr, by_expert_ptr, row, last):
    """Assignment and priority bits of each row."""
    assignment = tl.load(by_expert_ptr + row, mask=row < last, other=0)
    bits = tl.load(priority_ptr + assignment, mask=row < last, other=0.0).to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    ordered = tl.where(bits > 0x80000000, 0xFFFFFFFF - bits, magnitude | 0x80000000)
    return assignment, tl.where(magnitude > 0x7F800000, 0, ordered).to(tl.uint32)


@jit
def _select_kernel(
    priority_ptr, by_expert_ptr, all_offsets_ptr, offsets_ptr, row2assignment_ptr, token2row_ptr, capacity,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    begin = tl.load(all_offsets_ptr + expert)
    last = tl.load(all_offsets_ptr + expert + 1)
    inside = tl.arange(0, BLOCK_R)
    bin = tl.arange(0, 256)
    threshold = tl.full([], 0, tl.uint32)
    equals = last - begin  # how many of those at the threshold stay
    if last - begin > capacity:
        equals = tl.zeros([], tl.int32) + capacity
        for digit in tl.static_range(4):
            shift = 24 - 8 * digit
            count = tl.zeros([256], tl.int32)
            for first in range(begin, last, BLOCK_R):
                _, bits = _load_bits(priority_ptr, by_expert_ptr, first + inside, last)
                match = first + inside < last
                if digit > 0:
                    match = match & (bits >> (shift + 8) == threshold >> (shift + 8))
                count += tl.histogram((bits >> shift & 255).to(tl.int32), 256, mask=match)
            above = tl.sum(count) - tl.cumsum(count)
            # None is left to be found when capacity is 0: then the highest digits, which no number has.
            found = tl.minimum(tl.sum((above >= equals).to(tl.int32)), 255)
            equals -= tl.sum(tl.where(bin == found, above, 0))
            threshold = threshold | (found.to(tl.uint32) << shift)
    row_to = tl.load(offsets_ptr + expert)
    for first in range(begin, last, BLOCK_R):
        row = first + inside
        assignment, bits = _load_bits(priority_ptr, by_expert_ptr, row, last)
        equal = ((row < last) & (bits == threshold)).to(tl.int32)
        higher = (row < last) & (bits > threshold)
        stays = higher | ((equal > 0) & (tl.cumsum(equal) <= equals))
        place = row_to + tl.cumsum(stays.to(tl.int32)) - 1
        tl.store(row2assignment_ptr + place, assignment, mask=stays)
        tl.store(token2row_ptr + assignment, tl.where(stays, place, -1), mask=row < last)
        row_to += tl.sum(stays.to(tl.int32))
        equals -= tl.sum(equal)


def launch_select(
    priority: Tensor, by_expert: Tensor, all_offsets: Tensor, offsets: Tensor, row2assignment: Tensor,
    token2row: Tensor, capacity: int,
) -> None:  # fmt: skip
    """Fill row2assignment up to offsets[E], and token2row of every assignment to an expert; unchecked."""
    with on_device(priority):
        _select_kernel[(offsets.numel() - 1,)](
            priority, by_expert, all_offsets, offsets, row2assignment, token2row, capacity,
            BLOCK_R=CONFIG.block_r, num_warps=CONFIG.num_warps,
        )  # fmt: skip


def builds() -> list[Build]:
    """The selection."""
    constants = {"BLOCK_R": CONFIG.block_r}
    types = signature(_select_kernel, "i32", constants, priority_ptr="*fp32")
    return [Build("select", _select_kernel, types, constants, num_warps=CONFIG.num_warps)]
