"""Logits that make a router choose given experts, and hidden states that make a linear map give those logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moebench.catalogue.spec import LayerSpec, RouterSpec
from moebench.routing.forms import Ragged, Routing, TopK

# Gap between neighbours around the k-th place: bfloat16 rounding of a hidden state moves a
# logit of unit scale by about 0.004, so no rounding can flip a choice.
MARGIN = 0.05
ROUNDS, ORDERED = 4, 16
# Selection scores of a router with a bias or groups, by what the token does with an expert: so far apart that neither
# the two best of another group nor any rounding reaches a chosen one.
CHOSEN, PASSED_OVER, OUT_OF_REACH = (0.55, 0.85), (0.35, 0.5), (0.1, 0.3)


def impose(layer: LayerSpec, ids: Tensor, bias: Tensor | None, generator: torch.Generator) -> Tensor:
    """Random logits, float32 [T, E], that make a linear router choose `ids` in that order, by a margin.

    Args:
        ids: int64 [T, K], from at most topk_groups groups a token.
        bias: the router's selection bias [E], or None.

    Raises:
        ValueError: ids of more groups than a token may choose from.
    """
    spec, E = layer.router, layer.choices
    if bias is None and spec.groups == 1:
        return impose_choice(ids, E, generator)
    wanted = _selection_scores(ids, E, spec, generator)
    return _LOGITS_OF.get(spec.kind, _of_monotone)(wanted, torch.zeros(E) if bias is None else bias.float().cpu())


def impose_choice(ids: Tensor, routed_experts: int, generator: torch.Generator) -> Tensor:
    """Random logits, float32 [T, E], whose K largest are `ids` in that order, by at least MARGIN each."""
    tokens, top_k = ids.shape
    values = torch.randn(tokens, routed_experts, generator=generator).sort(dim=-1, descending=True).values
    chosen, rest = values[:, :top_k], values[:, top_k:]
    steps = torch.arange(top_k, 0, -1) * MARGIN  # sorted gaps are >= 0, so these make each one >= MARGIN
    logits = torch.empty(tokens, routed_experts)
    is_chosen = torch.zeros(tokens, routed_experts, dtype=torch.bool).scatter_(1, ids, True)
    shuffle = torch.rand(rest.shape, generator=generator).argsort(dim=-1)
    logits[~is_chosen] = rest.gather(1, shuffle).flatten()
    return logits.scatter_(1, ids, chosen + steps)


def _selection_scores(ids: Tensor, routed_experts: int, spec: RouterSpec, generator: torch.Generator) -> Tensor:
    """Scores in (0, 1), [T, E]: what the router is to see after its bias."""
    tokens, top_k = ids.shape
    size = routed_experts // spec.groups
    in_group = torch.zeros(tokens, spec.groups, dtype=torch.bool).scatter_(1, ids // size, True)
    if bool((in_group.sum(dim=1) > spec.topk_groups).any()):
        raise ValueError(f"the traffic chooses from more groups than the router's {spec.topk_groups} of {spec.groups}")
    reached = in_group.repeat_interleave(size, dim=1)
    drawn = torch.rand(tokens, routed_experts, generator=generator)
    scores = torch.where(reached, _in_band(drawn, PASSED_OVER), _in_band(drawn, OUT_OF_REACH))
    places = (torch.arange(top_k, 0, -1) - 0.5 * torch.rand(tokens, top_k, generator=generator)) / top_k
    return scores.scatter_(1, ids, _in_band(places, CHOSEN))


def _in_band(unit: Tensor, band: tuple[float, float]) -> Tensor:
    low, high = band
    return low + (high - low) * unit


def _of_sigmoid(scores: Tensor, bias: Tensor) -> Tensor:
    return torch.logit((scores - bias).clamp(0.02, 0.98))


def _of_logit_bias(scores: Tensor, bias: Tensor) -> Tensor:
    return torch.logit(scores) - bias


def _of_sqrt_softplus(scores: Tensor, bias: Tensor) -> Tensor:
    return torch.log(torch.expm1((scores - bias).clamp_min(0.02).square()))


def _of_softmax(scores: Tensor, bias: Tensor) -> Tensor:
    share = scores / scores.sum(dim=1, keepdim=True) - bias
    return share.clamp_min(1e-6).log()


def _of_monotone(scores: Tensor, bias: Tensor) -> Tensor:
    # Softmax keeps the order of z; six units of z put e^1.8 between the bands, more than the two a group's sum counts.
    return 6.0 * scores


_LOGITS_OF: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid_bias": _of_sigmoid,
    "sigmoid_logit_bias": _of_logit_bias,
    "sqrt_softplus_bias": _of_sqrt_softplus,
    "softmax_bias": _of_softmax,
    "softmax_bias_zero": _of_softmax,
}


def steady(logits: Tensor, decide: Callable[[Tensor], Routing]) -> Tensor:
    """The same logits with what is chosen raised by MARGIN, until the router chooses the same again.

    Rounding then cannot flip the choice, in any router: of a row's k-th place, of an expert's last slot, of an
    assignment. After `ROUNDS` the last ones stand.
    """
    chosen = lifts(decide(logits), logits)
    for _ in range(ROUNDS):
        logits = logits + MARGIN * chosen
        again = lifts(decide(logits), logits)
        if torch.equal(again, chosen):
            break
        chosen = again
    return logits


def lifts(routing: Routing, logits: Tensor) -> Tensor:
    """How many margins each of [T, E] is to be raised: 1 for what was chosen, up to K for a token's first of K picks.

    Drop orders ask which pick came first. Of more than `ORDERED` picks the order is left to chance, as logits would be
    moved too far.
    """
    lift = torch.zeros(logits.shape)
    if isinstance(routing, TopK):
        token, pick = (routing.wanted_ids >= 0).nonzero(as_tuple=True)
        K = routing.wanted_ids.shape[1]
        lift[token, routing.wanted_ids[token, pick]] = (K - pick).float() if K <= ORDERED else 1.0
    elif isinstance(routing, Ragged):
        token, expert, _ = routing.assignments()
        lift[token, expert] = 1.0
    return lift


def impose_logits(x: Tensor, router: Tensor, logits: Tensor) -> Tensor:
    """Move x as little as possible so that x @ router.T equals the logits: x - (W x - z) W+^T.

    Args:
        x: [T, D].
        router: W [E, D] with E <= D and full rank, as it will be used (already rounded to its dtype).
        logits: z [T, E].

    Returns:
        float64 [T, D].
    """
    W, x64 = router.double(), x.double()
    correction: Tensor = torch.linalg.solve(W @ W.T, (logits.double() - x64 @ W.T).T).T
    moved: Tensor = x64 + correction @ W
    return moved
