"""Check: is an arm's answer right? Against the float64 oracle, on inputs it has not seen.

Before the call that counts, the arm has run on other values in the same buffers
and its output has been overwritten with NaN: a cached or unwritten output
cannot pass. Changed inputs are an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moebench import oracle
from moebench.answer import Answer, Wrong, sample_tokens, tensor_of
from moebench.check_stages import STAGE_CHECKS
from moebench.measure.errors import BACKWARD_FACTOR, NO_ERROR, Errors, errors_of, tolerance, verdict
from moebench.point import DROPLESS, STAGES
from moebench.providers import torch_loop
from moebench.providers.base import Case, State
from moebench.workload import Inputs, Weights

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
            parts, fidelity = _check_whole(provider, case, weights, answer)
    except Wrong as why:
        return Verdict(None, None, None, str(why))
    worst, wrong = NO_ERROR, None
    eager = answer.once(("eager", case.capacity_factor), lambda: eager_errors(case, weights, answer.inputs))
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
    """Error of eager PyTorch in the case's precision, on up to 64 tokens: what the precision itself costs."""
    pick = sample_tokens(inputs.ids, 64).to(inputs.x.device)
    x, ids, gates = inputs.x[pick], inputs.ids[pick], inputs.weights[pick]
    with torch.no_grad():
        y = torch_loop.experts(x, ids, gates, *weights.experts, activation=case.layer.activation, slots=None)
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
) -> tuple[list[tuple[str, Errors]], Errors | None]:
    inputs = answer.inputs
    y = tensor_of(answer.output, (case.tokens, case.layer.hidden_size), inputs.x.dtype)
    pick = sample_tokens(answer.wanted_ids).to(y.device)
    x = inputs.x[pick].detach().double()
    ids, given = inputs.ids[pick], inputs.weights[pick].detach()
    wanted, wanted_given = answer.wanted_ids[pick], answer.wanted_weights[pick]
    if provider.name == "dense-ffn":  # the yardstick's own oracle: the first K experts, weight 1, no routing
        ids = torch.arange(case.layer.top_k, device=y.device).expand(len(pick), -1)
        given = torch.ones(ids.shape, device=y.device)
        dense = answer.once(("dense", case.scope), lambda: reference(case, weights, x, ids, given.double()))
        return [("", errors_of(y[pick], dense))], None

    def ask(weights: Weights, ids: Tensor, given: Tensor) -> Tensor:
        return reference(case, weights, x, *_gates(case, weights, x, ids, given))

    whole = ("y", case.scope, DROPLESS) if weights.quantised is None else ("unquantised y", case.scope)
    expected = answer.once(("y", case.scope, case.capacity_factor), lambda: ask(weights, ids, given))
    dropless = answer.once(whole, lambda: ask(weights.unquantised(), wanted, wanted_given))
    parts = [("", errors_of(y[pick], expected))]
    if case.direction == "forward_backward":
        parts += _check_gradients(case, weights, answer, pick)
    return parts, errors_of(y[pick], dropless)


def _check_gradients(case: Case, weights: Weights, answer: Answer, pick: Tensor) -> list[tuple[str, Errors]]:
    """dX and d(weights) on the picked tokens, dW whole for a few experts, idle experts exactly zero."""
    inputs, grads = answer.inputs, answer.grads
    key = ("gradients", case.scope, case.capacity_factor)
    d_x, d_weights = answer.once(key, lambda: _token_gradients(case, weights, inputs, pick))
    found = [("x", errors_of(_grad(grads, "x")[pick], d_x))]
    if case.scope == "experts":
        kept = inputs.ids[pick] >= 0  # what a dropped assignment's weight would earn is nobody's business
        found.append(("weights", errors_of(_grad(grads, "weights")[pick] * kept, d_weights * kept)))
    return found + _check_expert_gradients(case, weights, answer)


def _token_gradients(case: Case, weights: Weights, inputs: Inputs, pick: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle's dX and d(weights) of the picked tokens."""
    assert inputs.upstream is not None
    x = inputs.x[pick].detach().double().requires_grad_()
    given = inputs.weights[pick].detach().double().requires_grad_()
    ids, gates = _gates(case, weights, x, inputs.ids[pick], given)
    y = reference(case, weights, x, ids, gates if case.scope == "layer" else given)
    y.backward(inputs.upstream[pick].double())
    return _present(x), _present(given)


def _check_expert_gradients(case: Case, weights: Weights, answer: Answer) -> list[tuple[str, Errors]]:
    inputs, names = answer.inputs, ("w_gate_up", "w_down")
    counts = torch.bincount(inputs.ids[inputs.ids >= 0], minlength=case.layer.routed_experts)
    idle = (counts == 0).nonzero().flatten()
    for name in names:
        if len(idle) and bool((_grad(answer.grads, name)[idle] != 0).any()):
            raise Wrong(f"the gradient of {name} is not zero for experts that no token chose")
    active = counts.nonzero().flatten()
    some = active[torch.linspace(0, len(active) - 1, min(CHECK_EXPERTS, len(active))).long()]
    found = []
    for expert in some.tolist():
        key = ("gradients of expert", expert, case.scope, case.capacity_factor)
        ask = partial(_expert_gradients, case, weights, inputs, expert)
        # Gradients of large experts are computed again for each arm: keeping them would take gigabytes.
        gradients = answer.once(key, ask) if case.layer.expert_params() < KEPT_PARAMS else ask()
        found += [
            (name, errors_of(_grad(answer.grads, name)[expert], gradient))
            for name, gradient in zip(names, gradients, strict=True)
        ]
    return found


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


def _grad(grads: dict[str, Tensor], name: str) -> Tensor:
    if name not in grads:
        raise Wrong(f"no gradient reached {name}")
    return grads[name]


def _present(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None
