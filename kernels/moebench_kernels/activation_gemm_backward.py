"""Backward through down-projection and activation in one kernel.

For row r of token t with router weight w, z the pre-activation and a = act(z):

    da[r]      = W_down[e].T dy[t]                a grouped GEMM, dy gathered while it is loaded
    dz[r]      = w * da[r] * act'(z[r])           its epilogue, on the float32 sums
    (w a)[r]   = w * a[r]                         recomputed; what dW_down needs
    d_weights  = <da[r], a[r]>                    a partial sum for each column tile, added in a fixed order

da is never written: it would cost a write and a read of R*F values, and a rounding. The identity for d_weights, which
spares keeping the experts' answers, is SonicMoE's (arXiv 2512.14080).

Shapes: dy [T, D], z [R, mF], weights and d_weights [T, K], w_down [E, D, F], dz [R, mF], wa [R, F], R = T*K.
Rows from offsets[E] on are neither read nor written.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moebench_kernels.activation import GATED, act, act_slope, activate_torch, up_factor, up_slope
from moebench_kernels.build import Build, signature
from moebench_kernels.descriptors import operand
from moebench_kernels.dot import dot
from moebench_kernels.grouped_gemm import grouped_gemm_torch, locate_tile
from moebench_kernels.plan import Plan
from moebench_kernels.runtime import cdiv, interpreting, jit, next_power_of_2, on_device, tl
from moebench_kernels.tiles import TMA_FAMILIES, device_family, processors


def activation_gemm_backward_torch(
    dy: Tensor, w_down: Tensor, z: Tensor, weights: Tensor, plan: Plan, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference: dz, w * a and d_weights, by autograd; any device, float64 included."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    kept, token = plan.row2assignment >= 0, plan.row2token.long()
    weight = torch.where(kept, weights.flatten()[plan.row2assignment.long()], 0).to(wide)[:, None]
    d_answer = torch.where(kept[:, None], dy[token], 0).to(wide)
    with torch.enable_grad():
        leaf = torch.where(kept[:, None], z, 0).to(wide).requires_grad_()
        a = activate_torch(leaf, activation)
        da = grouped_gemm_torch(d_answer, w_down.to(wide), plan, transpose=True)
        (dz,) = torch.autograd.grad(a, leaf, weight * da)
    per_row = (da * a.detach()).sum(1)
    d_weights = torch.zeros_like(weights, dtype=wide).flatten()
    d_weights[plan.row2assignment[kept].long()] = per_row[kept]
    return dz.to(z.dtype), (weight * a.detach()).to(z.dtype), d_weights.view_as(weights).to(weights.dtype)


@dataclass(frozen=True)
class BackwardConfig:
    """Tile: block_m rows (the plan's) by block_n columns of da, block_k of D at a time.

    Attributes:
        parts: runs of columns the epilogue takes one after another.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    parts: int
    group_m: int = 8


# Chosen by the compiler's report (no spill with any activation, fits the shared memory, WGMMA on sm_90 from 64 rows);
# not measured on a GPU. A float32 sum costs a register, and the epilogue holds seven more values a column: it takes
# so few columns at a time that all fit.
_SMALL = BackwardConfig(128, 64, 4, 3, 4)
TILES = {
    "sm_80": {64: BackwardConfig(128, 64, 4, 3, 8), 128: BackwardConfig(128, 32, 8, 4, 4)},
    "sm_90": {64: BackwardConfig(256, 64, 8, 4, 4), 128: BackwardConfig(256, 64, 8, 4, 8)},
    "sm_100": {64: BackwardConfig(256, 64, 8, 4, 4), 128: BackwardConfig(256, 64, 8, 4, 8)},
    "gfx942": {64: BackwardConfig(128, 64, 4, 2, 4), 128: BackwardConfig(128, 64, 8, 2, 4)},
    "gfx950": {64: BackwardConfig(128, 64, 4, 3, 4), 128: BackwardConfig(128, 64, 8, 3, 4)},
    "interpreter": {16: BackwardConfig(64, 64, 4, 1, 2), 64: BackwardConfig(128, 64, 4, 1, 1)},
}
FP32 = BackwardConfig(64, 16, 8, 3, 4)  # IEEE products on FMA units


def backward_config(
    block_m: int, D: int, F: int, dtype: torch.dtype, family: str, kind: str = "silu"
) -> BackwardConfig:
    """The tile, never wider than the matrix."""
    tiles = TILES[family]
    c = tiles.get(max((m for m in tiles if m <= block_m), default=0), _SMALL)
    if dtype == torch.float32 and family != "interpreter":
        c = FP32
    elif c.block_n == 256 and block_m == 128 and kind == "gelu":
        c = replace(c, block_n=128, parts=4)  # erf needs more registers than are left beside 128 sums a thread
    block_n = min(c.block_n, _side(F))
    return replace(c, block_n=block_n, block_k=min(c.block_k, _side(D)), parts=min(c.parts, block_n // 16))


def _side(size: int) -> int:
    return max(16, next_power_of_2(size))  # tl.dot takes no less than 16


@jit
def _finish(
    da, z_ptr, dz_ptr, wa_ptr, weight, row_ok, first, first_col, F,
    KIND: tl.constexpr, IS_GATED: tl.constexpr, NEED_DZ: tl.constexpr, NEED_WA: tl.constexpr,
):  # fmt: skip
    """The epilogue on columns first_col ... of a tile: stores dz and w * a, gives sum over columns of da * a."""
    BLOCK_M: tl.constexpr = da.shape[0]
    WIDTH: tl.constexpr = da.shape[1]
    MAPS: tl.constexpr = 2 if IS_GATED else 1
    row = tl.arange(0, BLOCK_M)[:, None]
    col = tl.arange(0, WIDTH)[None, :]
    exists = row_ok[:, None] & (first_col + col < F)
    at_z = tl.cast(first, tl.int64) * (MAPS * F) + first_col
    in_z = row * (MAPS * F) + col
    z = tl.load(z_ptr + at_z + in_z, mask=exists, other=0.0).to(tl.float32)
    a = act(z, KIND)
    if IS_GATED:
        up = tl.load(z_ptr + at_z + F + in_z, mask=exists, other=0.0).to(tl.float32)
        if NEED_DZ:
            d_up = weight[:, None] * da * a * up_slope(up, KIND)
            tl.store(dz_ptr + at_z + F + in_z, d_up.to(dz_ptr.dtype.element_ty), mask=exists)
        up = up_factor(up, KIND)
        a = a * up
    if NEED_WA:
        at_wa = wa_ptr + (tl.cast(first, tl.int64) * F + first_col) + (row * F + col)
        tl.store(at_wa, (weight[:, None] * a).to(wa_ptr.dtype.element_ty), mask=exists)
    if NEED_DZ:
        slope = act_slope(z, KIND)
        if IS_GATED:
            slope = slope * up
        tl.store(dz_ptr + at_z + in_z, (weight[:, None] * da * slope).to(dz_ptr.dtype.element_ty), mask=exists)
    return tl.sum(tl.where(exists, da * a, 0.0), axis=1)


@jit
def _finish_in_parts(
    da, z_ptr, dz_ptr, wa_ptr, weight, row_ok, first, first_col, F,
    KIND: tl.constexpr, IS_GATED: tl.constexpr, NEED_DZ: tl.constexpr, NEED_WA: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`_finish` on PARTS runs of columns one after another, so that what it holds fits beside the sums."""
    BLOCK_M: tl.constexpr = da.shape[0]
    HALF: tl.constexpr = da.shape[1] // 2
    if PARTS == 1:
        d_weight = _finish(
            da, z_ptr, dz_ptr, wa_ptr, weight, row_ok, first, first_col, F, KIND, IS_GATED, NEED_DZ, NEED_WA
        )
    else:
        left, right = da.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        d_weight = _finish_in_parts(
            left, z_ptr, dz_ptr, wa_ptr, weight, row_ok, first, first_col, F,
            KIND, IS_GATED, NEED_DZ, NEED_WA, PARTS // 2,
        ) + _finish_in_parts(
            right, z_ptr, dz_ptr, wa_ptr, weight, row_ok, first, first_col + HALF, F,
            KIND, IS_GATED, NEED_DZ, NEED_WA, PARTS // 2,
        )  # fmt: skip
    return d_weight


@jit
def _activation_gemm_backward_kernel(
    dy_ptr, w_down, z_ptr, weights_ptr, dz_ptr, wa_ptr, partial_ptr,
    offsets_ptr, row2assignment_ptr, tile_offsets_ptr, tile2expert_ptr, D, F, n_experts, n_rows,
    TOP_K: tl.constexpr, KIND: tl.constexpr, IS_GATED: tl.constexpr,
    NEED_DA: tl.constexpr, NEED_DZ: tl.constexpr, NEED_WA: tl.constexpr, NEED_D_WEIGHTS: tl.constexpr,
    W_TMA: tl.constexpr, EVEN_D: tl.constexpr, INTERPRET: tl.constexpr, GROUP_M: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(F, BLOCK_N)
    row = tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_K)
    col = tl.arange(0, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.load(tile_offsets_ptr + n_experts) * column_tiles, tl.num_programs(0)):
        expert, first, end, column_tile = locate_tile(
            tile, offsets_ptr, tile_offsets_ptr, tile2expert_ptr, column_tiles, BLOCK_M, GROUP_M
        )
        first_col = column_tile * BLOCK_N
        row_ok = first + row < end
        assignment = tl.load(row2assignment_ptr + first + row, mask=row_ok, other=0)
        dy_ptrs = dy_ptr + (assignment // TOP_K).to(tl.int64)[:, None] * D + inner[None, :]
        if not W_TMA:
            w_ptrs = w_down + (tl.cast(expert, tl.int64) * D * F + first_col) + (inner[:, None] * F + col[None, :])
        da = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in tl.range(0, D if NEED_DA else 0, BLOCK_K):
            if EVEN_D:
                a = tl.load(dy_ptrs + k, mask=row_ok[:, None], other=0.0)
            else:
                a = tl.load(dy_ptrs + k, mask=row_ok[:, None] & (inner < D - k)[None, :], other=0.0)
            if W_TMA:
                b = w_down.load([expert, k, first_col]).reshape(BLOCK_K, BLOCK_N)
            else:
                step = tl.cast(k, tl.int64) * F
                if EVEN_D:
                    b = tl.load(w_ptrs + step, mask=(first_col + col < F)[None, :], other=0.0)
                else:
                    inside = (inner < D - k)[:, None] & (first_col + col < F)[None, :]
                    b = tl.load(w_ptrs + step, mask=inside, other=0.0)
            da = dot(a, b, da, INTERPRET)
        weight = tl.load(weights_ptr + assignment, mask=row_ok, other=0.0)
        d_weight = _finish_in_parts(
            da, z_ptr, dz_ptr, wa_ptr, weight, row_ok, first, first_col, F, KIND, IS_GATED, NEED_DZ, NEED_WA, PARTS
        )
        if NEED_D_WEIGHTS:
            tl.store(partial_ptr + tl.cast(column_tile, tl.int64) * n_rows + assignment, d_weight, mask=row_ok)


def launch_activation_gemm_backward(
    dy: Tensor, w_down: Tensor, z: Tensor, weights: Tensor, plan: Plan, activation: str,
    *, need_dz: bool = True, need_wa: bool = True, need_d_weights: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dz [R, mF], w * a [R, F] and d_weights [T, K], unchecked; empty where not needed."""
    (E, D, F), family = w_down.shape, device_family(dy.device)
    dz = torch.empty_like(z) if need_dz else z.new_empty(0)
    wa = z.new_empty(plan.n_rows, F) if need_wa else z.new_empty(0)
    kind = GATED.get(activation, activation)
    c = backward_config(plan.block_m, D, F, dy.dtype, family, kind)
    column_tiles = cdiv(F, c.block_n)
    partial = weights.new_zeros(column_tiles if need_d_weights else 0, *weights.shape)
    if plan.n_rows:
        w_in, w_tma = operand(w_down, [E, D, F], [1, c.block_k, c.block_n], family in TMA_FAMILIES)
        with on_device(dy):
            _activation_gemm_backward_kernel[(min(plan.n_row_tiles * column_tiles, processors(dy.device)),)](
                dy, w_in, z, weights, dz, wa, partial,
                plan.offsets, plan.row2assignment, plan.tile_offsets, plan.tile2expert, D, F, E, plan.n_rows,
                TOP_K=plan.top_k, KIND=kind, IS_GATED=activation in GATED, NEED_DA=need_dz or need_d_weights,
                NEED_DZ=need_dz, NEED_WA=need_wa, NEED_D_WEIGHTS=need_d_weights, W_TMA=w_tma,
                EVEN_D=D % c.block_k == 0, INTERPRET=interpreting(), GROUP_M=c.group_m, PARTS=c.parts,
                BLOCK_M=plan.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k,
                num_warps=c.num_warps, num_stages=c.num_stages,
            )  # fmt: skip
    return dz, wa, partial.sum(0) if need_d_weights else weights.new_empty(0)


def builds() -> list[Build]:
    """The kernel in each shipped tile; with the activations that need most registers."""
    found = []
    for family, tiles in TILES.items():
        if family == "interpreter":
            continue
        for block_m in (16, 32, *tiles):
            found += [_build(family, "bf16", block_m, kind) for kind in ("clamped", "gelu")]
        found += [_build(family, "fp32", block_m, "gelu") for block_m in (16, 64, 128)]
        found += [_build(family, "fp16", 128, "silu"), _build(family, "bf16", 128, "relu")]
    return found


def _build(family: str, dtype: str, block_m: int, kind: str) -> Build:
    c = backward_config(block_m, 2048, 2048, torch.float32 if dtype == "fp32" else torch.bfloat16, family, kind)
    tma = family in TMA_FAMILIES
    needs = dict.fromkeys(("NEED_DA", "NEED_DZ", "NEED_WA", "NEED_D_WEIGHTS"), True)
    constants = needs | {
        "TOP_K": 8, "KIND": kind, "IS_GATED": kind != "relu", "W_TMA": tma, "EVEN_D": True, "INTERPRET": False,
        "GROUP_M": c.group_m, "PARTS": c.parts, "BLOCK_M": block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k,
    }  # fmt: skip
    types = dict.fromkeys(("offsets_ptr", "row2assignment_ptr", "tile_offsets_ptr", "tile2expert_ptr"), "*i32")
    types |= dict.fromkeys(("weights_ptr", "partial_ptr"), "*fp32")
    types["w_down"] = f"tensordesc<{dtype}[1, {c.block_k}, {c.block_n}]>" if tma else f"*{dtype}"
    cores = {"sm_80": ("mma",), "sm_90": ("wgmma", "tma"), "sm_100": ("tma",)}.get(family, ("mfma",))
    return Build(
        f"activation_gemm_backward {kind} {dtype} {family} m{block_m}", _activation_gemm_backward_kernel,
        signature(_activation_gemm_backward_kernel, dtype, constants, **types), constants, (family,),
        c.num_warps, c.num_stages, unaligned=("n_experts", "n_rows"),
        expect=() if dtype == "fp32" or block_m < 64 else cores,
    )  # fmt: skip
