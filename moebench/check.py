"""Check: is an arm's answer right? Against the float64 oracle, on inputs it has not seen.

Before the call that counts, the arm has run on other values in the same buffers
and its output has been overwritten with NaN: a cached or unwritten output
cannot pass. Changed inputs are an error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moebench import expected, oracle
from moebench.answer import Answer, Wrong, sample_tokens, tensor_of
from moebench.check_stages import STAGE_CHECKS
from moebench.measure.errors import BACKWARD_FACTOR, NO_ERROR, Errors, errors_of, tolerance, verdict
from moebench.point import STAGES, Capacity
from moebench.providers import torch_loop
from moebench.providers.base import State
from moebench.providers.case import Case
from moebench.routing.scores import Side
from moebench.weights import Weights
from moebench.workload import Choice, Inputs, choice_of

CHECK_EXPERTS = 4
KEPT_PARAMS = 1 << 24


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
            parts = [("", STAGE_CHECKS[case.scope](provider, case, weights, answer, state))]
            fidelity = None
        else:
            parts, fidelity = _check_whole(provider, state, case, weights, answer)
    except Wrong as why:
        return Verdict(None, None, None, str(why))
    worst, wrong = NO_ERROR, None
    eager = answer.once(("eager", case.capacity), lambda: eager_errors(case, weights, answer.inputs))
    allowed = tolerance(case.precision, eager)
    for gradient, errors in parts:
        worst = worst.worst(errors)
        wrong = wrong or _reason(gradient, errors, allowed)
    return Verdict(_finite(worst.rel), _finite(worst.max), None if fidelity is None else _finite(fidelity.rel), wrong)


def _reason(gradient: str, errors: Errors, allowed: Errors) -> str | None:
    if not gradient:
        return verdict(errors, allowed)
    reason = verdict(errors, allowed.times(BACKWARD_FACTOR))
    return reason and f"gradient of {gradient}: {reason}"


def eager_errors(case: Case, weights: Weights, inputs: Inputs) -> Errors:
    """Error of eager PyTorch in the case's precision, on up to 64 rows: what the precision itself costs."""
    rows = expected.rows_of(inputs.x, inputs.choice)
    pick = ((rows.expert >= 0) & (rows.expert < case.layer.routed_experts)).nonzero().flatten()
    pick = pick[torch.linspace(0, len(pick) - 1, min(64, len(pick))).long().to(pick.device)]
    x, ids, gates = rows.x[pick], rows.expert[pick].unsqueeze(1), rows.weight[pick].unsqueeze(1)
    with torch.no_grad():
        y = torch_loop.experts(
            x, ids, gates, *weights.experts, activation=case.activation, slots=None, **weights.biases
        )
        return errors_of(y, oracle.experts(case.layer, weights, x.double(), ids, gates.double()))


def _choice(case: Case, weights: Weights, answer: Answer, x: Tensor, pick: Tensor, choice: Choice) -> Choice:
    """The routing to answer for, in float64 and of the picked tokens where it is a TopK: given, or the oracle's own.

    Args:
        x: float64 [T, D], which the oracle's own routing follows.
        choice: what the variant was given, or the dropless one.
    """
    picked = choice.token is None and choice.combine is None
    if case.scope != "layer":
        ids, given = (choice.ids[pick], choice.weights[pick]) if picked else (choice.ids, choice.weights)
        return replace(choice, ids=ids, weights=given.double())
    if not picked:
        return choice_of(expected.routing(case.layer, weights, x, answer.inputs.side))
    side = answer.inputs.side
    if expected.coupled(case.layer):
        found = choice_of(expected.routing(case.layer, weights, x, side))
        found = replace(found, ids=found.ids[pick], weights=found.weights[pick])
    else:
        some = Side(**{name: value[pick] for name, value in side.tensors().items()})
        found = choice_of(expected.routing(case.layer, weights, x[pick], some))
    return expected.aligned(found, answer.wanted.ids[pick], choice.ids[pick])


