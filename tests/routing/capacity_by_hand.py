"""Who keeps an expert's slots, one assignment at a time: shares nothing with moebench.routing.capacity."""

from __future__ import annotations

import torch
from torch import Tensor

Kept = list[list[int]]


def turns_of(ids: Tensor, weights: Tensor, order: str) -> list[tuple[int, int]]:
    """(token, pick) of every wanted assignment, in the order of their turns."""
    rows, values = ids.tolist(), weights.tolist()
    wanted = [(t, k) for t, row in enumerate(rows) for k, expert in enumerate(row) if expert >= 0]
    best = [max(row) for row in values]
    keys = {
        "position": lambda tk: (tk[0], tk[1]),
        "choice": lambda tk: (tk[1], tk[0]),
        "probability": lambda tk: (-values[tk[0]][tk[1]], tk[0], tk[1]),
        "batch_priority": lambda tk: (tk[1], -best[tk[0]], tk[0]),
    }
    return sorted(wanted, key=keys[order])


def kept_by_hand(ids: Tensor, weights: Tensor, slots: int, order: str) -> Kept:
    """The ids that are kept, -1 elsewhere."""
    taken: dict[int, int] = {}
    kept = [[-1] * ids.shape[1] for _ in range(len(ids))]
    for t, k in turns_of(ids, weights, order):
        expert = int(ids[t, k])
        if taken.get(expert, 0) < slots:
            taken[expert] = taken.get(expert, 0) + 1
            kept[t][k] = expert
    return kept


def kept_by_device(ids: Tensor, weights: Tensor, per_device: int, budget: int, exempt: list[bool]) -> Kept:
    """DeepSeek-V2: each device drops its smallest weights until the budget is met, never those of exempt tokens."""
    kept = [list(row) for row in ids.tolist()]
    devices = {expert // per_device for row in kept for expert in row if expert >= 0}
    for device in devices:
        mine = [(t, k) for t, row in enumerate(kept) for k, expert in enumerate(row) if expert // per_device == device]
        open_to_it = [tk for tk in mine if not exempt[tk[0]]]
        droppable = sorted(open_to_it, key=lambda tk: (float(weights[tk]), -tk[0], -tk[1]))
        for t, k in droppable[: max(0, len(mine) - budget)]:
            kept[t][k] = -1
    return kept


def draw(tokens: int, top_k: int, experts: int, skew: float, seed: int, unwanted: float = 0.0) -> tuple[Tensor, Tensor]:
    """Distinct ids of a token by a skewed popularity, falling weights with many ties; some second picks unwanted."""
    generator = torch.Generator().manual_seed(seed)
    popularity = torch.arange(1, experts + 1).double() ** -skew
    ids = torch.multinomial(popularity.expand(tokens, experts), top_k, generator=generator)
    weights = torch.randint(1, 8, (tokens, top_k), generator=generator).float().sort(dim=1, descending=True).values / 8
    out = torch.rand(tokens, top_k, generator=generator) < unwanted
    return ids.masked_fill(out, -1), weights.masked_fill(out, 0)
