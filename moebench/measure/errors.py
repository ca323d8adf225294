"""Errors against the oracle, and how large they may be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A sum of D ~ 10^3 products in the precision, twice, with float32 accumulation, errs by a few
# of its units; these are about ten times what eager PyTorch shows on normal data.
REL_TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 3e-2}
MAX_TOLERANCE = {"fp32": 1e-4, "fp16": 5e-2, "bf16": 3e-1}
# What is asked for are the quantised weights, on activations as they are: the error is that of quantising activations,
# once before each of the two GEMMs. These are about twice what the formula itself costs on normal data.
REL_TOLERANCE |= {"fp8:row": 0.1, "fp8:128": 0.1, "int8": 0.06, "w4a16:128": 3e-2}
MAX_TOLERANCE |= {"fp8:row": 1.0, "fp8:128": 1.0, "int8": 0.6, "w4a16:128": 3e-1}
EAGER_FACTOR = 3.0
# Gradients pass through three GEMMs instead of two and through the activation's slope.
BACKWARD_FACTOR = 4.0
PART = 1 << 24  # numbers compared at a time


@dataclass(frozen=True)
class Errors:
    """How far an answer is from the oracle's.

    Attributes:
        rel: ||y - ref|| / ||ref||.
        max: largest |y - ref| over RMS(ref).
    """

    rel: float
    max: float

    def worst(self, other: Errors) -> Errors:
        """The larger of each; NaN, which no comparison ranks, stays."""
        return Errors(_larger(self.rel, other.rel), _larger(self.max, other.max))

    def times(self, factor: float) -> Errors:
        """Both multiplied by a factor."""
        return Errors(self.rel * factor, self.max * factor)


NO_ERROR = Errors(0.0, 0.0)


def errors_of(actual: Tensor, expected: Tensor) -> Errors:
    """Errors of `actual` (any float dtype) against `expected` (float64) of the same shape; NaN counts as NaN.

    Where `actual` lies, and some numbers at a time: the rows of a large layer in float64 are 15 GB, which takes half a
    minute to bring to the host.
    """
    count = expected.numel()
    if not count:
        return NO_ERROR
    squares, reference, worst = (torch.zeros((), dtype=torch.float64, device=actual.device) for _ in range(3))
    for mine, right in zip(actual.detach().flatten().split(PART), expected.detach().flatten().split(PART), strict=True):
        wanted = right.to(actual.device)
        difference = mine.double() - wanted
        squares += difference.square().sum()
        reference += wanted.square().sum()
        worst = torch.maximum(worst, difference.abs().max())  # NaN stays
    rms = float((reference / count).sqrt())
    if rms == 0.0:  # an answer that must be exactly zero
        return NO_ERROR if float(worst) == 0.0 else Errors(float("inf"), float("inf"))
    return Errors(float((squares / reference).sqrt()), float(worst) / rms)


def tolerance(precision: str, eager: Errors) -> Errors:
    """max(table by precision, 3 x the error of eager PyTorch in that precision)."""
    return Errors(
        max(REL_TOLERANCE[precision], EAGER_FACTOR * eager.rel),
        max(MAX_TOLERANCE[precision], EAGER_FACTOR * eager.max),
    )


def verdict(errors: Errors, allowed: Errors) -> str | None:
    """Why the answer is inaccurate, or None. A NaN error is inaccurate."""
    if not errors.rel <= allowed.rel:
        return f"relative error {errors.rel:.3g} against the float64 oracle; allowed is {allowed.rel:.3g}"
    if not errors.max <= allowed.max:
        return f"largest error {errors.max:.3g} of the RMS against the float64 oracle; allowed is {allowed.max:.3g}"
    return None


def _larger(a: float, b: float) -> float:
    return float(torch.tensor([a, b], dtype=torch.float64).max())  # max propagates NaN
