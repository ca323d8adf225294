"""The last places of a balanced assignment: shortest paths over experts, one for each who has none.

Someone without a place enters expert e0, whose cheapest leaver goes to e1, and so on to an expert with a free place.
A step from e to e' costs (z[t, e] - p_e) - (z[t, e'] - p_e') for the tenant t of e that loses least; within eps none is
negative. Prices then rise as in Dijkstra's algorithm, by how much nearer than the end of the path an expert is, so that
nobody gains more than eps elsewhere, as before (the successive shortest paths of minimum-cost flow).
With few left and many places an expert that is far less work than bidding: a path looks at E^2 numbers, or few more.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

FLOOR = 1e3  # a value this far below the token's best counts as no lower: -inf must have a price
TOGETHER = 64  # experts whose leavers are looked at together
CHUNK = 1 << 24  # values looked at together, so that no second [T, E] is in memory


@dataclass
class Tenants:
    """Who is where. Tokens are 0 to T - 1; placeholders, worth 0 anywhere and at most one an expert, follow.

    Attributes:
        values: [T, E].
        prices: float64 [E].
        owner: int64 [T + placeholders], the expert, or E for none.
        places: C, of each expert; E * C is T + placeholders, or T < E and there are none.
    """

    values: Tensor
    prices: Tensor
    owner: Tensor
    places: int

    def waiting(self) -> Tensor:
        """Who has no place, int64 [N]."""
        return (self.owner == len(self.prices)).nonzero().squeeze(1)

    def hosts(self) -> Tensor:
        """Which experts have a placeholder, bool [E]."""
        return torch.bincount(self.owner[len(self.values) :], minlength=len(self.prices) + 1)[:-1] > 0


def below_best(values: Tensor) -> Tensor:
    """A copy of the values, relative to the largest of the row and no lower than -FLOOR."""
    bounded = values.clamp(-1e30, 1e30)
    return bounded.sub_(bounded.amax(dim=1, keepdim=True)).clamp_(min=-FLOOR)


def chunks(values: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """Rows of [T, E], in parts that fit in memory."""
    return torch.split(rows, max(1, CHUNK // values.shape[1]))


def complete(tenants: Tenants) -> None:
    """Give everyone a place; one path each."""
    left = tenants.waiting().tolist()
    if not left:
        return
    E, T = len(tenants.prices), len(tenants.values)
    losses = tenants.prices.new_full((E, E), torch.inf)
    for rows in chunks(tenants.values, (tenants.owner[:T] < E).nonzero().squeeze(1)):
        owner = tenants.owner[rows].unsqueeze(1)
        losses.scatter_reduce_(0, owner.expand(-1, E), _losses(tenants.values[rows], owner), "amin")
    for one in left:
        _place(tenants, losses, one)


def _losses(values: Tensor, owner: Tensor) -> Tensor:
    """What tokens lose by going from `owner` [N, 1] to each expert, float64 [N, E]."""
    below = below_best(values).double()
    return below.gather(1, owner) - below


def _place(tenants: Tenants, losses: Tensor, one: int) -> None:
    E, prices = len(tenants.prices), tenants.prices
    full = torch.bincount(tenants.owner, minlength=E + 1)[:E] >= tenants.places
    hosts = tenants.hosts()
    if one < len(tenants.values):
        net = below_best(tenants.values[one : one + 1])[0].double() - prices
    else:
        net = torch.where(hosts, -torch.inf, -prices)
    far, before = _shortest(losses, prices, full, hosts, net.amax() - net)
    end = int(torch.where(full, torch.inf, far).argmin())
    prices += (far[end] - far).clamp_(min=0.0)
    path = [end]
    while (previous := int(before[path[-1]])) >= 0:
        path.append(previous)
    for there, here in pairwise(path):
        tenants.owner[_leaver(tenants, here, there, bool(hosts[here] and not hosts[there]))] = there
    tenants.owner[one] = path[-1]
    for expert in path:
        losses[expert] = torch.inf
        tokens = (tenants.owner[: len(tenants.values)] == expert).nonzero().squeeze(1)
        if len(tokens):
            losses[expert] = _losses(tenants.values[tokens], torch.full_like(tokens, expert).unsqueeze(1)).amin(dim=0)


def _shortest(losses: Tensor, prices: Tensor, full: Tensor, hosts: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
    """Distances [E] from the start, exact up to the nearest free place, and the expert before each (-1: the start).

    Experts are looked at nearest first, some at a time, and again if they came nearer.
    """
    before = torch.full_like(full, -1, dtype=torch.int64)
    pending = full.clone()
    while True:
        front = (pending & (far < far[~full].min())).nonzero().squeeze(1)
        if len(front) == 0:
            return far, before
        front = front[far[front].topk(min(len(front), TOGETHER), largest=False).indices]
        cost = losses[front]
        # A placeholder loses nothing, but may not join another one.
        cost = torch.where(hosts[front].unsqueeze(1) & ~hosts, cost.clamp(max=0.0), cost)
        cost += prices - prices[front].unsqueeze(1)
        cost = cost.clamp_(min=0.0).add_(far[front].unsqueeze(1))
        nearest = cost.amin(dim=0)
        nearer = (nearest < far).nonzero().squeeze(1)
        before[nearer] = front[cost[:, nearer].argmin(dim=0)]
        far = torch.minimum(far, nearest)
        pending[front] = False
        pending[nearer] = full[nearer]


def _leaver(tenants: Tenants, here: int, there: int, placeholder_may: bool) -> int:
    """Who loses least by going from one expert to another."""
    T = len(tenants.values)
    inside = (tenants.owner == here).nonzero().squeeze(1)
    tokens = inside[inside < T]
    below = below_best(tenants.values[tokens]).double()
    loss = below[:, here] - below[:, there]
    if placeholder_may and (len(tokens) == 0 or float(loss.min()) > 0.0):
        return int(inside[inside >= T][0])
    return int(tokens[loss.argmin()])
