"""Balanced assignment by auction: the largest sum of values with T/E tokens an expert, exactly balanced.

    maximise sum_t z[t, a(t)]  subject to  floor(T/E) <= |{t: a(t) = e}| <= ceil(T/E) for every e

An expert has C = ceil(T/E) alike places, and a price p: the least bid among them once all are taken. All tokens without
a place bid at once: with v = z[t] - p, its best v1 at expert e and its second best v2 at another expert, a token offers
p_e + v1 - v2 + eps; each expert keeps its C largest offers (ties: the earlier token). Prices only rise, so this ends,
and then nobody would gain more than eps elsewhere: the sum is within eps * T of the largest (Bertsekas 1979; Bertsekas
and Castanon 1989 for alike places). Where E does not divide T, E * C - T placeholders worth nothing bid too, at most
one an expert, for the cheapest places. Where T < E none is needed, but places that stay free must have prices near 0.

What makes it fast is no part of that proof, which holds from any prices: they start from entropic transport on a sample
of tokens; equal values are told apart by a term below eps; a token looks at a short list of experts, with a bound on
all others that stays true as prices rise; and the last few get their places by shortest paths (`augment`), as soon as
that costs no more than the bidding so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.routing.augment import Tenants, below_best, chunks, complete

RESOLUTION = 1e-3  # eps; times the range of the values where that is under 1
TIE = 1 / 4  # of eps: the largest term that tells equal values apart; bids rise by the rest
LISTED = 64  # experts a token looks at before it looks at all again
FEW = 1 / 8  # of the tokens without a place: prices are about right
PROBE = 32  # rounds in which the starting prices should get there; else eps starts large and falls
SHRINK = 1 / 8  # of a falling eps
SAMPLE = 1 << 25  # values that starting prices are fitted to
COOLING = 1 / 4  # of the temperature of the fit, down to 8 eps
FIT_ROUNDS = 12  # at each temperature
PATIENCE = 4  # a path costs about (T + E^2) / 4 of effort
OVERHEAD = 1 << 15  # of a round, beside the tokens


def resolution(values: Tensor) -> float:
    """eps: 1e-3 * min(1, range of the values as they are read), of `balanced_assignment`.

    Args:
        values: [T, E].
    """
    rows = torch.arange(len(values), device=values.device)
    lowest = min((float(below_best(values[part]).min()) for part in chunks(values, rows)), default=0.0)
    return RESOLUTION * min(1.0, max(-lowest, 1e-6))


def balanced_assignment(values: Tensor) -> Tensor:
    """One expert a token, every expert floor(T/E) or ceil(T/E) tokens, the sum of values within eps * T of the largest.

    Args:
        values: [T, E], float32 or float64, no NaN. They are read relative to the token's largest, no further than 1000
            below it (so -inf is 1000 below), with the rounding of their dtype.

    Returns:
        int64 [T]. Deterministic.
    """
    T, E = values.shape
    if E == 1 or T == 0:
        return torch.zeros(T, dtype=torch.int64, device=values.device)
    values = values.detach()
    if T < E:
        return _with_room(values, resolution(values) / 2)
    everyone = E * -(-T // E)
    eps = resolution(values) * T / everyone  # placeholders have their share of the gap
    book = _open(values, _starting_prices(values, 8 * eps), everyone)
    _find_prices(book, eps)
    return _finish(book, eps)


def _with_room(values: Tensor, eps: float) -> Tensor:
    """T < E. The free places' prices add to the gap: fitted ones serve if they hardly do, and zero always serves."""
    T, E = values.shape
    fitted = (_starting_prices(values, 8 * eps) - 16 * eps).clamp_(min=0.0)
    for prices in (fitted, torch.zeros_like(fitted)):
        book = _open(values, prices, T)
        book.start(eps)
        ids = _finish(book, eps)
        free = torch.bincount(ids, minlength=E) == 0
        if float(book.prices[free].sum()) <= eps * T:
            break
    return ids


def _finish(book: _Book, eps: float) -> Tensor:
    """Bid until paths are cheaper; int64 [T]."""
    T, E = book.values.shape
    book.effort = T + OVERHEAD
    while len(book.waiting()) * (T + E * E) > PATIENCE * book.effort:
        book.bid(eps)
    complete(book)
    return book.owner[:T]


def _find_prices(book: _Book, eps: float) -> None:
    """Start at eps; if that would take long, come down to it by larger steps."""
    book.start(eps)
    if book.settle(eps, PROBE):
        return
    step = float(book.prices.max()) * SHRINK
    while step > eps:  # only for the prices: some may stay without a place
        book.start(step)
        book.settle(step)
        step *= SHRINK
    book.start(eps)


