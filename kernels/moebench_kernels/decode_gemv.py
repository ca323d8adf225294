"""Decode for a handful of tokens: matrix times vector, two launches and no plan.

    up      h[a, f] = act(sum over d of W_gate_up[e, f, d] * x[t, d])        a = t*K + k, e = ids[t, k]
    down    y[t, d] = sum over kept k of weights[t, k] * sum over f of W_down[e, d, f] * h[t*K + k, f]

A program owns a few outputs and streams their weight rows past float32 FMAs: there is nothing to sort, gather
or combine, and no sum crosses programs. Two tokens of one expert read its weights twice; programs are numbered with the
assignment (or token) fastest, so both run at the same time and the second read should find them in L2.

Weights come through shared memory in num_stages asynchronous copies of 16 bytes a thread, which keeps more bytes on
their way than registers could.

Shapes: x [T, D], ids and weights [T, K], w_gate_up [E, mF, D], w_down [E, D, F], h [T*K, F], y [T, D].
"""

from dataclasses import dataclass

from torch import Tensor

from moebench_kernels.activation import GATED, act, up_factor
from moebench_kernels.build import TARGETS, Build, signature
from moebench_kernels.runtime import cdiv, jit, next_power_of_2, on_device, tl


@dataclass(frozen=True)
class GemvConfig:
    """Tile of a matrix-vector product: block_n outputs, block_k elements of their rows at a time."""

    block_n: int
    block_k: int
    num_stages: int
    num_warps: int = 4


UNALIGNED = ("n", "T", "stride_t", "stride_k", "weight_stride_t", "weight_stride_k")  # integers, in the audit
# Programs that fill a GPU: three for each multiprocessor. Few in the interpreter, where they run one after another.
ENOUGH = {"sm_80": 324, "sm_90": 396, "sm_100": 444, "gfx942": 912, "gfx950": 768, "interpreter": 4}


