"""What a compile audit needs to know of a kernel: its signature, constants, options and targets.

A kernel file ends with `builds()`, which lists its kernels in their shipped tiles; so may a user's
own file (`moebench audit FILE.py`). Needs no GPU, and no triton until a build is compiled.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CUDA_TARGETS = ("sm_80", "sm_90", "sm_100")
HIP_TARGETS = ("gfx942", "gfx950")
TARGETS = CUDA_TARGETS + HIP_TARGETS


@dataclass(frozen=True)
class Build:
    """One kernel in one tile config.

    Attributes:
        name: kernel and what tells this build from the others, such as "up_projection swiglu bf16 m128".
        kernel: the @triton.jit function.
        signature: argument -> Triton type ("*bf16", "*i32", "i32", "fp32", "tensordesc<bf16[128, 64]>"), in the
            kernel's order; "constexpr" for those in `constants`.
        constants: the constexpr arguments, arguments that are None, and integers equal to 1.
        targets: those the config is meant for.
        num_warps, num_stages: as launched.
        unaligned: pointers and integers that are not known to divide by 16; all others are. Names that are no
            argument of the kernel are passed over, so that several kernels can share one list.
        expect: what the binary must hold, each only where the target has it: "mma" (any tensor core of NVIDIA's),
            "wgmma" (sm_90), "tcgen05" (sm_100), "mfma" (AMD), "tma" (sm_90, sm_100).
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    targets: tuple[str, ...] = TARGETS
    num_warps: int = 4
    num_stages: int = 3
    unaligned: tuple[str, ...] = ()
    expect: tuple[str, ...] = ()


def signature(kernel: Any, dtype: str, constants: Mapping[str, Any], **types: str) -> dict[str, str]:
    """Types by name: constants are constexpr, `*_ptr` are pointers to `dtype`, the rest i32; `types` overrides."""

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        return types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")

    return {name: type_of(name) for name in kernel.arg_names}