def reference(
    case: Case, weights: Weights, answer: Answer, x: Tensor, pick: Tensor, choice: Choice, given: Tensor | None = None
) -> Tensor:
    """The oracle's y of the picked tokens under a routing: x float64 [T, D] -> float64 [n, D].

    Args:
        given: float64 weights in place of the routing's, for their gradient; scope `experts`.
    """
    found = _choice(case, weights, answer, x, pick, choice)
    if given is not None:
        found = replace(found, weights=given)
    layer, every = case.layer, torch.arange(len(pick), device=x.device)
    if found.token is None and found.combine is None:
        routed = expected.routed_sum(layer, weights, x[pick], found, every)
    else:
        routed = expected.routed_sum(layer, weights, x, found, pick)
    if case.scope != "layer":
        return routed
    dense_x = answer.inputs.dense_x
    return oracle.joined(layer, weights, x[pick], routed, None if dense_x is None else dense_x[pick].double())


def _tokens_looked_at(case: Case, answer: Answer) -> Tensor:
    tokens = len(answer.inputs.x)
    mixed = answer.inputs.combine is not None or (case.scope == "layer" and expected.coupled(case.layer))
    if mixed and case.direction == "forward_backward":
        return torch.arange(tokens, device=answer.inputs.x.device)  # what one token does moves the others' answers
    return sample_tokens(answer.wanted, tokens).to(answer.inputs.x.device)


def _check_whole(
    provider: Any, state: State, case: Case, weights: Weights, answer: Answer
) -> tuple[list[tuple[str, Errors]], Errors | None]:
    inputs = answer.inputs
    y = tensor_of(answer.output, (case.tokens, case.layer.hidden_size), inputs.x.dtype)
    x = inputs.x.detach().double()
    if hasattr(provider, "own_reference"):  # another function than the layer's: it brings its own oracle
        return [("", errors_of(y, provider.own_reference(state, x)))], None
    pick = _tokens_looked_at(case, answer)
    if provider.name == "dense-ffn":  # the yardstick's own oracle: the first K experts, weight 1, no routing
        ids = torch.arange(case.layer.top_k, device=y.device).expand(len(pick), -1)
        dense = answer.once(("dense", case.scope), lambda: _dense(case, weights, inputs, pick, ids))
        return [("", errors_of(y[pick], dense))], None

    def ask(weights: Weights, choice: Choice) -> Tensor:
        return reference(case, weights, answer, x, pick, choice)

    whole = ("y", case.scope, Capacity()) if weights.quantised is None else ("unquantised y", case.scope)
    under_capacity = answer.once(("y", case.scope, case.capacity), lambda: ask(weights, inputs.choice))
    dropless = answer.once(whole, lambda: ask(weights.unquantised(), answer.wanted))
    parts = [("", errors_of(y[pick], under_capacity))]
    if case.direction == "forward_backward":
        parts += _check_gradients(case, weights, answer, pick)
    return parts, errors_of(y[pick], dropless)


def _dense(case: Case, weights: Weights, inputs: Inputs, pick: Tensor, ids: Tensor) -> Tensor:
    x = inputs.x[pick].detach().double()
    y = oracle.experts(case.layer, weights, x, ids, torch.ones(ids.shape, dtype=torch.float64, device=x.device))
    if case.scope != "layer":
        return y
    return oracle.joined(case.layer, weights, x, y, None if inputs.dense_x is None else inputs.dense_x[pick].double())


def _check_gradients(case: Case, weights: Weights, answer: Answer, pick: Tensor) -> list[tuple[str, Errors]]:
    """dX and d(weights) on the picked tokens, dW whole for a few experts, idle experts exactly zero."""
    inputs, grads = answer.inputs, answer.grads
    key = ("gradients", case.scope, case.capacity)
    d_x, d_weights = answer.once(key, lambda: _token_gradients(case, weights, answer, pick))
    found = [("x", errors_of(_grad(grads, "x")[pick], d_x))] if bool(d_x.any()) or "x" in grads else []
    if case.scope == "experts" and inputs.combine is None:
        rows = pick if inputs.token is None else slice(None)
        kept = inputs.ids[rows] >= 0  # what a dropped assignment's weight would earn is nobody's business
        if inputs.token is not None:
            kept = kept & torch.isin(inputs.token, pick).unsqueeze(1)
        if bool(kept.any()):
            found.append(("weights", errors_of(_grad(grads, "weights")[rows] * kept, d_weights * kept)))
    return found + _check_expert_gradients(case, weights, answer)