@dataclass
class _Book(Tenants):
    """Tenants and their bids.

    Attributes:
        offered: float64 [T + placeholders], the bid for the place held.
        listed: int64 [T, M], experts a token looks at.
        worth: float64 [T, M], its values there, with the term for ties.
        others: float64 [T], a bound on v at all other experts, at any prices from now on.
        ties: float64 [2E], the terms that tell equal values apart: expert e's for token t at e + t mod E.
        effort: numbers looked at so far, roughly.
    """

    offered: Tensor
    listed: Tensor
    worth: Tensor
    others: Tensor
    ties: Tensor
    effort: int

    def start(self, step: float) -> None:
        """Bids are to rise by a step from now on; who would gain more than that elsewhere gives up its place."""
        T, E = self.values.shape
        # Token t reads this circle from place t: equal values then fall on all experts alike.
        circle = torch.randperm(E, generator=torch.Generator().manual_seed(0)).to(self.prices) * (step * TIE / E)
        self.ties = torch.cat([circle, circle])
        for rows in chunks(self.values, torch.arange(T, device=circle.device)):
            self._look(rows)
        self.owner[T:] = E
        for rows in chunks(self.values, (self.owner[:T] < E).nonzero().squeeze(1)):
            self._keep(rows, step * (1 - TIE))

    def settle(self, step: float, rounds: float = math.inf) -> bool:
        """Bid until few are without a place; False if that takes more rounds."""
        while len(self.waiting()) > FEW * len(self.values):
            if rounds <= 0:
                return False
            self.bid(step)
            rounds -= 1
        return True

    def bid(self, step: float) -> None:
        """One round: all who have no place bid, and each expert keeps the best."""
        T, waiting = len(self.values), self.waiting()
        self.effort += T + OVERHEAD
        chosen, offers = self._offers(waiting[waiting < T], step)
        cheap, offer = self._cheapest(int((waiting >= T).sum()), step)
        self._leave_to_new_placeholders(cheap)
        self._award(waiting, torch.cat([chosen, cheap]), torch.cat([offers, offer]))

    def _keep(self, rows: Tensor, step: float) -> None:
        owner = self.owner[rows]
        net = below_best(self.values[rows]).gather(1, owner.unsqueeze(1)).squeeze(1) - self.prices[owner]
        best = self._net(rows).amax(dim=1)  # the lists are new
        self.offered[rows] = self.prices[owner]
        self.owner[rows[net < best - step]] = len(self.prices)

    def _look(self, rows: Tensor) -> None:
        """Make the lists of these tokens anew, at the prices of now."""
        E, M = self.values.shape[1], self.listed.shape[1]
        self.effort += len(rows) * E
        below = below_best(self.values[rows])
        net = below - self.prices.to(below) + self.ties.to(below).unfold(0, E, 1)[rows % E]
        best = net.topk(min(M + 1, E), dim=1)
        ids = best.indices[:, :M]
        self.listed[rows] = ids
        self.worth[rows] = below.gather(1, ids).double() + self.ties[ids + (rows % E).unsqueeze(1)]
        if M < E:
            rounding = 4 * torch.finfo(below.dtype).eps * float(self.prices.max())
            self.others[rows] = best.values[:, M].double() + rounding

    def _net(self, tokens: Tensor) -> Tensor:
        return self.worth[tokens] - self.prices[self.listed[tokens]]

    def _offers(self, tokens: Tensor, step: float) -> tuple[Tensor, Tensor]:
        """The experts that tokens want most, and their bids."""
        best = self._net(tokens).topk(2, dim=1)
        stale = best.values[:, 1] < self.others[tokens]
        if stale.any():
            for rows in chunks(self.values, tokens[stale]):
                self._look(rows)
            best = self._net(tokens).topk(2, dim=1)
        chosen = self.listed[tokens].gather(1, best.indices[:, :1]).squeeze(1)
        return chosen, self.prices[chosen] + best.values[:, 0] - best.values[:, 1] + step * (1 - TIE)

    def _cheapest(self, count: int, step: float) -> tuple[Tensor, Tensor]:
        """The experts with the cheapest places for placeholders, and one bid for all: what the next would cost."""
        E, T = len(self.prices), len(self.values)
        costs = self.prices.clone()
        hosted = self.owner[T:] < E
        costs[self.owner[T:][hosted]] = self.offered[T:][hosted]  # one a placeholder is in: it must be outbid
        lowest = costs.topk(count + 1, largest=False)
        return lowest.indices[:count], (lowest.values[-1] + step).expand(count)

    def _leave_to_new_placeholders(self, experts: Tensor) -> None:
        taken = torch.zeros(len(self.prices) + 1, dtype=torch.bool, device=experts.device)
        taken[experts] = True
        holders = self.owner[len(self.values) :]
        holders[taken[holders]] = len(self.prices)

    def _award(self, bidders: Tensor, chosen: Tensor, offers: Tensor) -> None:
        """Each expert keeps its C largest bids, old and new, and raises its price to the least of them."""
        E = len(self.prices)
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


def _open(values: Tensor, prices: Tensor, everyone: int) -> _Book:
    """Nobody has a place: neither tokens nor the placeholders that make them `everyone`."""
    T, E = values.shape
    places, M = -(-T // E), min(E, LISTED)
    return _Book(
        values,
        prices,
        owner=torch.full((everyone,), E, device=values.device),
        places=places,
        offered=prices.new_zeros(everyone),
        listed=torch.zeros(T, M, dtype=torch.int64, device=values.device),
        worth=prices.new_zeros(T, M),
        others=prices.new_full((T,), -torch.inf),
        ties=prices.new_zeros(2 * E),
        effort=0,
    )


def _starting_prices(values: Tensor, coolest: float) -> Tensor:
    """Prices at which a sample of tokens is nearly balanced, float64 [E], the least 0.

    Entropic transport (Sinkhorn's scaling): a token chooses as softmax((z - p) / heat), heat falling. T/E tokens an
    expert, or where T < E at most one, at prices of at least 0.
    """
    T, E = values.shape
    sample = min(T, max(1, SAMPLE // E))
    below = below_best(values[torch.arange(sample, device=values.device) * T // sample])
    prices, heat = below.new_zeros(E), -float(below.min()) / 16
    while heat > coolest:
        net = below - prices
        kernel = net.sub_(net.amax(dim=1, keepdim=True)).div_(heat).clamp_(min=-60.0).exp_()
        share = below.new_ones(E)
        for _ in range(FIT_ROUNDS):
            share = max(1.0, sample / E) / (kernel.T @ (1 / (kernel @ share)))
            if T < E:
                share = share.minimum((prices / heat).exp())
        prices = prices - heat * share.log()
        heat *= COOLING
    return (prices if T < E else prices - prices.min()).double()
