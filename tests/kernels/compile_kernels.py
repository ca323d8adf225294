"""Compile kernels for GPUs that are not here and print what came out, one JSON object a line.

Run by test_compile.py in a process of its own: TRITON_INTERPRET must be unset when triton is imported.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moebench_kernels.activation import _activation_backward_kernel, activation_config
from moebench_kernels.capacity import builds as capacity_builds
from moebench_kernels.combine import builds as combine_builds
from moebench_kernels.gate import builds as gate_builds
from moebench_kernels.gate_backward import builds as gate_backward_builds
from moebench_kernels.grouped_gemm import _grouped_gemm_kernel
from moebench_kernels.grouped_gemm import build as gemm_build
from moebench_kernels.permute import builds as permute_builds
from moebench_kernels.plan_kernels import builds as plan_builds
from moebench_kernels.quantise import _quantise_rows_kernel
from moebench_kernels.quantise import builds as quantise_builds
from moebench_kernels.quantised_gemm import builds as quantised_gemm_builds
from moebench_kernels.ragged_gemm import _ragged_gemm_kernel, ragged_config
from moebench_kernels.tiles import GemmConfig

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Pointers that do not hold the layer's own dtype.
INT32 = {"ids_ptr", "offsets_ptr", "blocks_ptr", "counts_ptr", "order_ptr", "row2assignment_ptr", "token2row_ptr"}
FP32 = {"weights_ptr", "d_weights_ptr"}
DIVISIBLE = ("*i32", "*fp32", "*fp16", "*bf16", "*fp8e4nv", "*i8", "*u8", "i32")
QUANTISED = ("_quantise_rows_kernel", "_eight_bit_kernel", "_four_bit_kernel")  # declared by their files' builds()


@dataclass(frozen=True)
class Build:
    """One kernel in one shipped config for one target."""

    name: str
    kernel: Any
    dtype: str
    capability: int
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    floats: tuple[str, ...] = ()
    ones: tuple[str, ...] = field(default=())  # arguments equal to 1, which Triton turns into constants
    types: dict[str, str] = field(default_factory=dict)  # of arguments that their name does not tell


def pointer(name: str, dtype: str) -> str:
    """Signature type of a pointer argument."""
    if name in INT32:
        return "*i32"
    return "*fp32" if name in FP32 else f"*{dtype}"


def compile_one(build: Build) -> dict[str, Any]:
    """Compile to a cubin, aligned as real shapes are: pointers and sizes that divide by 16, as the launcher would find.

    Without that the loads are narrow, nothing is pipelined, and shared memory looks smaller than it is.
    """
    names = build.kernel.arg_names
    constants = build.constants | {name: 1 for name in build.ones if name in names}
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in build.types:
            signature[name] = build.types[name]
        elif name.endswith("_ptr"):
            signature[name] = pointer(name, build.dtype)
        else:
            signature[name] = "fp32" if name in build.floats else "i32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name] in DIVISIBLE}
    source = ASTSource(build.kernel, signature, constants, aligned)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", build.capability, 32), options=options)
    return label(build) | {
        "shared_bytes": compiled.metadata.shared,
        "wgmma": "wgmma" in compiled.asm["ptx"],
        "registers": registers(compiled.asm["cubin"], "REG"),
        "stack_bytes": registers(compiled.asm["cubin"], "STACK"),
    }


def registers(cubin: bytes, what: str) -> int:
    """Registers (REG) of a thread, or the bytes of its stack (STACK), as cuobjdump reads them from the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(count) for count in re.findall(rf"{what}:(\d+)", text))


def label(build: Build) -> dict[str, Any]:
    """What identifies a build."""
    size_one = "n_rows" in build.ones or "T" in build.ones
    return {"name": build.name, "dtype": build.dtype, "capability": build.capability, "size_one": size_one}


def gemm(
    dtype: str, capability: int, block_m: int, gather: bool, activation: str | None, transpose: bool = False,
    ones: tuple[str, ...] = (),
) -> Build:  # fmt: skip
    """The grouped GEMM as its file declares it; with `ones`, in the least tile and by pointers."""
    least = GemmConfig(16 if activation is None else 32, 16, 4, 3) if ones else None
    made = gemm_build(f"sm_{capability}", dtype, block_m, gather, activation, transpose, config=least)
    name, kernel = f"gemm {made.name}", _grouped_gemm_kernel
    types = {name: type for name, type in made.signature.items() if type != "constexpr"}
    return Build(
        name, kernel, dtype, capability, dict(made.constants), made.num_warps, made.num_stages, ones=ones, types=types
    )


