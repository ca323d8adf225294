"""The check of each stage alone: through the provider's own row map, since layouts differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moebench import expected, oracle
from moebench.answer import CHECK_TOKENS, Answer, Wrong, tensor_of
from moebench.measure.errors import NO_ERROR, Errors, errors_of
from moebench.providers.base import StagedProvider, State
from moebench.providers.case import Case
from moebench.routing.forms import Mix, Ragged
from moebench.weights import Weights


def _check_gate(provider: StagedProvider, case: Case, weights: Weights, answer: Answer, state: State) -> Errors:
    x = answer.inputs.x.double()
    found = expected.routing(case.layer, weights, x, answer.inputs.side)
    if isinstance(found, Mix):
        dispatch, combine = answer.output
        return errors_of(dispatch, found.dispatch).worst(errors_of(combine, found.combine))
    if isinstance(found, Ragged):
        return _check_ragged(answer.output, found)
    ids, gates = answer.output
    if ids.shape != found.ids.shape:
        wanted = [case.tokens, case.layer.top_k]
        raise Wrong(f"gate returned ids of shape {list(ids.shape)}, not [T, K] = {wanted}")
    order, want_order = ids.long().argsort(1), found.ids.argsort(1)
    if not torch.equal(ids.long().gather(1, order), found.ids.gather(1, want_order)):
        raise Wrong("gate chose other experts than the float64 gate")
    return errors_of(gates.gather(1, order), found.weights.gather(1, want_order))


def _check_ragged(output: tuple[Tensor, Tensor, Tensor], found: Ragged) -> Errors:
    """(token, expert, weight) in any order against the float64 gate's."""
    token, expert, weight = output
    kept = expert >= 0
    pair = (token * found.routed_experts + expert)[kept]
    wanted_token, wanted_expert, wanted = found.assignments()
    order, want_order = pair.argsort(), (wanted_token * found.routed_experts + wanted_expert).argsort()
    if not torch.equal(pair[order], (wanted_token * found.routed_experts + wanted_expert)[want_order]):
        raise Wrong("gate chose other assignments than the float64 gate")
    return errors_of(weight[kept][order], wanted[want_order])


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
        return oracle.hidden(case.layer, rows, weights.w_gate_up[expert].double(), weights.expert_biases(expert)[0])

    return _check_gemm(provider, case, answer, provider.scope_inputs(state, answer.inputs), expected)


def _check_down(provider: StagedProvider, case: Case, weights: Weights, answer: Answer, state: State) -> Errors:
    def expected(rows: Tensor, expert: int) -> Tensor:
        out, bias = rows @ weights.w_down[expert].double().T, weights.expert_biases(expert)[1]
        return out if bias is None else out + bias

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
