"""Grouped GEMM: each expert's matrix on its own rows.

    out[r] = act(rows[r] @ W[e].T + bias[e])         for offsets[e] <= r < offsets[e + 1]; 0 past offsets[E]

Rows are not padded: a tile never crosses experts. The kernel is persistent: a fixed number of programs go over
the tiles, whose number only the device knows (plan.tile_offsets). Within an expert the tiles run in bands of
group_m row tiles, column after column, so that a band's rows and a column's weights stay in L2.

A gated kind has its gate and up columns side by side in one tile (one product of full width), and multiplies them
in the epilogue. Rows may be gathered from a token-major tensor while they are loaded (row r reads token
row2assignment[r] // K), which spares the permuted copy.

Operands come by tensor descriptors (TMA) where the device has them and the matrix is aligned to 16 bytes, else by
pointers. A descriptor's tile may run over into the next expert's rows; those products are not stored.

Products are accumulated in float32. float32 inputs are multiplied in IEEE float32, not TF32.

Shapes: rows [R, K], W [E, N, K] ([E, K, N] when transposed; [E, 2N, K] when gated), bias [E, N] ([E, 2N]),
out [R, N]; here N and K are the matrix's sizes, not top-k.
"""

from typing import Any

import torch
from torch import Tensor

from moebench_kernels.activation import GATED, act, up_factor
from moebench_kernels.bias_gradient import bias_gradient
from moebench_kernels.build import Build, signature
from moebench_kernels.checks import FLOATS, check_launch, check_one_device, check_same_dtype, check_tensor
from moebench_kernels.descriptors import operand
from moebench_kernels.dot import dot
from moebench_kernels.plan import Plan, check_plan
from moebench_kernels.ragged_gemm import launch_ragged_gemm
from moebench_kernels.runtime import cdiv, interpreting, jit, on_device, tl
from moebench_kernels.tiles import BLOCK_MS, SHIPPED, GemmConfig, gemm_kind, processors, shipped_config
from moebench_kernels.tuned_tiles import pick_config


def grouped_gemm_torch(
    rows: Tensor, weights: Tensor, plan: Plan, *, transpose: bool = False, bias: Tensor | None = None
) -> Tensor:
    """Reference of `grouped_gemm`, one expert at a time; runs on any device, float64 included. Reads the offsets."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    bounds = plan.offsets.tolist()
    matrices = weights if transpose else weights.mT
    parts = [rows[bounds[e] : bounds[e + 1]].to(wide) @ matrices[e].to(wide) for e in range(plan.n_experts)]
    if bias is not None:
        parts = [part + bias[e].to(wide) for e, part in enumerate(parts)]
    tail = rows.new_zeros(plan.n_rows - bounds[-1], matrices.shape[2], dtype=wide)
    return torch.cat([*parts, tail]).to(rows.dtype)


@jit
def locate_tile(
    tile, offsets_ptr, tile_offsets_ptr, tile2expert_ptr, column_tiles, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr
):
    """Expert, first row, end of the expert's rows and column tile of the tile-th tile, of those that have an expert.

    The tiles of an expert are numbered in bands of GROUP_M row tiles; in a band down the rows, then across.
    """
    expert = tl.load(tile2expert_ptr + tile // column_tiles)
    first_tile = tl.load(tile_offsets_ptr + expert)
    row_tiles = tl.load(tile_offsets_ptr + expert + 1) - first_tile
    tile_of_expert = tile - first_tile * column_tiles
    band = tile_of_expert // (GROUP_M * column_tiles) * GROUP_M
    height = tl.minimum(row_tiles - band, GROUP_M)
    in_band = tile_of_expert % (GROUP_M * column_tiles)
    first = tl.load(offsets_ptr + expert) + (band + in_band % height) * BLOCK_M
    return expert, first, tl.load(offsets_ptr + expert + 1), in_band // height


@jit
def _store_tile(
    total, up, out_ptr, z_ptr, bias_ptr, expert, first, end, first_col, N,
    KIND: tl.constexpr, IS_GATED: tl.constexpr, SAVE_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Bias, pre-activation, activation and output of sums [BLOCK_M, WIDTH]; of a gated kind `total` is the gate's."""
    MAPS: tl.constexpr = 2 if IS_GATED else 1
    row = tl.arange(0, total.shape[0])
    col = tl.arange(0, total.shape[1])
    col_ok = first_col + col < N
    exists = (first + row < end)[:, None] & col_ok[None, :]
    at_bias = bias_ptr
    at_z = z_ptr
    if HAS_BIAS:
        at_bias += tl.cast(expert, tl.int64) * (MAPS * N) + first_col + col
        total += tl.load(at_bias, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    if SAVE_Z:
        at_z += tl.cast(first, tl.int64) * (MAPS * N) + first_col
        at_z += row[:, None] * (MAPS * N) + col[None, :]
        tl.store(at_z, total.to(z_ptr.dtype.element_ty), mask=exists)
    if KIND != "none":
        total = act(total, KIND)
    if IS_GATED:  # only now, when the gate's registers are few
        if HAS_BIAS:
            up += tl.load(at_bias + N, mask=col_ok, other=0.0).to(tl.float32)[None, :]
        if SAVE_Z:
            tl.store(at_z + N, up.to(z_ptr.dtype.element_ty), mask=exists)
        total = total * up_factor(up, KIND)
    at = out_ptr + (tl.cast(first, tl.int64) * N + first_col) + (row[:, None] * N + col[None, :])
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=exists)


