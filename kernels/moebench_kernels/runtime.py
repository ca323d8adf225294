"""Where the kernels can run: Triton, its interpreter, or not at all.

The package imports without triton; then only the `*_torch` references run.
Kernel files must not use `from __future__ import annotations`: the interpreter
recognises `tl.constexpr` parameters by the annotation object, not by its text.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch import Tensor

_IMPORT_ERROR = ""
try:
    import triton
    import triton.language as tl
except ImportError as error:
    triton = None
    tl = SimpleNamespace(constexpr=object)
    _IMPORT_ERROR = f"triton cannot be imported: {error}"

# triton.jit decides at decoration, so both facts are fixed once this package is imported.
_OURS_INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)
_TRITONS_INTERPRETED = triton is not None and not isinstance(tl.sigmoid, triton.JITFunction)


def jit(function: Any) -> Any:
    """`triton.jit`, or the bare function (never launched) where triton is missing."""
    return function if triton is None else triton.jit(function)


def interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter (TRITON_INTERPRET=1 when they were imported)."""
    return _OURS_INTERPRETED


@cache
def triton_available() -> tuple[bool, str]:
    """Whether the kernels can run here on some device, and why not (or how)."""
    if triton is None:
        return False, _IMPORT_ERROR
    if _OURS_INTERPRETED != _TRITONS_INTERPRETED:
        return False, "TRITON_INTERPRET changed after triton was imported; set it before anything imports triton"
    if interpreting():
        if _version(triton.__version__) < (3, 7) and _version(numpy.__version__) >= (2, 4):
            return (
                False,
                f"the interpreter of triton {triton.__version__} needs numpy < 2.4 ({numpy.__version__} is here)",
            )
        return True, f"triton {triton.__version__}, interpreter: right answers, meaningless times"
    if torch.cuda.is_available():
        return True, f"triton {triton.__version__} on {torch.cuda.get_device_name()}"
    return (
        False,
        "no GPU; on a CPU set TRITON_INTERPRET=1 before anything imports triton, or call the *_torch references",
    )


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launch context: Triton launches on the current GPU, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def cdiv(a: int, b: int) -> int:
    """Ceiling of a / b."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()
