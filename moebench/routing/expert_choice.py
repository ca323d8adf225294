"""Experts that choose tokens: each takes its C = kT/E best, so load is even by construction and a token may get none.

    expert_choice       s = softmax of z over experts; weight s                                  arXiv 2202.09368
    expert_choice_mesh  s = softmax of z over tokens; weight s / (experts that took the token)   Mesh TensorFlow
    batch_mask          s = softmax of z over experts; weight s / (sum of s over the experts that took the token);
                        in inference an expert takes all tokens with s over its threshold        arXiv 1701.06538, F

C is kT/E rounded to the nearest whole number (a half up), at least 1 and at most T: the papers leave the rounding open,
and released code truncates, some of it up to a multiple of 4 after that. Ties go to the earlier token.
Choices carry no gradient. Weights of the first two are multiplied by spec.scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebench.catalogue.spec import RouterSpec
from moebench.routing.forms import Ragged
from moebench.routing.scores import Scores

LARGEST = 1e30  # -inf counts as this much below 0: a row of it is a row of equal logits


def expert_choice(scores: Scores, spec: RouterSpec, top_k: int) -> Ragged:
    """The published rule: softmax over experts, so experts compare how sure tokens are of them."""
    s = torch.softmax(_bounded(scores), dim=1)
    token, expert = _best_tokens(s.detach(), _count(s, top_k))
    return Ragged(token, expert, s[token, expert] * spec.scale, len(s), s.shape[1], scores.logits)


def expert_choice_mesh(scores: Scores, spec: RouterSpec, top_k: int) -> Ragged:
    """Softmax over tokens; what several experts took is divided by how many they are."""
    s = torch.softmax(_bounded(scores), dim=0)
    token, expert = _best_tokens(s.detach(), _count(s, top_k))
    hits = torch.bincount(token, minlength=s.shape[0])[token]
    return Ragged(token, expert, s[token, expert] / hits * spec.scale, len(s), s.shape[1], scores.logits)


def batch_mask(scores: Scores, spec: RouterSpec, top_k: int) -> Ragged:
    """Strictly balanced in training, by learned thresholds in inference (equations 16 to 18 of the appendix).

    Raises:
        ValueError: inference without thresholds.
    """
    z = _bounded(scores)
    s = torch.softmax(z.detach(), dim=1)
    if spec.training:
        token, expert = _best_tokens(s, _count(s, top_k))
    elif scores.thresholds is None:
        raise ValueError("router 'batch_mask' needs learned thresholds in inference, and none were given")
    else:
        token, expert = (s > scores.thresholds.to(s)).nonzero(as_tuple=True)
    weight = _softmax_by_token(z[token, expert], token, len(z))
    return Ragged(token, expert, weight, len(z), z.shape[1], scores.logits)


def tokens_per_expert(tokens: int, routed_experts: int, top_k: int) -> int:
    """C: the whole number nearest kT/E, at least 1 and at most T (0 without tokens)."""
    nearest = (2 * top_k * tokens + routed_experts) // (2 * routed_experts)
    return min(tokens, max(1, nearest))


def fit_thresholds(gates: Tensor, top_k: int) -> Tensor:
    """Thresholds that part each expert's C best gates from the rest: on this batch the least of `threshold_loss`.

    Args:
        gates: softmax values [T, E] of a batch.

    Returns:
        [E], half way between the last gate taken and the first not taken; -1 where all tokens are taken.
    """
    T, E = gates.shape
    C = tokens_per_expert(T, E, top_k)
    if T == C:
        return gates.new_full((E,), -1.0)
    best = gates.detach().topk(C + 1, dim=0).values
    taken, left = best[C - 1], best[C]
    half_way = (taken + left) / 2
    return torch.where(half_way < taken, half_way, left)  # neighbouring floats have nothing between them


def threshold_loss(gates: Tensor, thresholds: Tensor, top_k: int) -> Tensor:
    """What thresholds are learned with: sum of (s > T_e) - (among the C best) times s - T_e (equation 20).

    Args:
        gates: softmax values [T, E] of a training batch.
        thresholds: [E].

    Returns:
        A number, at least 0; 0 where both masks agree.
    """
    over = (gates > thresholds).to(gates)
    token, expert = _best_tokens(gates.detach(), _count(gates, top_k))
    over[token, expert] -= 1.0
    return (over.detach() * (gates - thresholds)).sum()


def _count(values: Tensor, top_k: int) -> int:
    return tokens_per_expert(len(values), values.shape[1], top_k)


def _bounded(scores: Scores) -> Tensor:
    return scores.logits.clamp(-LARGEST, LARGEST)


def _best_tokens(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(token, expert) of the `count` largest of each column of [T, E], ties to the earlier token; by token."""
    T, E = values.shape
    best = values.topk(min(count + 1, T), dim=0)
    chosen = best.indices[:count]
    if 0 < count < T:
        tied = (best.values[count - 1] == best.values[count]).nonzero().squeeze(1)
        if len(tied):
            chosen[:, tied] = _first_of_ties(values[:, tied], best.values[count - 1, tied], count)
    key = (chosen * E + torch.arange(E, device=values.device)).flatten().sort().values
    return key // E, key % E


def _first_of_ties(values: Tensor, last: Tensor, count: int) -> Tensor:
    """As `_best_tokens` for columns [T, M] whose last place is contested; int64 [count, M]."""
    over, equal = values > last, values == last
    room = count - over.sum(dim=0)
    mask = over | (equal & (equal.cumsum(dim=0, dtype=torch.int32) <= room))
    return mask.T.nonzero()[:, 1].view(-1, count).T


def _softmax_by_token(z: Tensor, token: Tensor, tokens: int) -> Tensor:
    """Softmax of [N] within each token: gates divided by their sum, also where all of them underflow."""
    largest = z.new_full((tokens,), -torch.inf).scatter_reduce(0, token, z.detach(), "amax")
    part = (z - largest[token]).exp()
    return part / z.new_zeros(tokens).index_add(0, token, part)[token]