@jit
def _split(tile):
    """The left and the right half of the columns."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@jit
def _grouped_gemm_kernel(
    rows, weights, out_ptr, z_ptr, bias_ptr, offsets_ptr, row2assignment_ptr, tile_offsets_ptr, tile2expert_ptr,
    n_rows, N, K, n_experts,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, TRANSPOSE: tl.constexpr, KIND: tl.constexpr, IS_GATED: tl.constexpr,
    SAVE_Z: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS_TMA: tl.constexpr, W_TMA: tl.constexpr, EVEN_K: tl.constexpr,
    INTERPRET: tl.constexpr, GROUP_M: tl.constexpr, SWAP: tl.constexpr, FLATTEN: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    MAPS: tl.constexpr = 2 if IS_GATED else 1
    WIDTH: tl.constexpr = BLOCK_N // MAPS
    column_tiles = tl.cdiv(N, WIDTH)
    row = tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_K)
    map_col = tl.arange(0, BLOCK_N) % WIDTH  # the tile's gate columns, then the same of up
    map_start = tl.arange(0, BLOCK_N) // WIDTH * N
    work_tiles = tl.load(tile_offsets_ptr + n_experts) * column_tiles
    for tile in tl.range(tl.program_id(0), work_tiles, tl.num_programs(0), flatten=FLATTEN):
        expert, first, end, column_tile = locate_tile(
            tile, offsets_ptr, tile_offsets_ptr, tile2expert_ptr, column_tiles, BLOCK_M, GROUP_M
        )
        first_col = column_tile * WIDTH
        row_ok = first + row < end
        if not ROWS_TMA:
            if GATHER:
                token = tl.load(row2assignment_ptr + first + row, mask=row_ok, other=0) // TOP_K
                a_ptrs = rows + token.to(tl.int64)[:, None] * K + inner[None, :]
            else:
                a_ptrs = rows + tl.cast(first, tl.int64) * K + (row[:, None] * K + inner[None, :])
        if not W_TMA:
            matrix = weights + tl.cast(expert, tl.int64) * MAPS * N * K
            b_ok = first_col + map_col < N
            if TRANSPOSE:
                b_ptrs = matrix + first_col + (inner[:, None] * N + map_col[None, :])
            else:
                b_ptrs = matrix + (first_col + map_start + map_col).to(tl.int64)[None, :] * K + inner[:, None]
        # Nothing may be added here (a bias, say): unless the sum starts at zero, a flattened loop is not pipelined.
        total = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            if ROWS_TMA:
                a = rows.load([first, k])
            elif EVEN_K:
                a = tl.load(a_ptrs + k, mask=row_ok[:, None], other=0.0)
            else:
                a = tl.load(a_ptrs + k, mask=row_ok[:, None] & (inner < K - k)[None, :], other=0.0)
            if W_TMA and TRANSPOSE:
                b = weights.load([expert, 0, k, first_col]).reshape(BLOCK_K, BLOCK_N)
            elif W_TMA:
                b = weights.load([expert, 0, first_col, k]).reshape(BLOCK_N, BLOCK_K).T
            else:
                step = tl.cast(k, tl.int64) * N if TRANSPOSE else k
                if EVEN_K:
                    b = tl.load(b_ptrs + step, mask=b_ok[None, :], other=0.0)
                else:
                    b = tl.load(b_ptrs + step, mask=(inner < K - k)[:, None] & b_ok[None, :], other=0.0)
            total = dot(b.T, a.T, total, INTERPRET) if SWAP else dot(a, b, total, INTERPRET)
        if SWAP:
            total = total.T
        up = total
        if IS_GATED:
            total, up = _split(total)
        if HALVES:
            left, right = _split(total)
            left_up = left
            right_up = right
            if IS_GATED:
                left_up, right_up = _split(up)
            _store_tile(
                left, left_up, out_ptr, z_ptr, bias_ptr, expert, first, end, first_col, N,
                KIND, IS_GATED, SAVE_Z, HAS_BIAS,
            )  # fmt: skip
            _store_tile(
                right, right_up, out_ptr, z_ptr, bias_ptr, expert, first, end, first_col + WIDTH // 2, N,
                KIND, IS_GATED, SAVE_Z, HAS_BIAS,
            )  # fmt: skip
        else:
            _store_tile(
                total, up, out_ptr, z_ptr, bias_ptr, expert, first, end, first_col, N, KIND, IS_GATED, SAVE_Z, HAS_BIAS
            )
    first_zero = tl.load(offsets_ptr + n_experts)  # the rows of no expert; none is read, so no product
    for tile in range(tl.program_id(0), tl.cdiv(n_rows - first_zero, BLOCK_M) * column_tiles, tl.num_programs(0)):
        first = first_zero + tile // column_tiles * BLOCK_M
        first_col = tile % column_tiles * WIDTH
        zero = tl.zeros([BLOCK_M, WIDTH], tl.float32)
        _store_tile(
            zero, zero, out_ptr, z_ptr, bias_ptr, 0, first, n_rows, first_col, N, "none", IS_GATED, SAVE_Z, False
        )


def _operands(rows: Tensor, weights: Tensor, c: GemmConfig, block_m: int, gather: bool, maps: int, transpose: bool):  # type: ignore[no-untyped-def]
    """Rows and weights as the kernel takes them: descriptors where the tile wants them and they can be."""
    E, a, b = weights.shape
    w_block = [1, 1, c.block_k, c.block_n] if transpose else [1, maps, c.block_n // maps, c.block_k]
    a_in, a_tma = operand(rows, list(rows.shape), [block_m, c.block_k], c.tma and not gather)
    w_in, w_tma = operand(weights, [E, maps, a // maps, b], w_block, c.tma)
    return a_in, w_in, a_tma, w_tma


def launch_grouped_gemm(
    rows: Tensor,
    weights: Tensor,
    plan: Plan,
    *,
    transpose: bool = False,
    gather: bool = False,
    activation: str | None = None,
    save_z: bool = False,
    bias: Tensor | None = None,
    config: GemmConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """out [R, N], and the pre-activation z [R, mN] where `save_z`; shapes unchecked.

    `gather`: rows is token-major [T, K]. `config`: this tile instead of the one `tiles` picks.
    """
    maps = 2 if activation in GATED else 1
    K, E, block_m = rows.shape[1], plan.n_experts, plan.block_m
    N = weights.shape[2 if transpose else 1] // maps
    out = rows.new_empty(plan.n_rows, N)
    z = rows.new_empty(plan.n_rows, maps * N) if save_z else None
    if plan.n_rows == 0:
        return out, z
    c = config or pick_config(gemm_kind(gather, maps == 2, transpose), block_m, N, K, rows.dtype, rows.device)
    tiles = plan.n_row_tiles * cdiv(N, c.block_n // maps)
    if maps * N >= 2**24 or K >= 2**24 or tiles >= 2**31:
        raise ValueError(
            f"{plan.n_rows} rows by {N} columns by {K}: at most 2**24 columns and 2**31 tiles are possible"
        )
    rows_in, w_in, rows_tma, w_tma = _operands(rows, weights, c, block_m, gather, maps, transpose)
    with on_device(rows):
        _grouped_gemm_kernel[(min(tiles, processors(rows.device) * c.ctas_per_sm),)](
            rows_in, w_in, out, z, bias, plan.offsets, plan.row2assignment, plan.tile_offsets, plan.tile2expert,
            plan.n_rows, N, K, E,
            TOP_K=plan.top_k, GATHER=gather, TRANSPOSE=transpose, KIND=GATED.get(activation, activation or "none"),
            IS_GATED=maps == 2, SAVE_Z=save_z, HAS_BIAS=bias is not None, ROWS_TMA=rows_tma, W_TMA=w_tma,
            EVEN_K=K % c.block_k == 0 or (rows_tma and w_tma), INTERPRET=interpreting(),
            GROUP_M=c.group_m, SWAP=c.swap, FLATTEN=c.flatten, HALVES=c.halves,
            BLOCK_M=block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
    return out, z


@torch.library.custom_op("moebench::grouped_gemm", mutates_args=())
def _grouped_gemm(
    rows: Tensor, weights: Tensor, bias: Tensor | None, plan: list[Tensor], block_m: int, transpose: bool
) -> Tensor:
    check_launch(rows=rows, weights=weights, plan=plan[0], bias=rows if bias is None else bias)
    return launch_grouped_gemm(rows, weights, Plan(*plan, block_m), transpose=transpose, bias=bias)[0]


@_grouped_gemm.register_fake
def _(rows, weights, bias, plan, block_m, transpose):  # type: ignore[no-untyped-def]
    return rows.new_empty(rows.shape[0], weights.shape[2 if transpose else 1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, bias, plan, ctx.block_m, ctx.transpose = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(rows, weights, *plan)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
    rows, weights, *tensors = ctx.saved_tensors
    plan, d_out, d_rows, d_weights, d_bias = Plan(*tensors, ctx.block_m), d_out.contiguous(), None, None, None
    if ctx.needs_input_grad[0]:
        d_rows = _grouped_gemm(d_out, weights, None, tensors, ctx.block_m, not ctx.transpose)
    if ctx.needs_input_grad[1]:
        d_weights = launch_ragged_gemm(*((rows, d_out) if ctx.transpose else (d_out, rows)), plan)
    if ctx.needs_input_grad[2]:
        d_bias = bias_gradient(d_out, plan.offsets).to(ctx.bias_dtype)
    return d_rows, d_weights, d_bias, [None] * len(tensors), None, None


_grouped_gemm.register_autograd(_backward, setup_context=_setup)


def check_bias(name: str, bias: Tensor | None, n_experts: int, width: int, dtype: torch.dtype) -> None:
    """Raise unless bias is None or [E, width], of the weights' dtype or float32."""
    if bias is not None:
        check_tensor(name, bias, (n_experts, width), tuple({dtype, torch.float32}))


