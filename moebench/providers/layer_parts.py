"""What stands around an experts function, for every provider alike: gate, forms of routing, activation, shared FFN."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from moebench.providers.case import Case
from moebench.routing.forms import Mix, Ragged, Routing
from moebench.routing.route import decide, make_scores
from moebench.routing.scores import Side
from moebench.weights import Weights
from moebench.workload import Choice

ExpertsFn = Callable[..., Tensor]


def reference_gate(x: Tensor, gate: Mapping[str, Tensor], case: Case, side: Side) -> Routing:
    """The layer's router in plain PyTorch."""
    return decide(case.layer, make_scores(case.layer, x, gate, side))


def tensors_of(routing: Routing) -> tuple[Tensor, ...]:
    """What the gate's answer is made of: (ids, weights), (token, expert, weight) or (dispatch, combine)."""
    if isinstance(routing, Mix):
        return routing.dispatch, routing.combine
    if isinstance(routing, Ragged):
        return routing.token, routing.expert, routing.weight
    return routing.ids, routing.weights


def experts_sum(experts: ExpertsFn, choice: Choice, x: Tensor, weights: Weights, case: Case) -> Tensor:
    """An experts function on a routing of any form: x [T, D] -> y [T, D].

    A Ragged's rows are gathered first and summed by token after; a Mix's slots are blended before and after.
    """

    def call(rows: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        y: Tensor = experts(rows, ids, gates, *weights.experts, **weights.biases)
        return y

    if choice.dispatch is not None and choice.combine is not None:
        return choice.combine.to(x.dtype) @ call(choice.dispatch.to(x.dtype).T @ x, choice.ids, choice.weights)
    if choice.token is not None:
        out = call(x[choice.token], choice.ids, choice.weights)
        return torch.zeros_like(x).index_add(0, choice.token, out)
    if case.layer.router.zero_experts:
        routed = choice.ids < case.layer.routed_experts
        kept_as_is = (choice.weights * ~routed).sum(dim=1, keepdim=True).to(x.dtype)
        return call(x, choice.ids.where(routed, -1), choice.weights * routed) + kept_as_is * x
    if case.layer.router.kind == "sigmoid_input":  # one pick, whose weight multiplies the input
        return call(x * choice.weights.to(x.dtype), choice.ids, torch.ones_like(choice.weights))
    return call(x, choice.ids, choice.weights)


def join_shared(y: Tensor, x: Tensor, weights: Weights, case: Case, dense_x: Tensor | None) -> Tensor:
    """The routed sum [T, D] joined with the always-on FFN, as `shared_combine` says; `parallel` feeds it dense_x."""
    if weights.shared_gate_up is None or weights.shared_down is None:
        return y
    form = case.layer.shared_combine
    inputs = dense_x if form == "parallel" and dense_x is not None else x
    activation = case.layer.shared_activation or case.activation
    dense = activate(inputs @ weights.shared_gate_up.T, activation) @ weights.shared_down.T
    if form == "scaled_residual":
        return (y + dense) * 2**-0.5
    if weights.shared_gate is None:
        return y + dense
    z = x @ weights.shared_gate.T
    if form == "learned_mix":
        mix = torch.softmax(z, dim=-1)
        return mix[:, :1] * y + mix[:, 1:] * dense
    g = torch.sigmoid(z)
    return g * y + (1 - g) * dense if form == "cmr" else y + g * dense


def activate(rows: Tensor, activation: str) -> Tensor:
    """[n, m*F] -> [n, F]; gate columns come first. "limited_swiglu:LIMIT" names its limit."""
    name, _, limit = activation.partition(":")
    if name in _PLAIN:
        return _PLAIN[name](rows)
    gate, up = rows.chunk(2, dim=-1)
    if name == "clamped_swiglu":
        gate, up = gate.clamp(max=GPT_OSS_LIMIT), up.clamp(-GPT_OSS_LIMIT, GPT_OSS_LIMIT)
        return gate * torch.sigmoid(GPT_OSS_SHARPNESS * gate) * (up + 1)
    if name == "limited_swiglu":
        gate, up = gate.clamp(max=float(limit)), up.clamp(-float(limit), float(limit))
    return (F.gelu(gate) if name == "geglu" else F.silu(gate)) * up


GPT_OSS_LIMIT, GPT_OSS_SHARPNESS = 7.0, 1.702
_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "relu2": lambda rows: F.relu(rows).square(),
}
