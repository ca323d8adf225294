"""The plain dense GEMM of a precision, as ceilings and the GEMM yardstick time it.

fp32, bf16, fp16: torch.mm. fp8: torch._scaled_mm with one scale an operand, e4m3 in and bf16 out. int8: torch._int_mm,
int32 out. w4a16 multiplies 16-bit numbers, so its ceiling is bf16's.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8:row": torch.float8_e4m3fn,
    "fp8:128": torch.float8_e4m3fn, "int8": torch.int8, "w4a16:128": torch.bfloat16,
}  # fmt: skip


def operand(size: int, dtype: torch.dtype, device: str, generator: torch.Generator | None = None) -> Tensor:
    """Random [size, size]: zeros draw less power and let a GPU clock higher than any real layer does."""
    values = torch.randn(size, size, device=device, generator=generator)
    return (values * 32).clamp(-127, 127).round().to(dtype) if dtype == torch.int8 else values.to(dtype)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; fp8 wants b's columns contiguous, as `for_right` leaves them."""
    if a.dtype == torch.int8:
        return torch._int_mm(a, b)
    if a.dtype == torch.float8_e4m3fn:
        return torch._scaled_mm(a, b, scale_a=_one(a.device), scale_b=_one(a.device), out_dtype=torch.bfloat16)
    return a @ b


@cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)  # made once, so that no call is timed with it


def out_bytes(dtype: torch.dtype) -> int:
    """Of one element of the product."""
    return 4 if dtype == torch.int8 else max(2, dtype.itemsize)


def for_right(b: Tensor) -> Tensor:
    """The same values, laid out as the right operand of `multiply` is best."""
    return b.T.contiguous().T if b.itemsize == 1 else b
