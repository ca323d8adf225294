"""What wrappers refuse before any launch: one line saying what was wrong and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moebench_kernels.runtime import interpreting, triton_available

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)


def check_tensor(
    name: str, tensor: Any, shape: Sequence[int | str], dtypes: Sequence[torch.dtype], *, strided: bool = False
) -> None:
    """Raise unless `tensor` is of one of `dtypes`, of `shape`, and contiguous.

    Args:
        shape: a number where the size is fixed, a letter where it is free but at least 1; "T" may be 0.
        strided: any strides will do (for [T, K] tensors, which are cheap to copy).

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape, or not contiguous.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; a torch.Tensor is needed")
    if tensor.dtype not in dtypes:
        allowed = ", ".join(_short(dtype) for dtype in dtypes)
        raise TypeError(f"{name} is {_short(tensor.dtype)}; allowed: {allowed}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError(f"{name} is sparse or nested; a dense tensor is needed")
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(tensor).tangent is not None:
        raise TypeError(f"{name} carries a forward-mode tangent; the kernels have reverse mode only")
    found = list(tensor.shape)
    fits = len(found) == len(shape) and all(_fits(size, want) for size, want in zip(found, shape, strict=True))
    if not fits:
        raise ValueError(f"{name} has shape {found}; needed: [{', '.join([f'{size}' for size in shape])}]")
    if not strided and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tuple(tensor.stride())}; it must be contiguous (call .contiguous())")


def _fits(size: int, want: int | str) -> bool:
    return size == want if isinstance(want, (int, torch.SymInt)) else size >= 1 or want == "T"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_same_dtype(**tensors: Tensor) -> None:
    """Raise TypeError unless all have one dtype."""
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} {_short(tensor.dtype)}" for name, tensor in tensors.items())
        raise TypeError(f"one dtype is needed for all, found: {found}")


def check_one_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all are on one device; None has none.

    Before an operator is called: with one tensor on the meta device its fake would run instead of it, and give the
    memory as it came.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if len({tensor.device for tensor in given.values()}) > 1:
        found = ", ".join(f"{name} on {tensor.device}" for name, tensor in given.items())
        raise ValueError(f"one device is needed for all, found: {found}")


def check_launch(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are on one device on which the kernels can run."""
    check_one_device(**tensors)
    available, reason = triton_available()
    name, tensor = next(iter(tensors.items()))
    if not available:
        raise ValueError(f"the Triton kernels cannot run: {reason}")
    if not tensor.is_cuda and not (interpreting() and tensor.device.type == "cpu"):
        raise ValueError(
            f"{name} is on {tensor.device}; the kernels need a GPU, or TRITON_INTERPRET=1 set before triton is "
            "imported for tensors on the CPU (the *_torch references run everywhere)"
        )


def check_int(name: str, value: Any, *, needed: str = "an int") -> None:
    """Raise TypeError unless `value` is an int (a symbolic one under torch.compile), and no bool."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}; {needed} is needed")


def check_bool(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}; a bool is needed")


def check_finite(name: str, value: Any) -> None:
    """Raise unless `value` is a plain number that float32 can hold.

    Raises:
        TypeError: not a number; a tensor is none, as its gradient would be lost.
        ValueError: NaN, infinite or past float32's range.
    """
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) or isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}; a number is needed")
    if not abs(value) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name} is {value}; it must be finite in float32")


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")


def check_no_gradient(**tensors: Tensor) -> None:
    """Raise ValueError where a gradient would be wanted."""
    for name, tensor in tensors.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient; quantised products are forward only (use torch.no_grad())")
