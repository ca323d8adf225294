"""Decode for several tokens: a grouped GEMM with the operands swapped.

    up      h[a, f] = act(sum over d of W_gate_up[e, f, d] * x[t, d])     for the assignments a = t*K + k of expert e
    down    p[s, a, d] = sum over the s-th part of f of W_down[e, d, f] * h[a, f]
    combine y[t, d] = sum over kept k of weights[t, k] * sum over s of p[s, t*K + k, d]

WGMMA computes 64 rows at the least, and an expert has a few tokens here: so the weights' rows stand where a GEMM
has its rows (M), and the tokens where it has its columns (N, from 16 up). A tile of up to block_m assignments takes one
pass over its expert's weights; an expert with more takes several tiles, which neighbouring programs run at the same
time, so that all but the first should read from L2.

The plan is one launch with one program an expert, each of which reads all ids (4 KB): the histogram tells it where its
tiles begin, a running count ranks its assignments. It holds, for `bound` tiles at most:

    rows    int32 [bound, block_m]   assignments of each tile, -1 where it is not full
    experts int32 [bound]            each tile's expert
    n_tiles int32 [1]                tiles there are; what lies past them is never read

Results stand at their assignment's place, so nothing has to be permuted back, and a dropped assignment's place is never
read. Programs stay and loop over (weight rows, tile), tile fastest: a tile that the bound promised
but the ids did not fill costs nothing.

Shapes: x [T, D], ids and weights [T, K], w_gate_up [E, mF, D], w_down [E, D, F], h [T*K, F], p [S, T*K, D].
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moebench_kernels.activation import GATED, act, up_factor
from moebench_kernels.build import TARGETS, Build, signature
from moebench_kernels.dot import dot
from moebench_kernels.runtime import cdiv, interpreting, jit, next_power_of_2, on_device, tl


@dataclass(frozen=True)
class SwapConfig:
    """Tile of a swapped GEMM.

    Attributes:
        block_n: rows of the weights.
        block_k: elements of a row at a time.
        num_warps, num_stages: as launched.
        per_sm: programs that fit a multiprocessor's shared memory and registers at once.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    per_sm: int


# By rows of a tile. A multiprocessor of an H200 must keep about 32 KB on their way (4.3 TB/s times 1 us over 132);
# these keep 64 to 128 KB of weights, so that a last, half-filled round still has the memory busy. Two programs a
# multiprocessor cover each other's beginnings and ends; from 64 rows up a program is twice as wide instead, since
# reading the tokens again (from L2) for every 64 weight rows would cost half as much as the weights.
_HOPPER_UP = {
    16: SwapConfig(64, 128, 4, 3, 2),
    32: SwapConfig(64, 64, 4, 5, 2),
    64: SwapConfig(128, 64, 8, 5, 1),
    128: SwapConfig(128, 64, 8, 4, 1),
}
_HOPPER_DOWN = {
    16: SwapConfig(128, 128, 4, 3, 2),
    32: SwapConfig(128, 64, 4, 5, 2),
    64: SwapConfig(128, 64, 4, 4, 2),
    128: SwapConfig(128, 64, 8, 3, 2),
}
# An A100 needs about 14 KB (1.7 TB/s over 108) and has 163 KB of shared memory.
_AMPERE_UP = {
    16: SwapConfig(64, 64, 4, 4, 2),
    32: SwapConfig(64, 64, 4, 3, 2),
    64: SwapConfig(64, 64, 4, 3, 2),
    128: SwapConfig(64, 64, 8, 3, 1),
}
_AMPERE_DOWN = {
    16: SwapConfig(64, 128, 4, 4, 2),
    32: SwapConfig(64, 128, 4, 3, 2),
    64: SwapConfig(64, 64, 4, 4, 2),
    128: SwapConfig(128, 64, 8, 3, 1),
}
# 64 KB of shared memory, of which Triton's pipeline keeps num_stages - 1 tiles, the rest waits in registers.
_CDNA = {
    16: SwapConfig(64, 64, 4, 2, 2),
    32: SwapConfig(64, 64, 4, 2, 2),
    64: SwapConfig(64, 64, 4, 2, 1),
    128: SwapConfig(64, 64, 8, 2, 1),
}
# float32 multiplies on FMA units (IEEE), where wide tiles only cost registers, and operands that TMA laid out spill.
_FP32 = {
    16: SwapConfig(64, 32, 4, 3, 2),
    32: SwapConfig(64, 32, 4, 3, 2),
    64: SwapConfig(64, 32, 8, 3, 2),
}
_SMALL = {m: SwapConfig(32, 32, 4, 2, 1) for m in (16, 32, 64, 128)}  # tails and several rounds on small tests
CONFIGS = {
    "sm_80": (_AMPERE_UP, _AMPERE_DOWN),
    "sm_90": (_HOPPER_UP, _HOPPER_DOWN),
    "sm_100": (_HOPPER_UP, _HOPPER_DOWN),
    "gfx942": (_CDNA, _CDNA),
    "gfx950": (_CDNA, _CDNA),
    "interpreter": (_SMALL, _SMALL),
}
PROGRAMS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "gfx950": 256, "interpreter": 3}

