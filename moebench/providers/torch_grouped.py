"""torch-grouped: sort by expert, then torch.nn.functional.grouped_mm over ragged groups.

Never reads on the host: dropped assignments are sorted behind the last group,
where grouped_mm leaves rows undefined and the combine does not look.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moebench.providers.base import Case, StagedProvider, Stages, activate
from moebench.routing import route
from moebench.workload import DTYPES


@dataclass(frozen=True)
class SortPlan:
    """Assignments in expert order.

    Attributes:
        row2assignment: int64 [T*K], flat assignment t*K+k of each row; dropped ones come last.
        assignment2row: int64 [T, K].
        ends: int32 [E], the row behind each expert's last.
        kept: bool [T, K]; None where nothing can be dropped.
    """

    row2assignment: Tensor
    assignment2row: Tensor
    ends: Tensor
    kept: Tensor | None


def plan(ids: Tensor, case: Case) -> SortPlan:
    """ids int64 [T, K] -> SortPlan."""
    return sort_plan(ids, case.layer.routed_experts, drops=case.slots is not None)


def sort_plan(ids: Tensor, experts: int, *, drops: bool) -> SortPlan:
    """ids int64 [T, K] -> SortPlan; `drops` says whether ids may be -1."""
    flat = ids.flatten()
    expert = flat.where(flat >= 0, experts)
    row2assignment = torch.argsort(expert, stable=True)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=ids.device)
    counts = counts.scatter_add(0, expert, torch.ones_like(expert))
    rows = torch.arange(flat.numel(), device=ids.device)
    assignment2row = torch.empty_like(flat).scatter(0, row2assignment, rows)
    ends = counts[:experts].cumsum(0).to(torch.int32)
    return SortPlan(row2assignment, assignment2row.view_as(ids), ends, ids >= 0 if drops else None)


def permute(x: Tensor, plan: SortPlan) -> Tensor:
    """x [T, D] -> rows [T*K, D]."""
    top_k = plan.assignment2row.shape[1]
    rows = x[plan.row2assignment.div(top_k, rounding_mode="floor")]
    if plan.kept is None:
        return rows
    # The gradient of a row behind the last group is undefined as well: this keeps it from x.
    return rows.masked_fill(~plan.kept.flatten()[plan.row2assignment].unsqueeze(1), 0)


def up_projection(rows: Tensor, w_gate_up: Tensor, plan: SortPlan, activation: str) -> Tensor:
    """rows [T*K, D], w_gate_up [E, m*F, D] -> [T*K, F]."""
    return activate(F.grouped_mm(rows, w_gate_up.transpose(1, 2), offs=plan.ends), activation)


def down_projection(hidden: Tensor, w_down: Tensor, plan: SortPlan) -> Tensor:
    """hidden [T*K, F], w_down [E, D, F] -> [T*K, D]."""
    return F.grouped_mm(hidden, w_down.transpose(1, 2), offs=plan.ends)


def combine(rows: Tensor, weights: Tensor, plan: SortPlan) -> Tensor:
    """rows [T*K, D], weights [T, K] -> y [T, D]."""
    picked = rows[plan.assignment2row]
    if plan.kept is not None:
        picked = picked.masked_fill(~plan.kept.unsqueeze(-1), 0)
    return (picked * weights.unsqueeze(-1).to(rows.dtype)).sum(dim=1)


def row_map(plan: SortPlan) -> Tensor:
    """The flat assignment of each row, -1 behind the last group."""
    rows = torch.arange(plan.row2assignment.numel(), device=plan.ends.device)
    return plan.row2assignment.masked_fill(rows >= plan.ends[-1], -1)


def row_experts(plan: SortPlan) -> Tensor:
    """The expert of each row (E behind the last group): int64 [T*K]."""
    rows = torch.arange(plan.row2assignment.numel(), device=plan.ends.device)
    return torch.searchsorted(plan.ends.long(), rows, right=True)


def limits(case: Case) -> str | None:
    """grouped_mm wants rows of a multiple of 16 bytes."""
    size = DTYPES[case.precision].itemsize
    for name, width in (("hidden_size", case.layer.hidden_size), ("expert_ffn_size", case.layer.expert_ffn_size)):
        if width * size % 16:
            return f"grouped_mm needs rows of a multiple of 16 bytes; {name} {width} in {case.precision} is not"
    return None


STAGES = Stages(
    gate=lambda x, router, case: route(case.layer, x @ router.T),
    plan=plan,
    permute=permute,
    up_projection=up_projection,
    down_projection=down_projection,
    combine=combine,
    row_map=row_map,
    row_experts=row_experts,
)
PROVIDER = StagedProvider("torch-grouped", plan, stages=STAGES, limits=limits)
