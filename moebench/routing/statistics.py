"""Statistics of a routing of any form: how even its load is, what it drops, whom it leaves out.

Load is what experts are asked to take, before any dropping (dropping hides skew); n_e of expert e, N in all:

    load_max_over_mean      max n_e / (N / E)                               1 even ... E all to one
    load_cv                 population standard deviation / mean            0 ... sqrt(E - 1)
    load_entropy            H(n / N) / log E                                1 ... 0
    load_gini               mean |n_a - n_b| over all pairs / (2 mean)      0 ... (E - 1) / E
    collapsed_experts       share of experts with n_e < collapse_below N / E
    drop_rate               share of the wanted assignments that were dropped
    active_experts          experts that kept a token
    active_over_uniform     those over E (1 - (1 - k / E)^T), the expectation where each token picks k at random
    unrouted_tokens         share of tokens that no expert kept
    most_experts_per_token  of any token
    balance_loss            E sum_e (n_e / N) P_e, P_e the mean of softmax(logits): 1 even (Switch, alpha 1, f over k)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moebench.routing.forms import Mix, Routing, active_experts

_ROWS = 8192  # of logits at a time: their softmax need not fit beside them


def statistics(routing: Routing, *, collapse_below: float = 0.1) -> dict[str, float | None]:
    """All of the above by name; None where one is not defined (no load at all, one expert, no logits), never NaN."""
    demand, per_token = routing.demand().double(), routing.per_token()
    tokens, wanted = routing.tokens, float(demand.sum())
    active = active_experts(routing)
    expected = _expected_active(routing, wanted)
    return {
        **_load(demand, collapse_below),
        "drop_rate": float(routing.drop_rate) if wanted else None,
        "active_experts": float(active),
        "active_over_uniform": active / expected if expected else None,
        "unrouted_tokens": float((per_token == 0).double().mean()) if tokens else None,
        "most_experts_per_token": float(per_token.max()) if tokens else None,
        "balance_loss": _balance_loss(routing, demand),
    }


def _load(demand: Tensor, collapse_below: float) -> dict[str, float | None]:
    """What is told by n_e alone, float64 [E]."""
    E, total = demand.numel(), demand.sum()
    if not float(total):
        names = ("load_max_over_mean", "load_cv", "load_entropy", "load_gini", "collapsed_experts")
        return dict.fromkeys(names)
    mean, share = total / E, demand / total
    rising = torch.arange(1, E + 1, device=demand.device) * demand.sort().values
    return {
        "load_max_over_mean": float(demand.max() / mean),
        "load_cv": float(demand.std(correction=0) / mean),
        "load_entropy": float(torch.special.entr(share).sum()) / math.log(E) if E > 1 else None,
        "load_gini": float(2 * rising.sum() / (E * total)) - (E + 1) / E,
        "collapsed_experts": float((demand < collapse_below * mean).double().mean()),
    }


def _expected_active(routing: Routing, wanted: float) -> float:
    """Distinct experts if each of T tokens picked its mean number of experts at random."""
    E, T = routing.routed_experts, routing.tokens
    if not T:
        return 0.0
    picks = E if isinstance(routing, Mix) else wanted / T
    return E * -math.expm1(T * math.log1p(-picks / E)) if picks < E else float(E)


def _balance_loss(routing: Routing, demand: Tensor) -> float | None:
    logits = routing.logits
    if logits is None or isinstance(routing, Mix) or logits.shape[1] != demand.numel() or not float(demand.sum()):
        return None
    most = torch.finfo(logits.dtype).max
    P = torch.zeros_like(demand)
    for rows in logits.detach().split(_ROWS):
        P += rows.clamp(-most, most).softmax(dim=1).double().sum(dim=0)  # a row of -inf counts as one of equal logits
    loss = float(demand.numel() * (demand / demand.sum() * P / len(logits)).sum())
    return loss if math.isfinite(loss) else None
