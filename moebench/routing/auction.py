"""Balanced assignment by auction: the largest sum of values with T/E tokens an expert, exactly balanced.

    maximise sum_t z[t, a(t)]  subject to  floor(T/E) <= |{t: a(t) = e}| <= ceil(T/E) for every e

An expert has C = ceil(T/E) alike places, and a price p: the least bid among them once all are taken. All tokens without
a place bid at once: with v = z[t] - p, its best v1 at expert e and its second best v2 at another expert, a token offers
p_e + v1 - v2 + eps; each expert keeps its C largest offers (ties: the earlier token). Prices only rise, so this ends,
and then no token would gain more than eps elsewhere: the sum is within eps * T of the largest (Bertsekas 1979;
Bertsekas and Castanon 1989 for alike places). eps falls in steps, prices carry over (eps scaling).

What makes it fast is no part of that proof: prices start from entropic transport on a sample of tokens; a token looks
at a short list of experts, with a bound on all others that is still true when prices have risen; equal values
are told apart by a fixed term far below eps.

Where E does not divide T, E * C - T placeholders worth nothing bid too, at most one an expert, for the cheapest places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RESOLUTION = 1e-3  # the sum is within this * T, or this * range * T where the values' range is under 1
FLOOR = 1e3  # a value this far below the token's best counts as no lower: -inf must have a price
LISTED = 48  # experts a token looks at before it looks at all again
SHRINK = 0.2  # of eps between steps
CHUNK = 1 << 24  # values looked at together, so that no second [T, E] is in memory
SAMPLE = 1 << 23  # values that starting prices are fitted to
STARTING_ROUNDS = 12  # of the fit, at each of its temperatures
TIE = 1 / 16  # of eps: the largest term that tells equal values apart


def resolution(values: Tensor) -> float:
    """The gap eps per token that `balanced_assignment` keeps: 1e-3 * min(1, range of the values as read)."""
    ranges = [float(_below_best(chunk).min()) for chunk in values.detach().split(_rows(values))]
    return RESOLUTION * min(1.0, max(-min(ranges, default=0.0), 1e-6))


def balanced_assignment(values: Tensor) -> Tensor:
    """One expert a token, every expert floor(T/E) or ceil(T/E) tokens, the sum of values within eps * T of the largest.

    Args:
        values: [T, E], float32 or float64, no NaN; read relative to the token's largest, no further than 1000 below.

    Returns:
        int64 [T]. Deterministic.
    """
    T, E = values.shape
    if E == 1 or T == 0:
        return torch.zeros(T, dtype=torch.int64, device=values.device)
    values = values.detach()
    # Half of eps for the bids; of the rest ties take an eighth, and placeholders and rounding are far less.
    eps = resolution(values) / 2 * T / (E * -(-T // E))
    prices, step = _starting_prices(values)
    book = _Book.empty(values, prices, eps * TIE)
    while True:
        step = max(step * SHRINK, eps)
        book.release(step)
        while book.bid(step):
            pass
        if step == eps:
            return book.owner[:T]


@dataclass
class _Book:
    """Who holds which place at what bid; tokens are 0 to T - 1, placeholders follow.

    Attributes:
        values: [T, E].
        prices: float64 [E].
        owner: int64 [T + placeholders], the expert, or E for none.
        offered: float64 [T + placeholders], the bid.
        places: C.
        tie: size of the term that tells equal values apart.
        listed: int64 [T, M], experts a token looks at; worth: float64 [T, M] its values there.
        others: float64 [T], a bound on v over all other experts, at any prices from now on.
        held: float64 [T], the value at the owner.
    """

    values: Tensor
    prices: Tensor
    owner: Tensor
    offered: Tensor
    places: int
    tie: Tensor
    listed: Tensor
    worth: Tensor
    others: Tensor
    held: Tensor

    @classmethod
    def empty(cls, values: Tensor, prices: Tensor, tie: float) -> _Book:
        """Nobody has a place; every token's list is made at these prices."""
        (T, E), device = values.shape, values.device
        places = -(-T // E)
        M = min(E, LISTED)
        # Token t reads this circle from place t: equal values then fall on all experts alike.
        circle = torch.randperm(E, generator=torch.Generator().manual_seed(0)).to(device).double() * (tie / E)
        book = cls(
            values,
            prices,
            torch.full((E * places,), E, device=device),
            prices.new_zeros(E * places),
            places,
            torch.cat([circle, circle]),
            torch.zeros(T, M, dtype=torch.int64, device=device),
            prices.new_zeros(T, M),
            prices.new_full((T,), -torch.inf),
            prices.new_zeros(T),
        )
        for rows in torch.arange(T, device=device).split(_rows(values)):
            book.look(rows)
        return book

    def look(self, rows: Tensor) -> None:
        """Make the lists of these tokens anew, at the prices of now."""
        E, M = self.values.shape[1], self.listed.shape[1]
        below = _below_best(self.values[rows])
        net = below - self.prices.to(below) + self.tie.to(below).unfold(0, E, 1)[rows % E]
        best = net.topk(min(M + 1, E), dim=1)
        ids = best.indices[:, :M]
        self.listed[rows] = ids
        self.worth[rows] = below.gather(1, ids).double() + self.tie[ids + (rows % E).unsqueeze(1)]
        if M < E:
            self.others[rows] = best.values[:, M].double() + self._rounding()

    def _rounding(self) -> float:
        return 4 * torch.finfo(self.values.dtype).eps * float(self.prices.max())

    def bid(self, step: float) -> bool:
        """One round; False if everyone has a place."""
        E, T = self.values.shape[1], len(self.values)
        waiting = (self.owner == E).nonzero().squeeze(1)
        if len(waiting) == 0:
            return False
        tokens, placeholders = waiting[waiting < T], waiting[waiting >= T]
        chosen, offers = self._offers(tokens, step)
        cheap, offer = self._cheapest(len(placeholders), step)
        self._outbid_placeholders(cheap)
        self._award(waiting, torch.cat([chosen, cheap]), torch.cat([offers, offer]))
        return True

    def _offers(self, tokens: Tensor, step: float) -> tuple[Tensor, Tensor]:
        best = self._two_best(tokens)
        stale = best.values[:, 1] < self.others[tokens]
        if stale.any():
            for rows in tokens[stale].split(_rows(self.values)):
                self.look(rows)
            best = self._two_best(tokens)
        pick = best.indices[:, :1]
        chosen = self.listed[tokens].gather(1, pick).squeeze(1)
        self.held[tokens] = self.worth[tokens].gather(1, pick).squeeze(1)
        return chosen, self.prices[chosen] + best.values[:, 0] - best.values[:, 1] + step

    def _two_best(self, tokens: Tensor) -> torch.return_types.topk:
        return (self.worth[tokens] - self.prices[self.listed[tokens]]).topk(2, dim=1)

    def _cheapest(self, count: int, step: float) -> tuple[Tensor, Tensor]:
        """The experts with the cheapest places for placeholders, and one offer for all: what the next would cost."""
        costs = self.prices.clone()
        E, T = self.values.shape[1], len(self.values)
        hosted = self.owner[T:] < E
        costs[self.owner[T:][hosted]] = self.offered[T:][hosted]
        lowest = costs.topk(min(count + 1, E), largest=False)
        return lowest.indices[:count], (lowest.values[-1] + step).expand(count)

    def _outbid_placeholders(self, cheap: Tensor) -> None:
        E, T = self.values.shape[1], len(self.values)
        taken = torch.zeros(E + 1, dtype=torch.bool, device=cheap.device)
        taken[cheap] = True
        holders = self.owner[T:]
        holders[taken[holders]] = E

    def _award(self, bidders: Tensor, chosen: Tensor, offers: Tensor) -> None:
        """Each expert keeps its C largest offers, old and new, and raises its price to the least of them."""
        E = self.values.shape[1]
        self.owner[bidders], self.offered[bidders] = chosen, offers
        touched = torch.zeros(E + 1, dtype=torch.bool, device=chosen.device)
        touched[chosen] = True
        held = touched[self.owner].nonzero().squeeze(1)
        held = held[self.offered[held].argsort(descending=True, stable=True)]
        held = held[self.owner[held].argsort(stable=True)]
        experts = self.owner[held]
        counts = torch.bincount(experts, minlength=E)
        rank = torch.arange(len(held), device=held.device) - (counts.cumsum(0) - counts)[experts]
        last = rank == self.places - 1
        self.prices[experts[last]] = self.offered[held[last]]
        self.owner[held[rank >= self.places]] = E

    def release(self, step: float) -> None:
        """Take the places from all who would gain more than a step elsewhere; the others hold theirs at its price."""
        E, T = self.values.shape[1], len(self.values)
        owner = self.owner[:T]
        net = self.held - torch.cat([self.prices, self.prices.new_full((1,), torch.inf)])[owner]
        best = (self.worth - self.prices[self.listed]).amax(1).maximum(self.others)
        owner[net < best - step] = E
        self.owner[T:] = E
        kept = (owner < E).nonzero().squeeze(1)
        self.offered[kept] = self.prices[owner[kept]]


def _below_best(values: Tensor) -> Tensor:
    """Values relative to the largest of the row, no lower than -FLOOR. A copy."""
    bounded = values.clamp(-1e30, 1e30)
    return bounded.sub_(bounded.amax(dim=1, keepdim=True)).clamp_(min=-FLOOR)


def _rows(values: Tensor) -> int:
    return max(1, CHUNK // values.shape[1])


def _starting_prices(values: Tensor) -> tuple[Tensor, float]:
    """Prices float64 [E] that nearly balance a sample of tokens, least 0, and how far off they may be."""
    T, E = values.shape
    sample = min(T, max(1, SAMPLE // E))
    below = _below_best(values[torch.arange(sample, device=values.device) * T // sample])
    spread = -float(below.topk(-(-E // 4), dim=1).values[:, -1].double().mean())
    prices = below.new_zeros(E)
    if spread == 0.0:
        return prices.double(), 0.0
    for heat in (spread / 4, spread / 16):
        net = below - prices
        kernel = net.sub_(net.amax(dim=1, keepdim=True)).div_(heat).clamp_(min=-60.0).exp_()
        share = below.new_ones(E)
        for _ in range(STARTING_ROUNDS):
            share = sample / (E * (kernel.T @ (1 / (kernel @ share))))
        prices = prices - heat * share.log()
    prices = prices.double()
    return prices - prices.min(), spread / 16
