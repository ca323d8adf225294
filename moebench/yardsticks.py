"""Yardsticks: a large copy, a large read, a dense GEMM of equal FLOPs. Arms of every block, never winners.

They show, in the same minutes and on the same clocks as the arms, what the
machine can do; each has an oracle of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.measure.errors import NO_ERROR, Errors, errors_of, tolerance, verdict
from moebench.measure.gemm import DTYPES, for_right, multiply, operand, out_bytes
from moebench.point import DRAWS

MIN_BYTES, MAX_BYTES = 64 << 20, 512 << 20


@dataclass
class Yardstick:
    """One ready to run.

    Attributes:
        name: copy, read or gemm.
        call: runs draw i modulo `rotation`.
        check: why its answer is wrong, or None, with the error.
        flops: per call.
        moved_bytes: read and written per call.
        rotating_bytes: what one rotation over its draws touches.
        rotation: how many draws take turns.
    """

    name: str
    call: Callable[[int], object]
    check: Callable[[], tuple[Errors, str | None]]
    flops: float
    moved_bytes: float
    rotating_bytes: float
    rotation: int = DRAWS

    def rotate(self, cold: bool) -> float:
        """Let the draws take turns, or call one only; the bytes that one rotation touches."""
        self.rotation = DRAWS if cold else 1
        return self.rotating_bytes if cold else self.moved_bytes


def make_yardstick(name: str, *, precision: str, device: str, flops: float, cache_bytes: int) -> Yardstick:
    """The yardstick of a block.

    Args:
        flops: what the GEMM should take.
        cache_bytes: last-level cache, so that copy and read run well past it.
    """
    if name == "gemm":
        return _gemm(precision, device, flops)
    count = min(MAX_BYTES, max(MIN_BYTES, 4 * cache_bytes)) // 4
    source = torch.rand(count, device=device, generator=_generator(device))
    return _copy(source) if name == "copy" else _read(source)


class Shelf:
    """Yardsticks kept for the next block, one of each name and precision: filling one can outlast a small layer."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, str], tuple[float, Yardstick]] = {}

    def get(self, name: str, precision: str, device: str, flops: float, cache_bytes: int) -> Yardstick:
        """As `make_yardstick`; the one from before where it would be the same, and no other is kept."""
        kind, asked = ((name, precision), flops) if name == "gemm" else ((name, ""), 0.0)
        before, made = self._made.pop(kind, (None, None))
        if made is None or before != asked:
            made = make_yardstick(name, precision=precision, device=device, flops=flops, cache_bytes=cache_bytes)
        self._made[kind] = asked, made
        return made

    def clear(self) -> None:
        """Keep none."""
        self._made.clear()


def _copy(source: Tensor) -> Yardstick:
    target = torch.empty_like(source)

    def check() -> tuple[Errors, str | None]:
        target.fill_(float("nan"))
        target.copy_(source)
        return NO_ERROR, None if torch.equal(target, source) else "the copy differs from its source"

    return Yardstick("copy", lambda i: target.copy_(source), check, 0.0, 2.0 * source.nbytes, 2.0 * source.nbytes)


def _read(source: Tensor) -> Yardstick:
    def check() -> tuple[Errors, str | None]:
        errors = errors_of(source.sum().reshape(1), source.double().sum().reshape(1))
        return errors, None if errors.rel < 1e-4 else f"the sum is off by {errors.rel:.3g}"

    return Yardstick("read", lambda i: source.sum(), check, 0.0, float(source.nbytes), float(source.nbytes))


def _generator(device: str) -> torch.Generator:
    # Of its own: a CUDA graph that could not be captured may leave the global one of a GPU unusable.
    return torch.Generator(device).manual_seed(0)


def _side(flops: float, dtype: torch.dtype) -> int:
    """Of a square GEMM of about these FLOPs: 8-bit operands need 32 at least and rows of a multiple of 16 bytes."""
    step, least = (16, 32) if dtype.itemsize == 1 else (8, 8)
    return max(least, round(float((flops / 2) ** (1 / 3)) / step) * step)


def _gemm(precision: str, device: str, flops: float) -> Yardstick:
    dtype, generator = DTYPES[precision], _generator(device)
    size = _side(flops, dtype)
    left = [operand(size, dtype, device, generator) for _ in range(DRAWS)]
    right = for_right(operand(size, dtype, device, generator))

    def check() -> tuple[Errors, str | None]:
        errors = errors_of(multiply(left[0], right)[:8], left[0][:8].double() @ right.double())
        return errors, verdict(errors, tolerance(precision, NO_ERROR))

    moved = size * size * (2.0 * dtype.itemsize + out_bytes(dtype))
    rotating = (DRAWS + 1.0) * size * size * dtype.itemsize
    return Yardstick("gemm", lambda i: multiply(left[i % DRAWS], right), check, 2.0 * size**3, moved, rotating)
