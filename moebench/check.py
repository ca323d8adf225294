"""Check: is an arm's answer right? Against the float64 oracle, on inputs it has not seen.

Before the call that counts, the arm has run on other values in the same buffers
and its output has been overwritten with NaN: a cached or unwritten output
cannot pass. Changed inputs are an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moebench import oracle
from moebench.measure.errors import BACKWARD_FACTOR, NO_ERROR, Errors, errors_of, tolerance, verdict
from moebench.point import STAGES
from moebench.providers import torch_loop
from moebench.providers.base import Case, StagedProvider, State
from moebench.workload import Inputs, Weights

CHECK_TOKENS = 256
CHECK_EXPERTS = 4


class Wrong(Exception):
    """The answer is wrong in a way that no error norm expresses."""


@dataclass(frozen=True)
class Answer:
    """What the arm said on the check's inputs.

    Attributes:
        inputs: those of the check, as the variant sees them (capacity applied).
        wanted_ids, wanted_weights: [T, K] of the dropless routing.
        output: whatever `run` returned.
        grads: gradients by name ("x", "weights", "w_gate_up", ...); empty for forward.
    """

    inputs: Inputs
    wanted_ids: Tensor
    wanted_weights: Tensor
    output: Any
    grads: dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """Outcome of a check; `wrong` is None when it passed."""

    rel_error: float | None
    max_error: float | None
    fidelity_error: float | None
    wrong: str | None


def judge(provider: Any, state: State, case: Case, weights: Weights, answer: Answer) -> Verdict:
    """Compare an answer with the oracle's, by scope."""
    try:
        if case.scope in STAGES:
            parts = [(_STAGE_CHECKS[case.scope](provider, case, weights, answer, state), 1.0)]
            fidelity = None
        else:
            parts, fidelity = _check_whole(provider, case, weights, answer)
    except Wrong as why:
        return Verdict(None, None, None, str(why))
    worst = scaled = NO_ERROR
    for errors, factor in parts:
        worst, scaled = worst.worst(errors), scaled.worst(errors.scaled(factor))
    wrong = verdict(scaled, tolerance(case.precision, eager_errors(case, weights, answer.inputs)))
    return Verdict(_finite(worst.rel), _finite(worst.max), None if fidelity is None else _finite(fidelity.rel), wrong)


