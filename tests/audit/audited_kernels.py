"""A file as a user would write one: kernels, and what to compile of them. Some are wrong on purpose."""

import os
import signal

import triton
import triton.language as tl

from moebench_kernels.build import Build, signature


@triton.jit
def tile_product(a_ptr, b_ptr, rows, columns, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    inner = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + rows[:, None] * K + (start + inner)[None, :])
        b = tl.load(b_ptr + columns[None, :] * K + (start + inner)[:, None])
        total = tl.dot(a, b, total)
    return total


@triton.jit
def gemm(a_ptr, b_ptr, c_ptr, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tile_product(a_ptr, b_ptr, rows, columns, K, BLOCK_M, BLOCK_N, BLOCK_K)
    tl.store(c_ptr + rows[:, None] * N + columns[None, :], total.to(c_ptr.dtype.element_ty))


@triton.jit
def tma_gemm(a_desc, b_desc, c_desc, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    row, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        total = tl.dot(a_desc.load([row, start]), b_desc.load([column, start]).T, total)
    c_desc.store([row, column], total.to(tl.bfloat16))


@triton.jit
def copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def uneven(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 0.0)


class Crash:
    """A compiler that dies. A class, since Triton would follow a function to hash it."""

    def __init__(self):
        os.kill(os.getpid(), signal.SIGSEGV)


@triton.constexpr_function
def dies():
    Crash()
    return 0.0


@triton.jit
def crash(x_ptr):
    tl.store(x_ptr, dies())


@triton.jit
def normalise(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x / tl.sum(x))


def plain():
    return 1.0


@triton.jit
def calls_python(x_ptr):
    tl.store(x_ptr, plain())


TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
DESCRIPTORS = {
    "a_desc": "tensordesc<bf16[128, 64]>",
    "b_desc": "tensordesc<bf16[128, 64]>",
    "c_desc": "tensordesc<bf16[128, 128]>",
    "K": "i32",
} | dict.fromkeys(TILE, "constexpr")


def gemm_build(name, dtype="bf16", tile=TILE, **more):
    types = signature(gemm, dtype, tile, c_ptr="*fp16" if dtype == "fp16" else "*bf16")
    return Build(name, gemm, types, tile, **{"num_warps": 8} | more)


def builds():
    moved = {"x_ptr": "*fp32", "y_ptr": "*fp32", "BLOCK": "constexpr"}
    copied = {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    return [
        gemm_build("gemm bf16", expect=("mma", "wgmma", "tcgen05", "mfma")),
        gemm_build("gemm fp8", "fp8e4nv", targets=("sm_90",), expect=("wgmma",)),
        Build("tma bf16", tma_gemm, DESCRIPTORS, TILE, ("sm_90", "sm_100"), num_warps=8, expect=("wgmma", "tma")),
        Build("spills", normalise, moved, {"BLOCK": 8192}, ("sm_90",), num_warps=1),
        Build("spills", normalise, moved, {"BLOCK": 131072}, ("gfx942",), num_warps=16),
        gemm_build("too much shared", tile=TILE | {"BLOCK_K": 128}, targets=("sm_90", "gfx942"), num_stages=5),
        Build("copy wide", copy, copied, {"BLOCK": 1024}, ("sm_90", "gfx942")),
        Build("copy narrow", copy, copied, {"BLOCK": 1024}, ("sm_90", "gfx942"), unaligned=("x_ptr", "n")),
        Build(
            "copy expects", copy, copied, {"BLOCK": 1024}, expect=("wgmma", "mfma", "tma"), targets=("sm_90", "gfx950")
        ),
        Build("uneven", uneven, {"x_ptr": "*fp32"}, {"BLOCK": 100}, ("sm_80",)),
        Build("calls python", calls_python, {"x_ptr": "*fp32"}, {}, ("sm_80",)),
        Build("crash", crash, {"x_ptr": "*fp32"}, {}, ("sm_80",)),
    ]
