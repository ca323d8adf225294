"""The page's section on recorded traces: load by layer, experts by domain, experts by token. No torch.

Everything is counted first and drawn from the counts: a trace of a million tokens is as small on the page as one
of a thousand. The heat map is one SVG path a colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moebench.trace_file import Trace, read_trace

Array = NDArray[Any]

# Load of an expert over the mean load: upper ends of the bands between "never" and the last, and what they are called.
BANDS = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)
LABELS = ("none", "under ¼", "¼ to ½", "½ to 0.8", "0.8 to 1.25", "1.25 to 2", "2 to 4", "over 4")
MOST_COLUMNS = 512  # of the heat map; more experts are drawn in groups of neighbours
ALL_EXPERTS = 16  # of the domain table; of more experts those that tell domains apart most
MOST_DOMAINS = 40
MOST_TOKENS = 12
FREQUENT = 4000  # tokens looked at, the most frequent ones
LEAST_SEEN = 10
Z95 = 1.96
VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}


def trace_sections(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """What the template shows of each trace.

    Raises:
        ValueError: a file is no trace, in one line.
    """
    return [section(read_trace(path), path.name) for path in paths]


def section(trace: Trace, name: str) -> dict[str, Any]:
    """One trace's facts, heat map, and tables of its first, middle and last layer."""
    facts, counts = trace.facts, load_counts(trace)
    count = len(facts.layers)
    chosen = sorted({0, count // 2, count - 1})
    return {
        "name": name,
        "facts": facts,
        "tokens": len(trace.tokens),
        "domains": list(zip(facts.domains, np.bincount(trace.domains, minlength=len(facts.domains)), strict=True)),
        "heat": heat(counts, facts.layers),
        "layers": _rows(counts, facts.layers),
        "by_domain": [by_domain(trace, at) for at in chosen] if len(facts.domains) > 1 else [],
        "by_token": [by_token(trace, at) for at in chosen],
        "least_seen": LEAST_SEEN,
    }


def layer_rows(trace: Trace) -> list[dict[str, Any]]:
    """One flat row a layer: how its load falls on experts."""
    return _rows(load_counts(trace), trace.facts.layers)


def load_counts(trace: Trace) -> Array:
    """Tokens of each expert, int64 [L, E]."""
    E = trace.facts.routed_experts
    return np.stack([np.bincount(ids.reshape(-1), minlength=E) for ids in trace.experts])


def gini(counts: Array) -> float:
    """Gini coefficient of the loads of one layer: 0 where all experts have the same, near 1 where one has all."""
    loads, E = np.sort(counts.astype(np.float64)), len(counts)
    return float((2 * np.arange(1, E + 1) - E - 1) @ loads / (E * loads.sum()))


def _rows(counts: Array, layers: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer,
            "busiest": int(load.argmax()),
            "max_over_mean": float(load.max() / load.mean()),
            "idlest": int(load.argmin()),
            "min_over_mean": float(load.min() / load.mean()),
            "gini": gini(load),
            "idle_experts": int((load == 0).sum()),
        }
        for layer, load in zip(layers, counts, strict=True)
    ]


# Load by layer


def heat(counts: Array, layers: Sequence[int]) -> dict[str, Any]:
    """The heat map of layers by experts: one SVG path for each band, in units of cells."""
    group = -(-counts.shape[1] // MOST_COLUMNS)
    relative = _grouped(counts / counts.mean(axis=1, keepdims=True), group)
    bands = _band(relative)
    rows, columns = bands.shape
    step = max(1, -(-rows // 16))
    return {
        "rows": rows,
        "columns": columns,
        "group": group,
        "paths": [(band, _path(bands == band)) for band in range(len(LABELS)) if (bands == band).any()],
        "labels": list(enumerate(LABELS)),
        "ticks": [(row, layers[row]) for row in range(0, rows, step)],
    }


def _grouped(relative: Array, group: int) -> Array:
    """Means over groups of neighbouring experts; the last may hold fewer."""
    starts = np.arange(0, relative.shape[1], group)
    sizes = np.diff(np.append(starts, relative.shape[1]))
    return np.add.reduceat(relative, starts, axis=1) / sizes


def _band(relative: Array) -> Array:
    return np.where(relative == 0, 0, np.searchsorted(BANDS, relative, side="left") + 1)


def _path(cells: Array) -> str:
    """Runs of neighbouring cells of one colour, each a rectangle."""
    edges = np.diff(cells.astype(np.int8), axis=1, prepend=0, append=0)
    rows, starts = (edges == 1).nonzero()
    ends = (edges == -1).nonzero()[1]
    runs = zip(rows.tolist(), starts.tolist(), (ends - starts).tolist(), strict=True)
    return "".join(f"M{x} {y}h{width}v1h-{width}z" for y, x, width in runs)


# Experts by domain


def by_domain(trace: Trace, at: int) -> dict[str, Any]:
    """How each domain's picks fall on experts, beside all picks, in one layer."""
    facts, ids = trace.facts, trace.experts[at].astype(np.int64)
    E, n = facts.routed_experts, len(facts.domains)
    counts = np.bincount((trace.domains.astype(np.int64)[:, None] * E + ids).reshape(-1), minlength=n * E)
    counts = counts.reshape(n, E)
    overall = counts.sum(axis=0) / counts.sum()
    present = counts.sum(axis=1) > 0
    shares = counts[present] / counts[present].sum(axis=1, keepdims=True)
    shown = np.arange(E)
    if E > ALL_EXPERTS:
        shown = np.sort(np.argsort(-np.ptp(shares, axis=0), kind="stable")[:ALL_EXPERTS])
    names = [name for name, there in zip(facts.domains, present, strict=True) if there]
    lines = [
        {
            "domain": name,
            "distance": float(np.abs(share - overall).sum() / 2),
            "cells": _cells(share, overall, total, shown),
        }
        for name, share, total in zip(names[:MOST_DOMAINS], shares, counts[present].sum(axis=1), strict=False)
    ]
    return {
        "layer": facts.layers[at],
        "experts": shown.tolist(),
        "selected": len(shown) < E,
        "overall": [float(overall[e]) for e in shown],
        "lines": lines,
        "more": max(0, len(names) - MOST_DOMAINS),
    }


def _cells(share: Array, overall: Array, total: int, shown: Array) -> list[dict[str, Any]]:
    """Shares, with a band where an even domain would give the expert enough picks for the ratio to mean something."""
    told = overall * total >= LEAST_SEEN
    bands = _band(np.divide(share, overall, out=np.zeros_like(share), where=told))
    return [{"share": float(share[e]), "band": int(bands[e]) if told[e] else None} for e in shown]


# Experts by token


def by_token(trace: Trace, at: int) -> dict[str, Any]:
    """The frequent tokens that go to one expert most more than all tokens do, in one layer.

    A token's share is that of its occurrences that have the expert among their K. Tokens are ranked by the lower end of
    the share's 95 % interval (Wilson) over the expert's share of all tokens, so that few occurrences weigh little.
    """
    facts, ids = trace.facts, trace.experts[at].astype(np.int64)
    E = facts.routed_experts
    overall = np.bincount(ids.reshape(-1), minlength=E) / len(ids)
    found, inverse, seen = np.unique(trace.tokens, return_inverse=True, return_counts=True)
    frequent = np.argsort(-seen, kind="stable")[:FREQUENT]
    frequent = frequent[seen[frequent] >= LEAST_SEEN]
    place = np.full(len(found), -1)
    place[frequent] = np.arange(len(frequent))
    row = place[inverse.reshape(-1)]
    pairs = (row[:, None] * E + ids)[row >= 0]
    shares = np.bincount(pairs.reshape(-1), minlength=len(frequent) * E).reshape(-1, E) / seen[frequent][:, None]
    excess = _wilson_low(shares, seen[frequent][:, None]) - overall
    best = excess.argmax(axis=1) if len(frequent) else np.zeros(0, dtype=np.int64)
    order = np.argsort(-excess[np.arange(len(frequent)), best], kind="stable")[:MOST_TOKENS]
    lines = [
        {
            "token": token_text(trace, int(found[frequent[at]])),
            "id": int(found[frequent[at]]),
            "seen": int(seen[frequent[at]]),
            "expert": int(best[at]),
            "share": float(shares[at, best[at]]),
            "overall": float(overall[best[at]]),
        }
        for at in order
    ]
    return {"layer": facts.layers[at], "lines": lines}


def _wilson_low(share: Array, n: Array) -> Array:
    """Lower end of the 95 % interval of a share of n (Wilson 1927)."""
    z2 = Z95**2 / n
    low: Array = (share + z2 / 2 - Z95 * np.sqrt(share * (1 - share) / n + z2 / (4 * n))) / (1 + z2)
    return low


def token_text(trace: Trace, token: int) -> str:
    """A token as it can be seen: spaces and line ends as signs, control and direction codes as \\u escapes."""
    text = trace.texts.get(token)
    if not text:
        return f"#{token}"
    return "".join(VISIBLE.get(c) or (c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)