def sample_tokens(ids: Tensor, limit: int = CHECK_TOKENS) -> Tensor:
    """Up to `limit` token indices, sorted: first one token for each active expert, then evenly spread ones."""
    tokens = ids.shape[0]
    if tokens <= limit:
        return torch.arange(tokens)
    flat = ids.cpu().flatten()
    owner = torch.full((int(flat.max()) + 2,), -1, dtype=torch.int64)
    owner.scatter_(0, flat.where(flat >= 0, len(owner) - 1), torch.arange(flat.numel()) // ids.shape[1])
    hits = owner[:-1][owner[:-1] >= 0].unique()[:limit]
    spread = torch.linspace(0, tokens - 1, limit).long()
    fill = spread[~torch.isin(spread, hits)][: limit - len(hits)]
    picked: Tensor = torch.cat([hits, fill]).unique()
    return picked


def eager_errors(case: Case, weights: Weights, inputs: Inputs) -> Errors:
    """Error of eager PyTorch in the case's precision, on up to 64 tokens: what the precision itself costs."""
    pick = sample_tokens(inputs.ids, 64).to(inputs.x.device)
    x, ids, gates = inputs.x[pick], inputs.ids[pick], inputs.weights[pick]
    with torch.no_grad():
        y = torch_loop.experts(
            x, ids, gates, weights.w_gate_up, weights.w_down, activation=case.layer.activation, slots=None
        )
        return errors_of(y, oracle.experts(case.layer, weights, x.double(), ids, gates.double()))


def reference(case: Case, weights: Weights, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
    """The oracle's y for given tokens: x float64 [n, D], ids [n, K] (-1 dropped), gates float64 [n, K]."""
    y = oracle.experts(case.layer, weights, x, ids, gates)
    return y + oracle.shared(case.layer, weights, x) if case.scope == "layer" else y


def _gates(case: Case, weights: Weights, x: Tensor, inputs_ids: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """ids and gates of the tokens: given ones for `experts`, the oracle's own gate for `layer`."""
    if case.scope != "layer":
        return inputs_ids, given.double()
    ids, gates = oracle.gate(case.layer, weights, x)
    kept = torch.zeros(x.shape[0], case.layer.routed_experts + 1, dtype=torch.bool, device=x.device)
    kept.scatter_(1, inputs_ids.where(inputs_ids >= 0, case.layer.routed_experts), True)
    return ids.where(kept[:, :-1].gather(1, ids), -1), gates


def _check_whole(
    provider: Any, case: Case, weights: Weights, answer: Answer
) -> tuple[list[tuple[Errors, float]], Errors | None]:
    inputs = answer.inputs
    y = _tensor(answer.output, (case.tokens, case.layer.hidden_size), inputs.x.dtype)
    pick = sample_tokens(answer.wanted_ids).to(y.device)
    x = inputs.x[pick].detach().double()
    ids, given = inputs.ids[pick], inputs.weights[pick].detach()
    wanted, wanted_given = answer.wanted_ids[pick], answer.wanted_weights[pick]
    if provider.name == "dense-ffn":  # the yardstick's own oracle: the first K experts, weight 1, no routing
        ids = wanted = torch.arange(case.layer.top_k, device=y.device).expand(len(pick), -1)
        given = wanted_given = torch.ones(ids.shape, device=y.device)
        case = replace(case, direction="forward")
        expected = oracle.experts(case.layer, weights, x, ids, given.double())
        expected = expected + oracle.shared(case.layer, weights, x) if case.scope == "layer" else expected
        return [(errors_of(y[pick], expected), 1.0)], None
    chosen, gates = _gates(case, weights, x, ids, given)
    expected = reference(case, weights, x, chosen, gates)
    all_chosen, all_gates = _gates(case, weights, x, wanted, wanted_given)
    dropless = expected if torch.equal(chosen, all_chosen) else reference(case, weights, x, all_chosen, all_gates)
    parts = [(errors_of(y[pick], expected), 1.0)]
    if case.direction == "forward_backward":
        parts += [(errors, BACKWARD_FACTOR) for errors in _check_gradients(case, weights, answer, pick)]
    return parts, errors_of(y[pick], dropless)


def _check_gradients(case: Case, weights: Weights, answer: Answer, pick: Tensor) -> list[Errors]:
    """dX and d(weights) on the picked tokens, dW whole for a few experts, idle experts exactly zero."""
    inputs, grads = answer.inputs, answer.grads
    assert inputs.upstream is not None
    x = inputs.x[pick].detach().double().requires_grad_()
    given = inputs.weights[pick].detach().double().requires_grad_()
    ids, gates = _gates(case, weights, x, inputs.ids[pick], given)
    y = reference(case, weights, x, ids, gates if case.scope == "layer" else given)
    y.backward(inputs.upstream[pick].double())
    found = [errors_of(_grad(grads, "x")[pick], _present(x))]
    if case.scope == "experts":
        kept = inputs.ids[pick] >= 0  # what a dropped assignment's weight would earn is nobody's business
        found.append(errors_of(_grad(grads, "weights")[pick] * kept, _present(given) * kept))
    return found + _check_expert_gradients(case, weights, answer)


def _check_expert_gradients(case: Case, weights: Weights, answer: Answer) -> list[Errors]:
    inputs, names = answer.inputs, ("w_gate_up", "w_down")
    counts = torch.bincount(inputs.ids[inputs.ids >= 0], minlength=case.layer.routed_experts)
    idle = (counts == 0).nonzero().flatten()
    for name in names:
        if len(idle) and bool((_grad(answer.grads, name)[idle] != 0).any()):
            raise Wrong(f"the gradient of {name} is not zero for experts that no token chose")
    active = counts.nonzero().flatten()
    some = active[torch.linspace(0, len(active) - 1, min(CHECK_EXPERTS, len(active))).long()]
    return [
        errors_of(_grad(answer.grads, name)[expert], expected)
        for expert in some.tolist()
        for name, expected in zip(names, _expert_gradients(case, weights, inputs, expert), strict=True)
    ]


def _expert_gradients(case: Case, weights: Weights, inputs: Inputs, expert: int) -> tuple[Tensor, Tensor]:
    """The oracle's whole d(w_gate_up) and d(w_down) of one expert."""
    assert inputs.upstream is not None
    x = inputs.x.detach().double()
    ids, gates = _gates(case, weights, x, inputs.ids, inputs.weights.detach())
    token, place = (ids == expert).nonzero(as_tuple=True)
    w_in = weights.w_gate_up[expert].detach().double().requires_grad_()
    w_down = weights.w_down[expert].detach().double().requires_grad_()
    out = gates[token, place].unsqueeze(1) * oracle.ffn(case.layer, x[token], w_in, w_down)
    out.backward(inputs.upstream[token].double())
    return _present(w_in), _present(w_down)


# Stages: through the provider's own row map, since layouts differ.


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
    y = _tensor(answer.output, tuple(expected.shape), answer.inputs.x.dtype)
    return errors_of(y, expected)


_STAGE_CHECKS: dict[str, Callable[..., Errors]] = {
    "gate": _check_gate,
    "plan": _check_plan,
    "permute": _check_permute,
    "up_projection": _check_up,
    "down_projection": _check_down,
    "combine": _check_combine,
}


def _tensor(output: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if not isinstance(output, Tensor):
        raise Wrong(f"returned a {type(output).__name__}, not a tensor")
    if tuple(output.shape) != shape:
        raise Wrong(f"returned shape {list(output.shape)}, not {list(shape)}")
    if output.dtype != dtype:
        raise Wrong(f"returned {output.dtype}, not {dtype}")
    return output.detach()


def _grad(grads: dict[str, Tensor], name: str) -> Tensor:
    if name not in grads:
        raise Wrong(f"no gradient reached {name}")
    return grads[name]


def _present(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None