def grouped_gemm(
    rows: Tensor, weights: Tensor, plan: Plan, *, transpose: bool = False, bias: Tensor | None = None
) -> Tensor:
    """out[r] = rows[r] @ weights[e].T + bias[e] for every row r of expert e. Differentiable in all three.

    Args:
        rows: [T*K, D_in], float32, float16 or bfloat16, contiguous, in the plan's order. Rows past offsets[E] do
            not count.
        weights: [E, D_out, D_in] of the same dtype; [E, D_in, D_out] when `transpose`.
        plan: of these rows.
        bias: [E, D_out], of the same dtype or float32.

    Returns:
        [T*K, D_out] of the same dtype, accumulated in float32; zero past offsets[E].

    Raises:
        TypeError, ValueError: before any launch.

    Source: MegaBlocks, arXiv 2211.15841, section 4 (grouped GEMM over ragged experts).
    """
    check_plan(plan)
    check_tensor(
        "weights", weights, (plan.n_experts, "D_in" if transpose else "D_out", "D_out" if transpose else "D_in"), FLOATS
    )
    check_tensor("rows", rows, (plan.n_rows, weights.shape[1 if transpose else 2]), FLOATS)
    check_same_dtype(rows=rows, weights=weights)
    check_bias("bias", bias, plan.n_experts, weights.shape[2 if transpose else 1], weights.dtype)
    check_one_device(rows=rows, weights=weights, bias=bias, plan=plan.counts)
    return _grouped_gemm(rows, weights, bias, list(plan[:-1]), plan.block_m, transpose)


