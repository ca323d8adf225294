"""The gate in Python floats and loops, and the cases its tests sweep."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moebench_kernels import topk_gate_torch

POINTWISE: dict[str, Callable[[float], float]] = {
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "sqrt_softplus": lambda z: math.sqrt(max(z, 0.0) + math.log1p(math.exp(-abs(z)))),
}
# Two float32 sums of scores this close may compare either way.
ROUNDING = 2e-6


def scores(z: Sequence[float], scoring: str) -> list[float]:
    """One token's scores, each over all of `z`."""
    if scoring != "softmax":
        return [POINTWISE[scoring](value) for value in z]
    total = math.fsum(math.exp(value - max(z)) for value in z)
    return [math.exp(value - max(z)) / total for value in z]


def best(values: Sequence[float], n: int) -> tuple[list[int], bool]:
    """The n largest, ties to the lower place, and whether float32 must agree: true ties and clear gaps only."""
    ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))
    gaps = [values[a] - values[b] for a, b in itertools.pairwise(ranked[: n + 1])]
    return ranked[:n], not any(0 < gap < ROUNDING for gap in gaps)


def gate(
    z: list[float], K: int, bias: list[float] | None = None, **options: Any
) -> tuple[list[int], list[float], bool]:
    """One token: ids, weights, and whether rounding to float32 could not have changed a choice."""
    scoring, first = options["scoring"], options["order"] == "score_first"
    s, shift = scores(z, scoring), bias or [0.0] * len(z)
    # Without a bias the choice is by logit, the groups' sums by score.
    by = [a + b for a, b in zip(s if first and bias else z, shift, strict=True)]
    worth = by if options["group_score"] == "max" or not first else [a + b for a, b in zip(s, shift, strict=True)]
    size = len(z) // options["n_groups"]
    n_best = 1 if options["group_score"] == "max" else 2
    of_group = [sum(sorted(worth[g : g + size])[-n_best:]) for g in range(0, len(z), size)]
    groups, clear_groups = best(of_group, options["topk_groups"])
    among = [g * size + i for g in sorted(groups) for i in range(size)]
    picked, clear = best([by[e] for e in among], K)
    ids = [among[i] for i in picked]
    weights = [s[e] for e in ids] if first or scoring != "softmax" else scores([z[e] for e in ids], scoring)
    total = math.fsum(weights) + 1e-20 if options["renormalise"] else 1.0
    plain = bias is None  # logits are compared as they are
    return ids, [options["scale"] * w / total for w in weights], clear_groups and (plain or clear)


def pairwise(factors: dict[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Cases in which every two values of every two factors meet: the best of some random candidates, greedily."""
    chance = random.Random(seed)
    names = list(factors)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    cases = []
    while missing:
        a, i, b, j = min(missing)
        candidates = [{name: chance.randrange(len(factors[name])) for name in names} | {a: i, b: j} for _ in range(60)]

        def meets(case: dict[str, int]) -> set[tuple[str, int, str, int]]:
            return {(p, case[p], q, case[q]) for p, q in itertools.combinations(names, 2)}

        chosen = max(candidates, key=lambda case: len(meets(case) & missing))
        missing -= meets(chosen)
        cases.append({name: factors[name][place] for name, place in chosen.items()})
    return cases


FACTORS: dict[str, Sequence[Any]] = {
    "E": (1, 2, 8, 60, 64, 160, 257),
    "K": (1, 2, 3, 4, 5, 6, 7, 8, 16),
    "T": (0, 1, 3, 33, 129),
    "scoring": ("softmax", "sigmoid", "sqrt_softplus"),
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "groups": ("none", "max", "top2_sum"),
    "order": ("score_first", "topk_first"),
    "bias": (False, True),
    "renormalise": (False, True),
}


def grouped(E: int, K: int, groups: str) -> dict[str, Any]:
    """About eight groups of which about half are kept, as far as E and K allow."""
    least = 2 if groups == "top2_sum" else 1
    counts = [n for n in range(1, E + 1) if E % n == 0 and E // n >= least]
    n_groups = min(counts, key=lambda n: abs(n - 8)) if groups != "none" and counts else 1
    kept = max(-(-K * n_groups // E), (n_groups + 1) // 2)
    return {"n_groups": n_groups, "topk_groups": kept, "group_score": groups if n_groups > 1 else "max"}


def problem(case: dict[str, Any], device: torch.device) -> tuple[Tensor, int, dict[str, Any]]:
    """logits, K and the options of a case; K is cut to E."""
    E, K = case["E"], min(case["K"], case["E"])
    logits = (torch.randn(case["T"], E) * 2).to(case["dtype"]).to(device)
    options = {name: case[name] for name in ("scoring", "order", "renormalise")} | grouped(E, K, case["groups"])
    # The softmax of many experts is small: a bias of its size, or it alone would choose.
    size = 1 / E if case["scoring"] == "softmax" and case["order"] == "score_first" else 0.3
    options["bias"] = torch.randn(E, device=device) * size if case["bias"] else None
    return logits, K, options | {"scale": 2.5}


def label(case: dict[str, Any]) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


def reference64(logits: Tensor, K: int, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """`topk_gate_torch` in float64 on the CPU; logits may want a gradient."""
    bias = options["bias"]
    return topk_gate_torch(logits, K, **options | {"bias": None if bias is None else bias.double().cpu()})
