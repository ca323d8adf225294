"""Routers that look at the whole batch, as loops over tokens and experts in Python numbers, and an exact assignment."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

LARGEST, FLOOR = 1e30, 1e3
Triples = list[tuple[int, int, float]]


def adversarial(tokens: int, experts: int, seed: int = 0) -> dict[str, Tensor]:
    """Logits by name, float32: random ones, and those that break careless code."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(tokens, experts, generator=generator)
    shared = torch.randn(experts, generator=generator)
    one_hot = torch.zeros(tokens, experts)
    one_hot[:, experts // 2] = 1.0
    masked = normal.clone()
    masked[:, experts // 2 :] = -torch.inf
    some_rows = normal.clone()
    some_rows[::3] = -torch.inf
    return {
        "normal": normal,
        "equal": torch.zeros(tokens, experts),
        "same rows": shared.expand(tokens, experts).contiguous() * 3,
        "one-hot": one_hot,
        "skewed": normal + 2 * shared,
        "ties": (normal * 2).round(),
        "huge": normal.sign() * 1e30,
        "large": normal * 300,
        "tiny": 5 + normal * 1e-4,
        "experts masked": masked,
        "rows masked": some_rows,
        "all -inf": torch.full((tokens, experts), -torch.inf),
    }


def softmax(row: list[float]) -> list[float]:
    bounded = [min(max(z, -LARGEST), LARGEST) for z in row]
    top = max(bounded)
    parts = [math.exp(z - top) for z in bounded]
    return [part / sum(parts) for part in parts]


def by_columns(z: list[list[float]], of_column: bool) -> list[list[float]]:
    """Softmax over experts, or over tokens."""
    if not of_column:
        return [softmax(row) for row in z]
    return [list(row) for row in zip(*(softmax(list(column)) for column in zip(*z, strict=True)), strict=True)]


def slots(tokens: int, experts: int, top_k: int) -> int:
    return min(tokens, max(1, math.floor(top_k * tokens / experts + 0.5)))


def experts_choose(values: list[list[float]], top_k: int) -> list[tuple[int, int]]:
    """(token, expert) by token: each expert's best, the earlier token where equal."""
    T, E = len(values), len(values[0])
    found = []
    for e in range(E):
        order = sorted(range(T), key=lambda t: (-values[t][e], t))
        found += [(t, e) for t in order[: slots(T, E, top_k)]]
    return sorted(found)


def expert_choice(z: list[list[float]], top_k: int, *, mesh: bool = False) -> Triples:
    s = by_columns(z, mesh)
    pairs = experts_choose(s, top_k)
    hits = [sum(t == token for t, _ in pairs) if mesh else 1 for token in range(len(z))]
    return [(t, e, s[t][e] / hits[t]) for t, e in pairs]


def batch_mask(z: list[list[float]], top_k: int, thresholds: list[float] | None = None) -> Triples:
    s = by_columns(z, False)
    if thresholds is None:
        pairs = experts_choose(s, top_k)
    else:
        pairs = [(t, e) for t in range(len(z)) for e in range(len(z[0])) if s[t][e] > thresholds[e]]
    kept = []
    for t in range(len(z)):
        experts = [e for token, e in pairs if token == t]
        for e, weight in zip(experts, softmax([z[t][e] for e in experts]) if experts else [], strict=True):
            kept.append((t, e, weight))
    return kept


def as_read(z: Tensor) -> np.ndarray:
    """Float64, relative to the token's best and at most 1000 below it, the difference in the dtype of z."""
    bounded = z.clamp(-LARGEST, LARGEST)
    return (bounded - bounded.max(dim=1, keepdim=True).values).clamp(min=-FLOOR).double().numpy()


def best_sum(z: Tensor) -> float:
    """The largest sum with floor(T/E) or ceil(T/E) tokens an expert: each expert's column once a place.

    Where E does not divide T, rows worth nothing fill up, and only into the last place of an expert.
    """
    T, E = z.shape
    places = -(-T // E)
    worth = np.zeros((E * places, E * places))
    worth[:T] = np.repeat(as_read(z), places, axis=1)
    if E * places > T and places > 1:
        worth[T:] = np.tile([-1e7] * (places - 1) + [0.0], E)
    rows, columns = linear_sum_assignment(worth, maximize=True)
    return float(worth[rows, columns].sum())


def sinkhorn(z: list[list[float]], tolerance: float, rounds: int) -> list[list[float]]:
    """The normalised matrix itself, in the order Megatron-LM takes: tokens, then experts, until d1 rests."""
    T, E = len(z), len(z[0])
    cost = [[math.exp(value - max(row)) for value in row] for row in z]
    d0, d1 = [1.0] * T, [1.0] * E
    for _ in range(rounds):
        d0 = [1 / T / sum(d1[e] * row[e] for e in range(E)) for row in cost]
        last = d1
        d1 = [1 / E / sum(d0[t] * cost[t][e] for t in range(T)) for e in range(E)]
        if sum(abs(a - b) for a, b in zip(last, d1, strict=True)) / E <= tolerance:
            break
    return [[d0[t] * cost[t][e] * d1[e] for e in range(E)] for t in range(T)]