def builds() -> list[Build]:
    """Each kind in each shipped 16-bit tile, with all that costs registers; float32, float16, no TMA as a sample."""
    families = [family for family in SHIPPED if family != "interpreter"]
    found = [build(f, "bf16", m, *variant) for f in families for m in BLOCK_MS for variant in _VARIANTS]
    found += [build(f, "fp32", m, True, "swiglu", False) for f in families for m in (16, 64, 128)]
    found += [build(f, "fp32", 128, False, None, t) for f in families for t in (False, True)]
    found += [build(f, "fp16", 128, True, "clamped_swiglu", False) for f in families]
    hopper = ("sm_90", "sm_100")
    return found + [build(f, "bf16", m, False, None, False, tma=False) for f in hopper for m in BLOCK_MS]


# gather, activation, transpose: forward, dX, dX of the down-projection from dy, up-projections.
_VARIANTS = (
    (False, None, False),
    (False, None, True),
    (True, None, True),
    (True, "swiglu", False),
    (False, "geglu", False),
    (True, "gelu", False),
)
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build(
    family: str,
    dtype: str,
    block_m: int,
    gather: bool,
    activation: str | None,
    transpose: bool,
    *,
    tma: bool = True,
    config: GemmConfig | None = None,
) -> Build:
    """One product as it would be launched on a large matrix; with an activation also bias and pre-activation."""
    maps, keep = 2 if activation in GATED else 1, activation is not None
    kind = gemm_kind(gather, maps == 2, transpose)
    c = config or shipped_config(kind, block_m, 4096, 4096, _DTYPES[dtype], family)
    w_tma, rows_tma = c.tma and tma, c.tma and tma and not gather
    constants = {
        "TOP_K": 8, "GATHER": gather, "TRANSPOSE": transpose, "KIND": GATED.get(activation, activation or "none"),
        "IS_GATED": maps == 2, "SAVE_Z": keep, "HAS_BIAS": keep, "ROWS_TMA": rows_tma, "W_TMA": w_tma,
        "EVEN_K": True, "INTERPRET": False, "GROUP_M": c.group_m, "SWAP": c.swap, "FLATTEN": c.flatten,
        "HALVES": c.halves, "BLOCK_M": block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k,
    } | ({} if keep else {"z_ptr": None, "bias_ptr": None})  # fmt: skip
    w_block = [1, 1, c.block_k, c.block_n] if transpose else [1, maps, c.block_n // maps, c.block_k]
    types = dict.fromkeys(("offsets_ptr", "row2assignment_ptr", "tile_offsets_ptr", "tile2expert_ptr"), "*i32")
    types |= {"rows": f"tensordesc<{dtype}{[block_m, c.block_k]}>" if rows_tma else f"*{dtype}"}
    types |= {"weights": f"tensordesc<{dtype}{w_block}>" if w_tma else f"*{dtype}"}
    types |= {"bias_ptr": "*fp32"} if keep else {}
    cores = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}.get(family, "mfma")
    return Build(
        name=" ".join(
            filter(None, ("grouped_gemm", kind, activation, dtype, f"m{block_m}", "tma" if w_tma else "pointers"))
        ),
        kernel=_grouped_gemm_kernel,
        signature=signature(_grouped_gemm_kernel, dtype, constants, **types),
        constants=constants,
        targets=(family,),
        num_warps=c.num_warps,
        num_stages=c.num_stages,
        unaligned=("n_rows", "n_experts"),
        expect=() if dtype == "fp32" else (cores, "tma") if w_tma else (cores,),
    )