def gemv_config(outputs: int, copies: int, K: int, itemsize: int, gated: bool, family: str) -> GemvConfig:
    """Tile for `copies` vectors of `outputs` outputs over rows of K elements.

    A step is up to 8 KB of each map's weights (twice that spills a register on sm_90). Every program reads the vector
    again, from L2: more rows at a time make that cheaper, until there would not be enough programs. As many steps
    are on their way as make 24 KB; with three or four programs a multiprocessor that is twice what an H200 needs.
    """
    block_k = min(2048 // itemsize, max(16, next_power_of_2(K)))
    while block_k > 256 and cdiv(K, block_k) * block_k * 3 > K * 4:
        block_k //= 2  # what hangs over costs no bandwidth, but leaves threads idle
    block_n = 8192 // (block_k * itemsize)
    while block_n > 1 and cdiv(outputs, block_n) * copies < ENOUGH[family]:
        block_n //= 2
    on_their_way = cdiv(24576, block_n * block_k * itemsize * (2 if gated else 1))
    return GemvConfig(block_n, block_k, num_stages=1 + min(6, max(2, on_their_way)))


@jit
def _gemv_up_kernel(
    x_ptr, ids_ptr, w_ptr, bias_ptr, h_ptr, n, stride_t, stride_k, D, F, E,
    TOP_K: tl.constexpr, KIND: tl.constexpr, IS_GATED: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    a = tl.program_id(0) % n
    f = tl.program_id(0) // n * BLOCK_F + tl.arange(0, BLOCK_F)
    t = (a // TOP_K).to(tl.int64)
    expert = tl.load(ids_ptr + t * stride_t + (a % TOP_K).to(tl.int64) * stride_k)
    width = F
    if IS_GATED:
        width = 2 * F
    if (expert >= 0) & (expert < E):
        row = expert.to(tl.int64) * width + f
        at_row = w_ptr + row[:, None] * D
        total = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
        if IS_GATED:
            total_up = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
        for first in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            col = first + tl.arange(0, BLOCK_D)
            inside = (f < F)[:, None] & (col < D)[None, :]
            x = tl.load(x_ptr + t * D + col, mask=col < D, other=0.0).to(tl.float32)[None, :]
            total += tl.load(at_row + col[None, :], mask=inside, other=0.0).to(tl.float32) * x
            if IS_GATED:
                at_up = w_ptr + (row + F)[:, None] * D
                total_up += tl.load(at_up + col[None, :], mask=inside, other=0.0).to(tl.float32) * x
        z = tl.sum(total, axis=1)
        if bias_ptr is not None:
            z += tl.load(bias_ptr + row, mask=f < F, other=0.0).to(tl.float32)
        z = act(z, KIND)
        if IS_GATED:
            up = tl.sum(total_up, axis=1)
            if bias_ptr is not None:
                up += tl.load(bias_ptr + row + F, mask=f < F, other=0.0).to(tl.float32)
            z = z * up_factor(up, KIND)
        tl.store(h_ptr + a.to(tl.int64) * F + f, z.to(h_ptr.dtype.element_ty), mask=f < F)


@jit
def _gemv_down_kernel(
    h_ptr, ids_ptr, weights_ptr, w_ptr, bias_ptr, y_ptr, T, stride_t, stride_k, weight_stride_t, weight_stride_k,
    D, F, E, TOP_K: tl.constexpr, STAGES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) % T).to(tl.int64)
    first = tl.program_id(0) // T * BLOCK_D
    d = first + tl.arange(0, BLOCK_D)
    steps = tl.cdiv(F, BLOCK_F)
    total = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
    biases = tl.zeros([BLOCK_D], tl.float32)
    for step in tl.range(0, TOP_K * steps, num_stages=STAGES):  # one loop over experts and F, so copies never pause
        k = (step // steps).to(tl.int64)
        f = step % steps * BLOCK_F + tl.arange(0, BLOCK_F)
        expert = tl.load(ids_ptr + t * stride_t + k * stride_k)
        kept = (expert >= 0) & (expert < E)
        expert = tl.where(kept, expert, 0).to(tl.int64)
        weight = tl.load(weights_ptr + t * weight_stride_t + k * weight_stride_k, mask=kept, other=0.0)
        h = tl.load(h_ptr + (t * TOP_K + k) * F + f, mask=kept & (f < F), other=0.0).to(tl.float32) * weight
        row = expert * D + first
        inside = (kept & (d < D))[:, None] & (f < F)[None, :]
        at = w_ptr + row * F + (tl.arange(0, BLOCK_D).to(tl.int64)[:, None] * F + f[None, :])
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32) * h[None, :]
        if bias_ptr is not None:
            mask = kept & (d < D) & (step % steps == 0)
            biases += weight * tl.load(bias_ptr + expert * D + d, mask=mask, other=0.0).to(tl.float32)
    y = tl.sum(total, axis=1) + biases
    tl.store(y_ptr + t * D + d, y.to(y_ptr.dtype.element_ty), mask=d < D)


def launch_gemv(
    x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, b_gate_up: Tensor | None,
    b_down: Tensor | None, y: Tensor, activation: str, family: str,
) -> None:  # fmt: skip
    """Two launches into y [T, D]; unchecked. T >= 1."""
    (T, K), (E, D, F) = ids.shape, w_down.shape
    gated = activation in GATED
    up = gemv_config(F, T * K, D, x.element_size(), gated, family)
    down = gemv_config(D, T, F, x.element_size(), False, family)
    h = x.new_empty(T * K, F)
    with on_device(x):
        _gemv_up_kernel[(T * K * cdiv(F, up.block_n),)](
            x, ids, w_gate_up, b_gate_up, h, T * K, *ids.stride(), D, F, E,
            TOP_K=K, KIND=GATED.get(activation, activation), IS_GATED=gated, STAGES=up.num_stages,
            BLOCK_F=up.block_n, BLOCK_D=up.block_k, num_warps=up.num_warps,
        )  # fmt: skip
        _gemv_down_kernel[(T * cdiv(D, down.block_n),)](
            h, ids, weights, w_down, b_down, y, T, *ids.stride(), *weights.stride(), D, F, E,
            TOP_K=K, STAGES=down.num_stages, BLOCK_D=down.block_n, BLOCK_F=down.block_k, num_warps=down.num_warps,
        )  # fmt: skip


def builds() -> list[Build]:
    """Both products at the rows of OLMoE, Qwen3-30B-A3B, gpt-oss and DeepSeek-V3, for 1 and 4 tokens; and size 1."""
    shapes = [(T, D, F) for T in (1, 4) for D, F in ((2048, 1024), (2048, 768), (2880, 2880), (7168, 2048))]
    kinds = [
        (family, dtype, down) for family in TARGETS for dtype in ("bf16", "fp16", "fp32") for down in (False, True)
    ]
    found = [_build(*kind, *shape) for kind in kinds for shape in shapes]
    found += [_build("sm_80", "fp32", down, 1, 1, 1) for down in (False, True)]
    return list({(build.name, build.targets): build for build in found}.values())


def _build(family: str, dtype: str, down: bool, T: int, D: int, F: int) -> Build:
    itemsize = 4 if dtype == "fp32" else 2
    if down:
        kernel, c = _gemv_down_kernel, gemv_config(D, T, F, itemsize, False, family)
        constants = {"BLOCK_D": c.block_n, "BLOCK_F": c.block_k}
    else:
        kernel, c = _gemv_up_kernel, gemv_config(F, 8 * T, D, itemsize, True, family)
        constants = {"BLOCK_F": c.block_n, "BLOCK_D": c.block_k, "KIND": "silu", "IS_GATED": True}
    constants |= {"TOP_K": 8, "STAGES": c.num_stages, "bias_ptr": None}
    if D == 1:  # Triton makes a constant of every integer that equals 1
        constants |= {name: 1 for name in (*UNALIGNED, "D", "F", "E") if name in kernel.arg_names}
    name = f"gemv {'down' if down else 'swiglu up'} {dtype} {c.block_n}x{c.block_k} s{c.num_stages}"
    return Build(
        name + (", sizes 1" if D == 1 else ""), kernel,
        signature(kernel, dtype, constants, ids_ptr="*i32", weights_ptr="*fp32"), constants, (family,),
        num_warps=c.num_warps, unaligned=UNALIGNED,
    )  # fmt: skip
