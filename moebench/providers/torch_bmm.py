"""torch-bmm: capacity-padded batched GEMM, as GShard (arXiv 2006.16668) dispatches.

Each expert has C slots; C is the capacity, or the largest load when dropless
(which reads one number on the host).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.providers.base import StagedProvider, Stages
from moebench.providers.case import Case
from moebench.providers.layer_parts import activate, reference_gate


@dataclass(frozen=True)
class SlotPlan:
    """Where each assignment sits in the [E, C] slots.

    Attributes:
        slot2assignment: int64 [E*C], flat assignment t*K+k, -1 where the slot is empty.
        assignment2slot: int64 [T, K], E*C where dropped.
        experts, slots: E and C.
    """

    slot2assignment: Tensor
    assignment2slot: Tensor
    experts: int
    slots: int


def plan(ids: Tensor, case: Case) -> SlotPlan:
    """ids int64 [T, K] -> SlotPlan."""
    E = case.layer.routed_experts
    return slot_plan(ids, E, largest_load(ids, E) if case.slots is None else case.slots)


def largest_load(ids: Tensor, experts: int) -> int:
    """Assignments of the busiest expert, at least 1; waits for the device."""
    kept = ids[ids >= 0]
    return max(1, int(torch.bincount(kept, minlength=experts).max()))


def slot_plan(ids: Tensor, experts: int, slots: int) -> SlotPlan:
    """ids int64 [T, K], no expert with more than `slots` of them -> SlotPlan."""
    flat = ids.flatten()
    kept = flat.where(flat >= 0, experts)
    order = torch.argsort(kept, stable=True)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=ids.device).scatter_add(0, kept, torch.ones_like(kept))
    first = counts.cumsum(0) - counts
    position = torch.arange(flat.numel(), device=ids.device) - first[kept[order]]
    slot = torch.where(kept[order] < experts, kept[order] * slots + position, experts * slots)
    empty = torch.full((experts * slots + 1,), -1, dtype=torch.int64, device=ids.device)
    slot2assignment = empty.scatter(0, slot, order)[:-1]
    assignment2slot = torch.empty_like(flat).scatter(0, order, slot)
    return SlotPlan(slot2assignment, assignment2slot.view_as(ids), experts, slots)


def permute(x: Tensor, plan: SlotPlan) -> Tensor:
    """x [T, D] -> rows [E*C, D], zero where a slot is empty."""
    top_k = plan.assignment2slot.shape[1]
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    token = plan.slot2assignment.div(top_k, rounding_mode="floor")  # -1 stays -1: the zero row
    return padded[token]


def up_projection(
    rows: Tensor, w_gate_up: Tensor, plan: SlotPlan, activation: str, bias: Tensor | None = None
) -> Tensor:
    """rows [E*C, D], w_gate_up [E, m*F, D], bias [E, m*F] -> [E*C, F]."""
    return activate(_product(rows, w_gate_up, plan, bias), activation).flatten(0, 1)


def down_projection(hidden: Tensor, w_down: Tensor, plan: SlotPlan, bias: Tensor | None = None) -> Tensor:
    """hidden [E*C, F], w_down [E, D, F], bias [E, D] -> [E*C, D]."""
    return _product(hidden, w_down, plan, bias).flatten(0, 1)


def _product(rows: Tensor, stack: Tensor, plan: SlotPlan, bias: Tensor | None) -> Tensor:
    out = torch.bmm(rows.view(plan.experts, plan.slots, -1), stack.transpose(1, 2))
    return out if bias is None else out + bias.unsqueeze(1)


def combine(rows: Tensor, weights: Tensor, plan: SlotPlan) -> Tensor:
    """rows [E*C, D], weights [T, K] -> y [T, D]."""
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return (padded[plan.assignment2slot] * weights.unsqueeze(-1).to(rows.dtype)).sum(dim=1)


def row_experts(plan: SlotPlan) -> Tensor:
    """The expert of each slot: int64 [E*C]."""
    return torch.arange(plan.experts, device=plan.slot2assignment.device).repeat_interleave(plan.slots)


def rows_executed(case: Case, counts: Tensor) -> float:
    """E*C slots, filled or not."""
    slots = case.slots if case.slots is not None else max(1, int(counts.max()))
    return float(case.layer.routed_experts * slots)


STAGES = Stages(
    gate=reference_gate,
    plan=plan,
    permute=permute,
    up_projection=up_projection,
    down_projection=down_projection,
    combine=combine,
    row_map=lambda plan: plan.slot2assignment,
    row_experts=row_experts,
)
PROVIDER = StagedProvider("torch-bmm", plan, stages=STAGES, flops_executed=rows_executed, biases=True)
