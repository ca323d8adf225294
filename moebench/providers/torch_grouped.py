"""torch-grouped: sort by expert, then torch.nn.functional.grouped_mm over ragged groups.

Never reads on the host: dropped assignments are sorted behind the last group,
where grouped_mm leaves rows undefined and the combine does not look.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moebench.providers.base import StagedProvider, Stages
from moebench.providers.case import Case
from moebench.providers.layer_parts import activate, reference_gate
from moebench.weights import DTYPES


@dataclass(frozen=True)
class SortPlan:
    """Assignments in expert order.

    Attributes:
        row2assignment: int64 [T*K], flat assignment t*K+k of each row; dropped ones come last.
        assignment2row: int64 [T, K].
        row2expert: int64 [T*K], the expert of each row; E for dropped ones.
        ends: int32 [E], the row behind each expert's last.
        kept: bool [T, K]; None where nothing can be dropped.
    """

    row2assignment: Tensor
    assignment2row: Tensor
    row2expert: Tensor
    ends: Tensor
    kept: Tensor | None


def plan(ids: Tensor, case: Case) -> SortPlan:
    """ids int64 [T, K] -> SortPlan."""
    return sort_plan(ids, case.layer.routed_experts, drops=case.drops)


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
    kept = ids >= 0 if drops else None
    return SortPlan(row2assignment, assignment2row.view_as(ids), expert[row2assignment], ends, kept)


def permute(x: Tensor, plan: SortPlan) -> Tensor:
    """x [T, D] -> rows [T*K, D]."""
    top_k = plan.assignment2row.shape[1]
    rows = x[plan.row2assignment.div(top_k, rounding_mode="floor")]
    if plan.kept is None:
        return rows
    # The gradient of a row behind the last group is undefined as well: this keeps it from x.
    return rows.masked_fill(~plan.kept.flatten()[plan.row2assignment].unsqueeze(1), 0)


def up_projection(
    rows: Tensor, w_gate_up: Tensor, plan: SortPlan, activation: str, bias: Tensor | None = None
) -> Tensor:
    """rows [T*K, D], w_gate_up [E, m*F, D], bias [E, m*F] -> [T*K, F]."""
    return activate(_product(rows, w_gate_up, plan, bias), activation)


def down_projection(hidden: Tensor, w_down: Tensor, plan: SortPlan, bias: Tensor | None = None) -> Tensor:
    """hidden [T*K, F], w_down [E, D, F], bias [E, D] -> [T*K, D]."""
    return _product(hidden, w_down, plan, bias)


def _product(rows: Tensor, stack: Tensor, plan: SortPlan, bias: Tensor | None) -> Tensor:
    out = F.grouped_mm(rows, stack.transpose(1, 2), offs=plan.ends)
    if bias is None:
        return out
    padded = torch.cat([bias, bias.new_zeros(1, bias.shape[1])])  # behind the last group stands expert E
    return out + padded[plan.row2expert]


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


def limits(case: Case) -> str | None:
    """grouped_mm wants rows of a multiple of 16 bytes."""
    size = DTYPES[case.precision].itemsize
    for name, width in (("hidden_size", case.layer.hidden_size), ("expert_ffn_size", case.layer.expert_ffn_size)):
        if width * size % 16:
            return f"grouped_mm needs rows of a multiple of 16 bytes; {name} {width} in {case.precision} is not"
    return None


STAGES = Stages(
    gate=reference_gate,
    plan=plan,
    permute=permute,
    up_projection=up_projection,
    down_projection=down_projection,
    combine=combine,
    row_map=row_map,
    row_experts=lambda plan: plan.row2expert,
)
PROVIDER = StagedProvider("torch-grouped", plan, stages=STAGES, limits=limits, biases=True)