UNALIGNED = ("n", "bound", "stride_t", "stride_k", "weight_stride_t", "weight_stride_k")  # integers, in the audit
MAX_ASSIGNMENTS = 2048  # the plan holds all ids at once: 16 a thread
TMA_FAMILIES = ("sm_90", "sm_100", "interpreter")


def swap_config(family: str, down: bool, block_m: int, dtype: torch.dtype) -> SwapConfig:
    """The tile of the up (or down) projection."""
    if dtype == torch.float32 and family != "interpreter":
        return _FP32[block_m]
    return CONFIGS[family][int(down)][block_m]


def rows_per_tile(n: int, E: int, dtype: torch.dtype) -> int:
    """block_m: about twice the mean load, so that most experts take one pass. float32 would spill at 128."""
    return min(64 if dtype == torch.float32 else 128, max(16, next_power_of_2(cdiv(2 * n, E))))


def tile_bound(n: int, E: int, block_m: int) -> int:
    """Row tiles that n assignments can fill at the most: one partial tile an expert."""
    partial = min(n, E)
    return partial + (n - partial) // block_m


def splits_of(items: int, steps: int, programs: int) -> int:
    """Parts of the down projection's sum: 1 where the tiles alone fill the GPU, else up to 8 of 4 steps at least."""
    return max(1, min(8, programs // items, steps // 4))


@jit
def _decode_plan_kernel(
    ids_ptr, plan_ptr, n, stride_t, stride_k, E, bound,
    TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    a = tl.arange(0, BLOCK_A)
    at = (a // TOP_K).to(tl.int64) * stride_t + (a % TOP_K).to(tl.int64) * stride_k
    ids = tl.load(ids_ptr + at, mask=a < n, other=-1)
    kept = (ids >= 0) & (ids < E)  # judged before narrowing, as an int64 id may wrap
    ids = tl.where(kept, ids, 0).to(tl.int32)
    tiles = (tl.histogram(ids, BLOCK_E, mask=kept) + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(tl.arange(0, BLOCK_E) < expert, tiles, 0), axis=0)
    mine = kept & (ids == expert)
    rank = tl.cumsum(mine.to(tl.int32), axis=0) - 1
    count = tl.sum(mine.to(tl.int32), axis=0)
    own_tiles = (count + BLOCK_M - 1) // BLOCK_M
    tl.store(plan_ptr + first * BLOCK_M + rank, a, mask=mine)
    rest = count + tl.arange(0, BLOCK_M)
    tl.store(plan_ptr + first * BLOCK_M + rest, -1, mask=rest < own_tiles * BLOCK_M)
    tile = tl.arange(0, BLOCK_T)
    tl.store(plan_ptr + bound * BLOCK_M + first + tile, expert, mask=tile < own_tiles)
    if expert == 0:
        tl.store(plan_ptr + bound * (BLOCK_M + 1), tl.sum(tiles, axis=0))


@jit
def _load_weights(w, row, n_rows, k, K, TMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, BLOCK_K] from (row, k). By TMA what follows the matrix's rows comes along, and is not stored later."""
    if TMA:
        tile = w.load([row, k])
    else:
        inside = tl.arange(0, BLOCK_N)
        col = k + tl.arange(0, BLOCK_K)
        at = (row + inside).to(tl.int64)[:, None] * K + col[None, :]
        tile = tl.load(w + at, mask=(inside < n_rows)[:, None] & (col < K)[None, :], other=0.0)
    return tile


@jit
def _swap_ab_kernel(
    rows_ptr, w, bias_ptr, plan_ptr, out_ptr, n, N, K, bound, per_split,
    TOP_K: tl.constexpr, KIND: tl.constexpr, IS_GATED: tl.constexpr, SPLITS: tl.constexpr, TMA: tl.constexpr,
    INTERPRET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[s, a, :N] = KIND(W[e] rows[a // TOP_K]) over per_split elements of K."""
    n_tiles = tl.load(plan_ptr + bound * (BLOCK_M + 1))
    blocks = tl.cdiv(N, BLOCK_N)
    width = N
    if IS_GATED:
        width = 2 * N
    for item in range(tl.program_id(0), n_tiles * blocks * SPLITS, tl.num_programs(0)):
        tile = item % n_tiles
        first = item // n_tiles % blocks * BLOCK_N
        split = item // n_tiles // blocks
        expert = tl.load(plan_ptr + bound * BLOCK_M + tile)
        a = tl.load(plan_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M))
        kept = a >= 0
        at_row = rows_ptr + (a // TOP_K).to(tl.int64)[:, None] * K
        row = expert * width + first
        start = split * per_split
        z = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if IS_GATED:
            up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for k in range(start, tl.minimum(start + per_split, K), BLOCK_K):
            col = k + tl.arange(0, BLOCK_K)
            value = tl.load(at_row + col[None, :], mask=kept[:, None] & (col < K)[None, :], other=0.0)
            z = dot(_load_weights(w, row, N - first, k, K, TMA, BLOCK_N, BLOCK_K), tl.trans(value), z, INTERPRET)
            if IS_GATED:
                second = _load_weights(w, row + N, N - first, k, K, TMA, BLOCK_N, BLOCK_K)
                up = dot(second, tl.trans(value), up, INTERPRET)
        inside = tl.arange(0, BLOCK_N)
        exists = first + inside < N
        if bias_ptr is not None:
            mask = exists & (split == 0)
            z += tl.load(bias_ptr + row + inside, mask=mask, other=0.0).to(tl.float32)[:, None]
            if IS_GATED:
                up += tl.load(bias_ptr + row + N + inside, mask=mask, other=0.0).to(tl.float32)[:, None]
        if KIND != "none":
            z = act(z, KIND)
        if IS_GATED:
            z = z * up_factor(up, KIND)
        at = (split * n + a).to(tl.int64)[None, :] * N + (first + inside)[:, None]
        tl.store(out_ptr + at, z.to(out_ptr.dtype.element_ty), mask=exists[:, None] & kept[None, :])


@jit
def _decode_combine_kernel(
    partials_ptr, ids_ptr, weights_ptr, y_ptr, n, stride_t, stride_k, weight_stride_t, weight_stride_k, D, E,
    TOP_K: tl.constexpr, SPLITS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A token's BLOCK_D outputs; up to BLOCK_K experts are loaded at once, not one after another."""
    blocks = tl.cdiv(D, BLOCK_D)
    t = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.static_range(0, TOP_K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        ids = tl.load(ids_ptr + t * stride_t + k.to(tl.int64) * stride_k, mask=k < TOP_K, other=-1)
        kept = (ids >= 0) & (ids < E)
        at = weights_ptr + t * weight_stride_t + k.to(tl.int64) * weight_stride_k
        weight = tl.load(at, mask=kept, other=0.0)
        inside = kept[:, None] & (col < D)[None, :]
        for split in tl.static_range(SPLITS):
            at_row = (split * n + t * TOP_K + k)[:, None] * D
            value = tl.load(partials_ptr + at_row + col[None, :], mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(value * weight[:, None], axis=0)
    tl.store(y_ptr + t * D + col, total.to(y_ptr.dtype.element_ty), mask=col < D)


@cache
def _programs(family: str, device: torch.device) -> int:
    """Multiprocessors of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return PROGRAMS[family]


def _weights_argument(weights: Tensor, family: str, c: SwapConfig) -> tuple[Any, bool]:
    """A TMA descriptor of [E * N, K] where hardware and strides allow one, else the tensor itself."""
    E, N, K = weights.shape
    aligned = weights.data_ptr() % 16 == 0 and K * weights.element_size() % 16 == 0
    fits = c.block_n <= E * N and c.block_k <= K
    if family not in TMA_FAMILIES or weights.dtype == torch.float32 or not (aligned and fits):
        return weights, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(weights, [E * N, K], [K, 1], [c.block_n, c.block_k]), True


def _launch_gemm(
    rows: Tensor, weights: Tensor, bias: Tensor | None, plan: Tensor, out: Tensor, *,
    n: int, N: int, top_k: int, activation: str, block_m: int, bound: int, splits: int, family: str, c: SwapConfig,
) -> None:  # fmt: skip
    K = weights.shape[2]
    w, tma = _weights_argument(weights, family, c)
    items = bound * cdiv(N, c.block_n) * splits
    per_split = cdiv(cdiv(K, c.block_k), splits) * c.block_k
    _swap_ab_kernel[(min(items, _programs(family, rows.device) * c.per_sm),)](
        rows, w, bias, plan, out, n, N, K, bound, per_split,
        TOP_K=top_k, KIND=GATED.get(activation, activation), IS_GATED=activation in GATED, SPLITS=splits, TMA=tma,
        INTERPRET=interpreting(), BLOCK_M=block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k,
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def launch_swap_ab(
    x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, b_gate_up: Tensor | None,
    b_down: Tensor | None, y: Tensor, activation: str, family: str,
) -> None:  # fmt: skip
    """Four launches into y [T, D]; unchecked. T >= 1 and T*K <= MAX_ASSIGNMENTS."""
    (T, K), (E, D, F) = ids.shape, w_down.shape
    n, block_m = T * K, rows_per_tile(T * K, E, x.dtype)
    bound = tile_bound(n, E, block_m)
    up, down = (swap_config(family, is_down, block_m, x.dtype) for is_down in (False, True))
    splits = splits_of(
        min(n, E) * cdiv(D, down.block_n), cdiv(F, down.block_k), _programs(family, x.device) * down.per_sm
    )
    plan = torch.empty(bound * (block_m + 1) + 1, dtype=torch.int32, device=x.device)
    h = x.new_empty(n, F)
    partials = x.new_empty(splits, n, D, dtype=x.dtype if splits == 1 else torch.float32)
    block_a, block_d = max(16, next_power_of_2(n)), min(512, next_power_of_2(D))
    shared = {"n": n, "block_m": block_m, "bound": bound, "family": family}
    with on_device(x):
        _decode_plan_kernel[(E,)](
            ids, plan, n, *ids.stride(), E, bound, TOP_K=K, BLOCK_M=block_m, BLOCK_A=block_a,
            BLOCK_E=max(32, next_power_of_2(E)), BLOCK_T=max(1, block_a // block_m), num_warps=4,
        )  # fmt: skip
        _launch_gemm(
            x, w_gate_up, b_gate_up, plan, h, N=F, top_k=K, activation=activation, splits=1, c=up, **shared
        )  # fmt: skip
        _launch_gemm(
            h, w_down, b_down, plan, partials, N=D, top_k=1, activation="none", splits=splits, c=down, **shared
        )  # fmt: skip
        _decode_combine_kernel[(T * cdiv(D, block_d),)](
            partials, ids, weights, y, n, *ids.stride(), *weights.stride(), D, E,
            TOP_K=K, SPLITS=splits, BLOCK_K=min(16, next_power_of_2(K)), BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip


def builds() -> list[Build]:
    """The swapped GEMM in each family's tiles, plan and combine; each also with every size equal to 1."""
    found = []
    for family in TARGETS:
        for dtype in ("bf16", "fp16", "fp32"):
            for block_m in (16, 32, 64) if dtype == "fp32" else (16, 32, 64, 128):
                found += [_build(family, dtype, block_m, down) for down in (False, True)]
    for ones in (False, True):
        found += [_small_build(kernel, ones) for kernel in (_decode_plan_kernel, _decode_combine_kernel)]
    return found + [_build("sm_80", "fp32", 16, down, ones=True) for down in (False, True)]


def _small_build(kernel: Any, ones: bool) -> Build:
    plan = {"TOP_K": 8, "BLOCK_M": 16, "BLOCK_A": 1024, "BLOCK_E": 256, "BLOCK_T": 64}
    constants = plan if kernel is _decode_plan_kernel else {"TOP_K": 8, "SPLITS": 2, "BLOCK_K": 8, "BLOCK_D": 512}
    types = {"ids_ptr": "*i32", "plan_ptr": "*i32", "weights_ptr": "*fp32", "partials_ptr": "*fp32"}
    constants = constants | (_ones(kernel) if ones else {})
    name = kernel.__name__.strip("_") + (", sizes 1" if ones else "")
    return Build(name, kernel, signature(kernel, "bf16", constants, **types), constants, unaligned=UNALIGNED)


def _build(family: str, dtype: str, block_m: int, down: bool, ones: bool = False) -> Build:
    c = swap_config(family, down, block_m, {"fp32": torch.float32}.get(dtype, torch.bfloat16))
    tma = family in TMA_FAMILIES and dtype != "fp32"
    constants = {
        "TOP_K": 1 if down else 8, "KIND": "none" if down else "silu", "IS_GATED": not down, "SPLITS": 1, "TMA": tma,
        "INTERPRET": False, "BLOCK_M": block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k, "bias_ptr": None,
    }  # fmt: skip
    constants |= _ones(_swap_ab_kernel) if ones else {}
    types = {"plan_ptr": "*i32", "w": f"tensordesc<{dtype}[{c.block_n}, {c.block_k}]>" if tma else f"*{dtype}"}
    return Build(
        f"swap_ab {'down' if down else 'swiglu up'} {dtype} m{block_m}{', sizes 1' if ones else ''}", _swap_ab_kernel,
        signature(_swap_ab_kernel, dtype, constants, **types), constants, (family,), c.num_warps, c.num_stages,
        unaligned=UNALIGNED, expect=() if dtype == "fp32" else ("mma", "wgmma", "tcgen05", "mfma", "tma"),
    )  # fmt: skip


def _ones(kernel: Any) -> dict[str, int]:
    """Triton makes a constant of every integer that equals 1."""
    return {name: 1 for name in (*UNALIGNED, "N", "K", "D", "E", "per_split") if name in kernel.arg_names}
