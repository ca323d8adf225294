"""Logits that make a router choose given experts, and hidden states that make a linear map give those logits."""

from __future__ import annotations

import torch
from torch import Tensor

# Gap between neighbours around the k-th place: bfloat16 rounding of a hidden state moves a
# logit of unit scale by about 0.004, so no rounding can flip a choice.
MARGIN = 0.05


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


def widen_margin(logits: Tensor, ids: Tensor) -> Tensor:
    """The same logits with the chosen ones raised, so that the k-th place is won by at least MARGIN."""
    return logits.scatter_add(1, ids, torch.full(ids.shape, MARGIN, dtype=logits.dtype))


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