def _token_gradients(case: Case, weights: Weights, answer: Answer, pick: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle's dX of the picked tokens and d(weights) of their assignments (of all rows of a Ragged)."""
    inputs = answer.inputs
    assert inputs.upstream is not None
    leaf = inputs.x[pick].detach().double().requires_grad_()
    x = inputs.x.detach().double().index_copy(0, pick, leaf)
    rows = inputs.weights if inputs.token is not None or inputs.combine is not None else inputs.weights[pick]
    given = rows.detach().double().requires_grad_()
    y = reference(case, weights, answer, x, pick, inputs.choice, None if case.scope == "layer" else given)
    if y.requires_grad:  # not where no expert took any token
        y.backward(inputs.upstream[pick].double())
    return _present(leaf), _present(given)


def _check_expert_gradients(case: Case, weights: Weights, answer: Answer) -> list[tuple[str, Errors]]:
    inputs, names = answer.inputs, ("w_gate_up", "w_down", *weights.biases)
    kept = inputs.ids[(inputs.ids >= 0) & (inputs.ids < case.layer.routed_experts)]
    counts = torch.bincount(kept, minlength=case.layer.routed_experts)
    idle = (counts == 0).nonzero().flatten()
    if len(idle) == len(counts):
        names = tuple(name for name in names if name in answer.grads)  # nothing is owed to experts that nobody chose
    for name in names:
        if len(idle) and bool((_grad(answer.grads, name)[idle] != 0).any()):
            raise Wrong(f"the gradient of {name} is not zero for experts that no token chose")
    active = counts.nonzero().flatten()
    some = active[torch.linspace(0, len(active) - 1, min(CHECK_EXPERTS, len(active))).long()]
    found = []
    for expert in some.tolist():
        key = ("gradients of expert", expert, case.scope, case.capacity)
        ask = partial(_expert_gradients, case, weights, answer, expert)
        # Gradients of large experts are computed again for each arm: keeping them would take gigabytes.
        gradients = answer.once(key, ask) if case.layer.expert_params() < KEPT_PARAMS else ask()
        found += [
            (name, errors_of(_grad(answer.grads, name)[expert], gradient))
            for name, gradient in zip(names, gradients, strict=True)
        ]
    return found


def _expert_gradients(case: Case, weights: Weights, answer: Answer, expert: int) -> tuple[Tensor, ...]:
    """The oracle's whole gradients of one expert: w_gate_up, w_down, and its biases where it has some."""
    inputs = answer.inputs
    assert inputs.upstream is not None
    x, every = inputs.x.detach().double(), torch.arange(len(inputs.x), device=inputs.x.device)
    rows = expected.rows_of(x, _choice(case, weights, answer, x, every, inputs.choice))
    mine = (rows.expert == expert).nonzero().flatten()
    stacks = (weights.w_gate_up, weights.w_down, *weights.biases.values())
    leaves = [stack[expert].detach().double().requires_grad_() for stack in stacks]
    gate, row = rows.weight[mine].detach().unsqueeze(1), rows.x[mine]
    upstream = rows.upstream(_routed_upstream(case, weights, answer))[mine]
    inner = gate * row if expected.on_input(case.layer) else row
    out = oracle.ffn(case.layer, inner, *leaves)
    (out if expected.on_input(case.layer) else gate * out).backward(upstream)
    return tuple(_present(leaf) for leaf in leaves)


def _routed_upstream(case: Case, weights: Weights, answer: Answer) -> Tensor:
    """The gradient that reaches the routed sum [T, D]: the layer may scale it before it joins the shared experts."""
    inputs = answer.inputs
    assert inputs.upstream is not None
    upstream = inputs.upstream.double()
    if case.scope != "layer":
        return upstream
    routed = torch.zeros_like(upstream).requires_grad_()
    dense_x = None if inputs.dense_x is None else inputs.dense_x.double()
    joined = oracle.joined(case.layer, weights, inputs.x.detach().double(), routed, dense_x)
    joined.backward(upstream)
    return _present(routed)


def _grad(grads: dict[str, Tensor], name: str) -> Tensor:
    if name not in grads:
        raise Wrong(f"no gradient reached {name}")
    return grads[name]


def _present(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None
