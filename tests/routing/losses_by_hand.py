"""The losses one token and one expert at a time, in plain numbers: shares nothing with moebench.routing.losses."""

from __future__ import annotations

import math

Rows = list[list[float]]
Ids = list[list[int]]


def fractions(probs: Rows, ids: Ids) -> tuple[list[float], list[float]]:
    """f and P of the tokens given."""
    E = len(probs[0])
    wanted = [expert for row in ids for expert in row if expert >= 0]
    f = [wanted.count(e) / max(1, len(wanted)) for e in range(E)]
    P = [sum(row[e] for row in probs) / len(probs) for e in range(E)]
    return f, P


def switch(probs: Rows, ids: Ids) -> float:
    f, P = fractions(probs, ids)
    return len(P) * sum(a * b for a, b in zip(f, P, strict=True))


def sequence_level(scores: Rows, ids: Ids, length: int) -> float:
    probs = [[value / sum(row) for value in row] for row in scores]
    starts = range(0, len(probs), length)
    return sum(switch(probs[s : s + length], ids[s : s + length]) for s in starts) / len(starts)


def gshard(probs: Rows, ids: Ids) -> float:
    E, S = len(probs[0]), len(probs)
    total = 0.0
    for e in range(E):
        first = sum(1 for row in ids if row[0] == e)
        total += first / S * sum(row[e] for row in probs) / S
    return total / E


def device_level(probs: Rows, ids: Ids, devices: int) -> float:
    """With DeepSeek's own f: E / (K T) times the count."""
    E, T, K = len(probs[0]), len(probs), len(ids[0])
    loss = 0.0
    for d in range(devices):
        mine = range(d * E // devices, (d + 1) * E // devices)
        f = [E / (K * T) * sum(row.count(e) for row in ids) for e in mine]
        P = [sum(row[e] for row in probs) / T for e in mine]
        loss += sum(f) / len(f) * sum(P)
    return loss


def communication(probs: Rows, ids: Ids, devices: int, limit: int) -> float:
    E, T = len(probs[0]), len(probs)
    loss = 0.0
    for d in range(devices):
        mine = range(d * E // devices, (d + 1) * E // devices)
        sent = sum(1 for row in ids if any(e in mine for e in row))
        loss += devices / (limit * T) * sent * sum(sum(row[e] for row in probs) / T for e in mine)
    return loss


def cv_squared(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


def load(clean: Rows, noisy: Rows, std: Rows, top_k: int, of_others: bool) -> float:
    E = len(clean[0])
    loads = []
    for e in range(E):
        total = 0.0
        for z, h, s in zip(clean, noisy, std, strict=True):
            rivals = [value for other, value in enumerate(h) if other != e or not of_others]
            threshold = sorted(rivals, reverse=True)[top_k - 1]
            total += 0.5 * (1 + math.erf((z[e] - threshold) / s[e] / math.sqrt(2)))
        loads.append(total)
    return cv_squared(loads)


def router_z(logits: Rows) -> float:
    return sum(math.log(sum(math.exp(z) for z in row)) ** 2 for row in logits) / len(logits)


def entropy(probs: list[float]) -> float:
    return -sum(p * math.log(p) for p in probs if p > 0)


def global_entropy(probs: Rows, least: float | None) -> float:
    spread = entropy(fractions(probs, [[]])[1])
    return -spread if least is None else max(0.0, math.log(least) - spread)


def orthogonality(weights: Rows) -> float:
    E = len(weights)
    pairs = [(a, b) for a in range(E) for b in range(E) if a != b]
    squared = 0.0
    for a, b in pairs:
        dot = sum(x * y for x, y in zip(weights[a], weights[b], strict=True))
        squared += dot**2 / (sum(x * x for x in weights[a]) * sum(y * y for y in weights[b]))
    return squared / len(pairs)
