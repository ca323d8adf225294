"""The check of each stage alone: through the provider's own row map, since layouts differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moebench import oracle
from moebench.answer import CHECK_TOKENS, Answer, Wrong, sample_tokens, tensor_of
from moebench.measure.errors import NO_ERROR, Errors, errors_of
from moebench.providers.base import Case, StagedProvider, State
from moebench.workload import Weights


def _check_gate(provider: StagedProvider, case: Case, weights: Weights, answer: Answer, state: State) -> Errors:
    ids, gates = answer.output
    if tuple(ids.shape) != (case.tokens, case.layer.top_k):
        raise Wrong(f"gate returned ids of shape {list(ids.shape)}, not [T, K] = {[case.tokens, case.layer.top_k]}")
    pick = sample_tokens(answer.wanted_ids).to(ids.device)
    want, want_gates = oracle.gate(case.layer, weights, answer.inputs.x[pick].double())
    order, want_order = ids[pick].long().argsort(1), want.argsort(1)
    if not torch.equal(ids[pick].long().gather(1, order), want.gather(1, want_order)):
        raise Wrong("gate chose other experts than the float64 gate")
    return errors_of(gates[pick].gather(1, order), want_gates.gather(1, want_order))


def _check_plan(provider: StagedProvider, case: Case, weights: Weights, answer: Answer, state: State) -> Errors:
    _check_rows(provider, answer.output, case, answer.inputs.ids)
    return NO_ERROR


def _check_rows(provider: StagedProvider, plan: Any, case: Case, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each kept assignment once, grouped by expert, capacity obeyed; returns (rows, their flat assignments)."""
    assignment = provider.steps.row_map(plan).long()
    rows = (assignment >= 0).nonzero().flatten()
    flat, kept = ids.flatten(), (ids.flatten() >= 0).nonzero().flatten()
    if not torch.equal(assignment[rows].sort().values, kept):
        raise Wrong("the plan does not hold each kept assignment exactly once")
    experts = provider.steps.row_experts(plan).long()[rows]
    if not torch.equal(experts, flat[assignment[rows]]):
        raise Wrong("the plan puts an assignment under another expert")
    if int((experts.diff() != 0).sum()) + 1 > max(1, len(experts.unique())):
        raise Wrong("the plan does not group its rows by expert")
    if case.slots is not None and int(torch.bincount(experts).max()) > case.slots:
        raise Wrong(f"the plan gives an expert more than its capacity of {case.slots}")
    return rows, assignment[rows]


def _check_permute(provider: StagedProvider, case: Case, weights: Weights, answer: Answer, state: State) -> Errors:
    plan = provider.steps.plan(answer.inputs.ids, case)
    rows, assignment = _check_rows(provider, plan, case, answer.inputs.ids)
    token = assignment // case.layer.top_k
    return errors_of(answer.output[rows], answer.inputs.x[token].double())


def _check_up(provider: StagedProvider, case: Case, weights: Weights, answer: Answer, state: State) -> Errors:
    def expected(rows: Tensor, expert: int) -> Tensor:
        return oracle.hidden(case.layer, rows, weights.w_gate_up[expert].double())

    return _check_gemm(provider, case, answer, provider.scope_inputs(state, answer.inputs), expected)


def _check_down(provider: StagedProvider, case: Case, weights: Weights, answer: Answer, state: State) -> Errors:
    def expected(rows: Tensor, expert: int) -> Tensor:
        return rows @ weights.w_down[expert].double().T

    return _check_gemm(provider, case, answer, provider.scope_inputs(state, answer.inputs), expected)


def _check_gemm(
    provider: StagedProvider, case: Case, answer: Answer, given: Any, expected: Callable[[Tensor, int], Tensor]
) -> Errors:
    rows, assignment = _check_rows(provider, given.plan, case, answer.inputs.ids)
    some = torch.linspace(0, len(rows) - 1, min(CHECK_TOKENS, len(rows))).long().to(rows.device)
    rows, experts = rows[some], answer.inputs.ids.flatten()[assignment[some]]
    worst = NO_ERROR
    for expert in experts.unique().tolist():
        mine = rows[experts == expert]
        worst = worst.worst(errors_of(answer.output[mine], expected(given.rows[mine].double(), expert)))
    return worst


def _check_combine(provider: StagedProvider, case: Case, weights: Weights, answer: Answer, state: State) -> Errors:
    given = provider.scope_inputs(state, answer.inputs)
    rows, assignment = _check_rows(provider, given.plan, case, answer.inputs.ids)
    gates = answer.inputs.weights.flatten()[assignment].double().unsqueeze(1)
    expected = torch.zeros(case.tokens, case.layer.hidden_size, dtype=torch.float64, device=gates.device)
    expected.index_add_(0, assignment // case.layer.top_k, gates * given.rows[rows].double())
    y = tensor_of(answer.output, tuple(expected.shape), answer.inputs.x.dtype)
    return errors_of(y, expected)


STAGE_CHECKS: dict[str, Callable[..., Errors]] = {
    "gate": _check_gate,
    "plan": _check_plan,
    "permute": _check_permute,
    "up_projection": _check_up,
    "down_projection": _check_down,
    "combine": _check_combine,
}
