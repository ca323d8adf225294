"""The three forms a routing has: TopK, Ragged and Mix. What they share is in `Routing`.

TopK     each token names K experts                             token choice, hash, assignment with K picks
Ragged   a list of (token, expert, weight), any number a token  expert choice, batch masks, thresholds
Mix      every slot of an expert is a blend of all tokens       Soft MoE
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopK:
    """At most K experts a token, with their weights.

    Attributes:
        ids: int64 [T, K]; -1 where an assignment was dropped for capacity, or was never wanted.
        weights: [T, K], float32 (float64 where the logits were); 0 where the id is -1.
        wanted_ids: int64 [T, K] before any dropping; -1 where the router itself wants no expert (GShard's second).
        wanted_weights: [T, K] before any dropping.
        logits: [T, E] that the router turns into exactly these ids, or None where ids and weights are given.
        routed_experts: E.
        on_input: whether the weight multiplies the expert's input (Llama 4) instead of its output.
    """

    ids: Tensor
    weights: Tensor
    wanted_ids: Tensor
    wanted_weights: Tensor
    logits: Tensor | None
    routed_experts: int
    on_input: bool = False

    @property
    def tokens(self) -> int:
        """T."""
        return self.ids.shape[0]

    def assignments(self) -> tuple[Tensor, Tensor, Tensor]:
        """(token int64 [N], expert int64 [N], weight [N]) of what was kept, by token."""
        token, pick = (self.ids >= 0).nonzero(as_tuple=True)
        return token, self.ids[token, pick], self.weights[token, pick]

    def counts(self) -> Tensor:
        """Kept assignments per expert, int64 [E]."""
        return _per_expert(self.ids, self.routed_experts)

    def demand(self) -> Tensor:
        """Wanted assignments per expert, int64 [E]: dropping hides skew."""
        return _per_expert(self.wanted_ids, self.routed_experts)

    def per_token(self) -> Tensor:
        """Experts that kept each token, int64 [T]."""
        return (self.ids >= 0).sum(dim=1)

    @property
    def kept(self) -> int:
        """Number of assignments not dropped."""
        return int((self.ids >= 0).sum())

    @property
    def drop_rate(self) -> float:
        """Share of the wanted assignments that were dropped."""
        wanted = int((self.wanted_ids >= 0).sum())
        return 1.0 - self.kept / wanted if wanted else 0.0


@dataclass(frozen=True)
class Ragged:
    """Any number of experts a token: assignments sorted by token (CSR with `offsets`).

    Attributes:
        token: int64 [N], rising.
        expert: int64 [N]; -1 is padding, which no expert computes (N may be a fixed size).
        weight: [N], multiplies the expert's output; 0 for padding.
        tokens: T.
        routed_experts: E.
        logits: [T, E] that the router turns into exactly this, or None.
    """

    token: Tensor
    expert: Tensor
    weight: Tensor
    tokens: int
    routed_experts: int
    logits: Tensor | None = None

    def assignments(self) -> tuple[Tensor, Tensor, Tensor]:
        """(token, expert, weight), each [N], without padding."""
        kept = self.expert >= 0
        return self.token[kept], self.expert[kept], self.weight[kept]

    def counts(self) -> Tensor:
        """Assignments per expert, int64 [E]."""
        return _per_expert(self.expert, self.routed_experts)

    def demand(self) -> Tensor:
        """As `counts`: what an expert takes it also wanted."""
        return self.counts()

    def per_token(self) -> Tensor:
        """Experts that took each token, int64 [T]."""
        return torch.bincount(self.token[self.expert >= 0], minlength=self.tokens)

    @property
    def offsets(self) -> Tensor:
        """int64 [T + 1]: token t's assignments are offsets[t] to offsets[t + 1], padding included."""
        return torch.cat([self.token.new_zeros(1), torch.bincount(self.token, minlength=self.tokens).cumsum(0)])

    @property
    def kept(self) -> int:
        """Number of assignments."""
        return int((self.expert >= 0).sum())

    @property
    def drop_rate(self) -> float:
        """0: there is no overflow. Tokens that no expert took are counted by `statistics`."""
        return 0.0


@dataclass(frozen=True)
class Mix:
    """Every slot is a blend of all tokens, every token a blend of all slots (Soft MoE). S = E * P slots.

    Attributes:
        dispatch: [T, S], columns sum to 1: slots = dispatch^T x.
        combine: [T, S], rows sum to 1: y = combine f(slots). Slots are grouped by expert: slot e*P + p is expert e's.
        routed_experts: E.
        logits: [T, S] both came from, or None.
    """

    dispatch: Tensor
    combine: Tensor
    routed_experts: int
    logits: Tensor | None = None

    @property
    def tokens(self) -> int:
        """T."""
        return self.dispatch.shape[0]

    @property
    def slot_expert(self) -> Tensor:
        """The expert of each slot, int64 [S]."""
        slots = self.dispatch.shape[1]
        return torch.arange(slots, device=self.dispatch.device) // (slots // self.routed_experts)

    def counts(self) -> Tensor:
        """Slots per expert, int64 [E]: all alike."""
        return _per_expert(self.slot_expert, self.routed_experts)

    def demand(self) -> Tensor:
        """As `counts`."""
        return self.counts()

    def per_token(self) -> Tensor:
        """Experts that see each token, int64 [T]: all of them."""
        return torch.full((self.tokens,), self.routed_experts, device=self.dispatch.device)

    @property
    def kept(self) -> int:
        """Number of rows that experts compute: S."""
        return self.dispatch.shape[1]

    @property
    def drop_rate(self) -> float:
        """0: nothing is dropped."""
        return 0.0


Routing = TopK | Ragged | Mix
FORMS = ("TopK", "Ragged", "Mix")


def top_k_routing(
    ids: Tensor, weights: Tensor, routed_experts: int, logits: Tensor | None = None, *, on_input: bool = False
) -> TopK:
    """TopK before any dropping; ids may hold -1 where no expert is wanted, weights must be 0 there."""
    return TopK(ids, weights, ids, weights, logits, routed_experts, on_input)


def ragged_routing(mask: Tensor, weights: Tensor, logits: Tensor | None = None) -> Ragged:
    """From a bool mask [T, E] of who takes whom, and dense weights [T, E]."""
    token, expert = mask.nonzero(as_tuple=True)
    return Ragged(token, expert, weights[token, expert], mask.shape[0], mask.shape[1], logits)


def active_experts(routing: Routing) -> int:
    """Distinct experts that kept a token."""
    return int((routing.counts() > 0).sum())


def load_max_over_mean(routing: Routing) -> float:
    """Load of the busiest expert over the mean load of all E, before dropping."""
    demand = routing.demand().double()
    return float(demand.max() / demand.mean())


def _per_expert(experts: Tensor, routed_experts: int) -> Tensor:
    return torch.bincount(experts[experts >= 0].flatten(), minlength=routed_experts)
