"""The answers, in Python floats and loops: shared with no implementation. And what the tests compare with."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Vector = list[float]

SCALARS: dict[str, Callable[[float], float]] = {
    "silu": lambda z: z / (1 + math.exp(-z)),
    "gelu": lambda z: z * (1 + math.erf(z / math.sqrt(2))) / 2,
    "relu": lambda z: max(z, 0.0),
}
GATES = {"swiglu": "silu", "geglu": "gelu"}


def clamped(gate: float, up: float) -> float:
    """gpt-oss's gated activation."""
    gate, up = min(gate, 7.0), max(-7.0, min(up, 7.0))
    return gate / (1 + math.exp(-1.702 * gate)) * (up + 1)


def matvec(matrix: list[Vector], vector: Vector) -> Vector:
    """matrix @ vector."""
    return [math.fsum(m * v for m, v in zip(row, vector, strict=True)) for row in matrix]


def expert(x: Vector, w_gate_up: list[Vector], activation: str) -> Vector:
    """The hidden vector of one expert."""
    z = matvec(w_gate_up, x)
    pairs = list(zip(z[: len(z) // 2], z[len(z) // 2 :], strict=False))
    if activation == "clamped_swiglu":
        return [clamped(gate, up) for gate, up in pairs]
    if activation in GATES:
        return [SCALARS[GATES[activation]](gate) * up for gate, up in pairs]
    return [SCALARS[activation](value) for value in z]


def moe(x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, activation: str) -> Tensor:
    """y [T, D] float64, one assignment at a time; ids outside 0..E-1 are dropped."""
    y = torch.zeros(x.shape, dtype=torch.float64).tolist()
    up, down, E = w_gate_up.tolist(), w_down.tolist(), w_gate_up.shape[0]
    for t, (row, chosen, gates) in enumerate(zip(x.tolist(), ids.tolist(), weights.tolist(), strict=True)):
        for e, weight in zip(chosen, gates, strict=True):
            if 0 <= e < E:
                answer = matvec(down[e], expert(row, up[e], activation))
                y[t] = [total + weight * value for total, value in zip(y[t], answer, strict=True)]
    return torch.tensor(y, dtype=torch.float64).reshape(x.shape)


def random_ids(T: int, E: int, K: int, dropped: float = 0.0) -> Tensor:
    """int32 [T, K], distinct in a row, a share of them dropped (as -1, or as an id that is too large)."""
    ids = torch.rand(T, E).argsort(dim=1)[:, :K].int()
    fate = torch.rand(T, K)
    ids = ids.masked_fill(fate < dropped / 2, -1)
    return ids.masked_fill((fate >= dropped / 2) & (fate < dropped), E + 3)


def cheap_cover(
    factors: dict[str, Sequence[Any]], cost: Callable[[dict[str, Any]], float], seed: int = 0
) -> list[dict[str, Any]]:
    """Cases in which every two values of every two factors meet, greedily the most new meetings for their cost."""
    chance = random.Random(seed)
    missing = {
        (a, x, b, y)
        for a, b in itertools.combinations(factors, 2)
        for x, y in itertools.product(factors[a], factors[b])
    }
    cases = []
    while missing:
        a, x, b, y = min(missing, key=str)
        draws = [{name: chance.choice(values) for name, values in factors.items()} | {a: x, b: y} for _ in range(100)]

        def meetings(case: dict[str, Any]) -> set[tuple[str, Any, str, Any]]:
            return {(p, case[p], q, case[q]) for p, q in itertools.combinations(factors, 2)}

        cases.append(max(draws, key=lambda case: len(meetings(case) & missing) / cost(case)))
        missing -= meetings(cases[-1])
    return cases


def leaf(value: Tensor, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A leaf of its own that wants a gradient, whether or not dtype and device change anything."""
    return value.detach().clone().to(device, dtype).requires_grad_()


# Relative error in the Frobenius norm. float16 rounds at 2**-11 = 4.9e-4 a few times over, bfloat16 at 2**-8;
# the interpreter truncates to bfloat16 instead of rounding, which doubles it.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}


def assert_close(name: str, found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Frobenius and largest error, against the true answer's norm and largest element."""
    assert found.shape == wanted.shape, f"{name}: shape {list(found.shape)}, wanted {list(wanted.shape)}"
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    assert torch.isfinite(found).all(), f"{name}: not finite"
    if wanted.numel() == 0:
        return
    error, size = (found - wanted).norm().item(), wanted.norm().item()
    assert error <= tolerance * size, f"{name}: relative error {error / max(size, 1e-300):.2e} > {tolerance:.0e}"
    largest, top = (found - wanted).abs().max().item(), wanted.abs().max().item()
    assert largest <= 2 * tolerance * top, f"{name}: an element is off by {largest:.2e} where the largest is {top:.2e}"