def ragged(dtype: str, capability: int) -> Build:
    """dW as `launch_ragged_gemm` would start it, its left operand by TMA where the hardware has it."""
    c = ragged_config(2048, 2048, TYPES[dtype], f"sm_{capability}", gather_right=True)
    constants = {
        "TOP_K": 8, "GATHER_LEFT": False, "GATHER_RIGHT": True, "LEFT_TMA": capability >= 90, "RIGHT_TMA": False,
        "INTERPRET": False, "GROUP_M": c.group_m, "BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_R": c.block_r,
    }  # fmt: skip
    left = f"tensordesc<{dtype}[{c.block_r}, {c.block_m}]>" if capability >= 90 else f"*{dtype}"
    types = {"left": left, "right": f"*{dtype}"}
    return Build("ragged", _ragged_gemm_kernel, dtype, capability, constants, c.num_warps, c.num_stages, types=types)


def small(dtype: str, capability: int, ones: tuple[str, ...] = ()) -> list[Build]:
    """Everything that is no GEMM, at D = 2048, F = 1024, E = 64, K = 8."""
    a = activation_config(1024)
    slopes = {"KIND": "gelu", "IS_GATED": True, "BLOCK_R": a.block_r, "BLOCK_F": a.block_f}
    activation = Build("activation backward", _activation_backward_kernel, dtype, capability, slopes, ones=ones)
    return [activation, *gates(dtype, capability, ones)]


def gates(dtype: str, capability: int, ones: tuple[str, ...] = ()) -> list[Build]:
    """The declared builds of _topk_gate_kernel and _topk_gate_backward_kernel for logits of one dtype."""
    return [
        Build(b.name, b.kernel, dtype, capability, dict(b.constants), b.num_warps, ones=ones, types={**b.signature})
        for b in gate_builds() + gate_backward_builds()
        if b.signature["logits_ptr"] == f"*{dtype}"
    ]


def plans(dtype: str, capability: int, ones: tuple[str, ...] = ()) -> list[Build]:
    """Each kernel of plan, capacity, permute and combine once, in the first build that its file declares."""
    declared = plan_builds() + capacity_builds()
    declared += [b for b in permute_builds() + combine_builds() if f" {dtype}" in b.name]
    first = {b.kernel.__name__: b for b in reversed(declared)}
    return [
        Build(b.name, b.kernel, dtype, capability, dict(b.constants), b.num_warps, ones=ones, types={**b.signature})
        for b in first.values()
    ]


def quantised(capability: int) -> list[Build]:
    """What the quantised kernels' files declare for few rows; their audit compiles all of it."""
    declared = [b for b in quantise_builds() + quantised_gemm_builds() if f"sm_{capability}" in b.targets]
    few = [b for b in declared if b.kernel is _quantise_rows_kernel or " swiglu m16 " in b.name]
    return [
        Build(b.name, b.kernel, "bf16", capability, dict(b.constants), b.num_warps, b.num_stages, types={**b.signature})
        for b in few
    ]


def builds() -> list[Build]:
    """One build per kernel and target at least; the GEMM in each of its shipped tiles and each dtype."""
    ones = ("n_rows", "N", "K", "n_experts")
    return [
        gemm("bf16", 90, 128, True, "swiglu"), gemm("bf16", 90, 128, False, None), gemm("bf16", 90, 64, True, "gelu"),
        gemm("bf16", 90, 16, True, "swiglu"), gemm("bf16", 90, 16, False, None, True),
        gemm("fp16", 80, 128, True, "swiglu"), gemm("fp16", 80, 64, False, None), gemm("fp16", 80, 16, True, "relu"),
        gemm("fp32", 80, 128, True, "geglu"), gemm("fp32", 90, 16, False, None),
        gemm("fp32", 80, 16, False, None, ones=ones), gemm("fp32", 80, 16, True, "swiglu", ones=ones),
        gemm("fp32", 80, 16, True, None, True, ones=ones),
        ragged("bf16", 90), ragged("fp16", 80), ragged("fp32", 80),
        *quantised(80), *quantised(90),
        *plans("bf16", 90), *plans("fp32", 80, ("T", "D", "E", "n", "n_tiles", "n_chunks", "n_groups", "capacity")),
        *small("bf16", 90), *small("fp32", 80), *small("fp16", 80, ("T", "D", "F", "E", "n", "n_rows", "n_blocks")),
    ]  # fmt: skip


def main() -> None:
    """Print one line a build; a build that fails prints its error."""
    for build in builds():
        try:
            print(json.dumps(compile_one(build)), flush=True)
        except Exception as error:  # noqa: BLE001 - whatever the compiler raises belongs in the answer
            print(json.dumps(label(build) | {"error": repr(error)}), flush=True)


if __name__ == "__main__":
    main()
