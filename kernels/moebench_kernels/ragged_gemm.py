"""Ragged-K grouped GEMM: each expert's weight gradient, summed over its own rows.

    dW[e] = sum over r of e  left[r] outer right[r]        offsets[e] <= r < offsets[e + 1]; 0 where e has no rows

Either operand may be gathered from a token-major tensor while it is loaded (row r reads token
row2assignment[r] // K), which spares the permuted copy.

A fixed number of programs walk the tiles of all dW, experts with most rows first: program p takes tiles
p, p + P, p + 2P, ... Loads fall along that list, so no two programs differ by more than the longest tile,
however skewed the routing; and the tiles in flight belong to few experts, whose rows stay in L2. Blocks of
rows that lie wholly inside the expert need no row mask; one masked step takes the rest.

Shapes: left [R, M], right [R, N] (or token-major [T, ...]), R = T*K, dW [E, M, N].
"""

from dataclasses import replace

import torch
from torch import Tensor

from moebench_kernels.build import Build, signature
from moebench_kernels.checks import FLOATS, check_launch, check_one_device, check_same_dtype, check_tensor
from moebench_kernels.descriptors import operand
from moebench_kernels.dot import dot
from moebench_kernels.plan import Plan, check_plan
from moebench_kernels.ragged_tiles import TILES, RaggedConfig, ragged_config, ragged_kind
from moebench_kernels.runtime import cdiv, interpreting, jit, on_device, tl
from moebench_kernels.tiles import TMA_FAMILIES, device_family, processors, tile_rows
from moebench_kernels.tuned_tiles import pick_ragged_config


def ragged_gemm_torch(
    left: Tensor, right: Tensor, plan: Plan, *, gather_left: bool = False, gather_right: bool = False
) -> Tensor:
    """Reference of `ragged_gemm`, one expert at a time; any device, float64 included. Reads the offsets."""
    wide = torch.promote_types(left.dtype, torch.float32)
    bounds, token = plan.offsets.tolist(), plan.row2token.long()
    rows = [torch.arange(bounds[e], bounds[e + 1], device=left.device) for e in range(plan.n_experts)]
    parts = [
        left[token[r] if gather_left else r].to(wide).mT @ right[token[r] if gather_right else r].to(wide) for r in rows
    ]
    return torch.stack(parts).to(left.dtype)


@jit
def _load_block(
    source, first, token, first_col, width, row_ok,
    TMA: tl.constexpr, GATHER: tl.constexpr, MASKED: tl.constexpr, TURN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows from `first` on (those named by `token` where gathered) by BLOCK columns; transposed by TURN.

    Pointers are laid out transposed rather than the block turned: only so are the copies asynchronous on sm_80.
    """
    if TMA:
        block = source.load([first, first_col])
        if MASKED:
            block = tl.where(row_ok[:, None], block, tl.zeros([BLOCK_R, BLOCK], block.dtype))
        if TURN:
            block = tl.trans(block)
    else:
        col = first_col + tl.arange(0, BLOCK)
        if GATHER:
            row = source + token.to(tl.int64) * width
        else:
            row = source + tl.cast(first, tl.int64) * width + tl.arange(0, BLOCK_R) * width
        if TURN:
            at = row[None, :] + col[:, None]
            exists = (col < width)[:, None]
            if MASKED:
                exists = exists & row_ok[None, :]
        else:
            at = row[:, None] + col[None, :]
            exists = (col < width)[None, :]
            if MASKED:
                exists = exists & row_ok[:, None]
        block = tl.load(at, mask=exists, other=0.0)
    return block


@jit
def _ragged_gemm_kernel(
    left, right, dw_ptr, offsets_ptr, order_ptr, row2assignment_ptr, M, N, n_experts,
    TOP_K: tl.constexpr, GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr,
    LEFT_TMA: tl.constexpr, RIGHT_TMA: tl.constexpr, INTERPRET: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    GATHER: tl.constexpr = GATHER_LEFT or GATHER_RIGHT
    row_tiles = tl.cdiv(M, BLOCK_M)
    column_tiles = tl.cdiv(N, BLOCK_N)
    tiles = row_tiles * column_tiles
    in_block = tl.arange(0, BLOCK_R)
    for at in tl.range(tl.program_id(0), n_experts * tiles, tl.num_programs(0)):
        expert = tl.load(order_ptr + at // tiles)
        tile = at % tiles
        in_group = tile % (GROUP_M * column_tiles)
        first_of_group = tile // (GROUP_M * column_tiles) * GROUP_M
        group = tl.minimum(row_tiles - first_of_group, GROUP_M)
        m = (first_of_group + in_group % group) * BLOCK_M
        n = in_group // group * BLOCK_N
        start = tl.load(offsets_ptr + expert)
        end = tl.load(offsets_ptr + expert + 1)
        whole = start + (end - start) // BLOCK_R * BLOCK_R
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        token = in_block
        following = in_block
        if GATHER:
            token = tl.load(row2assignment_ptr + start + in_block, mask=start + in_block < end, other=0) // TOP_K
        for first in tl.range(start, whole, BLOCK_R):
            if GATHER:  # one block ahead: were it loaded for this one, the pipeliner would halve the blocks in flight
                ahead = first + BLOCK_R + in_block
                following = tl.load(row2assignment_ptr + ahead, mask=ahead < end, other=0) // TOP_K
            a = _load_block(left, first, token, m, M, None, LEFT_TMA, GATHER_LEFT, False, True, BLOCK_R, BLOCK_M)
            b = _load_block(right, first, token, n, N, None, RIGHT_TMA, GATHER_RIGHT, False, False, BLOCK_R, BLOCK_N)
            total = dot(a, b, total, INTERPRET)
            token = following
        if whole < end:
            ok = whole + in_block < end
            a = _load_block(left, whole, token, m, M, ok, LEFT_TMA, GATHER_LEFT, True, True, BLOCK_R, BLOCK_M)
            b = _load_block(right, whole, token, n, N, ok, RIGHT_TMA, GATHER_RIGHT, True, False, BLOCK_R, BLOCK_N)
            total = dot(a, b, total, INTERPRET)
        in_m = tl.arange(0, BLOCK_M)
        in_n = tl.arange(0, BLOCK_N)
        at_dw = dw_ptr + (expert.to(tl.int64) * M + m) * N + n + (in_m[:, None] * N + in_n[None, :])
        exists = (in_m < M - m)[:, None] & (in_n < N - n)[None, :]
        tl.store(at_dw, total.to(dw_ptr.dtype.element_ty), mask=exists)


def heaviest_first(offsets: Tensor) -> Tensor:
    """int32 [E], experts by falling number of rows; the lower id first where equal."""
    return torch.argsort(offsets.diff(), descending=True, stable=True).int()


def launch_ragged_tiles(
    left: Tensor, right: Tensor, offsets: Tensor, row2assignment: Tensor, top_k: int,
    gather_left: bool, gather_right: bool, config: RaggedConfig | None = None,
) -> Tensor:  # fmt: skip
    """dW [E, M, N], unchecked; in this tile instead of the one that is picked, where `config` is given."""
    M, N, E, n_rows = left.shape[1], right.shape[1], offsets.shape[0] - 1, row2assignment.shape[0]
    if n_rows == 0:
        return right.new_zeros(E, M, N)
    dw, family = right.new_empty(E, M, N), device_family(right.device)
    kind = ragged_kind(gather_left, gather_right)
    c = config or pick_ragged_config(kind, tile_rows(n_rows / E), M, N, right.dtype, right.device)
    tma = family in TMA_FAMILIES
    left_in, left_tma = operand(left, list(left.shape), [c.block_r, c.block_m], tma and not gather_left)
    right_in, right_tma = operand(right, list(right.shape), [c.block_r, c.block_n], tma and not gather_right)
    programs = min(processors(right.device) * c.per_unit, E * cdiv(M, c.block_m) * cdiv(N, c.block_n))
    with on_device(right):
        _ragged_gemm_kernel[(programs,)](
            left_in, right_in, dw, offsets, heaviest_first(offsets), row2assignment, M, N, E,
            TOP_K=top_k, GATHER_LEFT=gather_left, GATHER_RIGHT=gather_right, LEFT_TMA=left_tma, RIGHT_TMA=right_tma,
            INTERPRET=interpreting(), GROUP_M=c.group_m, BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_R=c.block_r,
            num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
    return dw


@torch.library.custom_op("moebench::ragged_gemm", mutates_args=())
def _ragged_gemm(
    left: Tensor, right: Tensor, offsets: Tensor, row2assignment: Tensor, top_k: int,
    gather_left: bool, gather_right: bool,
) -> Tensor:  # fmt: skip
    check_launch(left=left, right=right, plan=offsets)
    return launch_ragged_tiles(left, right, offsets, row2assignment, top_k, gather_left, gather_right)


@_ragged_gemm.register_fake
def _(left, right, offsets, row2assignment, top_k, gather_left, gather_right):  # type: ignore[no-untyped-def]
    return right.new_empty(offsets.shape[0] - 1, left.shape[1], right.shape[1])


def launch_ragged_gemm(
    left: Tensor, right: Tensor, plan: Plan, *, gather_left: bool = False, gather_right: bool = False
) -> Tensor:
    """`ragged_gemm`, unchecked."""
    return torch.ops.moebench.ragged_gemm(
        left, right, plan.offsets, plan.row2assignment, plan.top_k, gather_left, gather_right
    )


def ragged_gemm(
    left: Tensor, right: Tensor, plan: Plan, *, gather_left: bool = False, gather_right: bool = False
) -> Tensor:
    """dW[e] = left[rows of e].T @ right[rows of e], the weight gradient of a grouped GEMM. Not differentiable.

    Args:
        left: [T*K, M] in the plan's order, or token-major [T, M] where `gather_left`; float32, float16 or bfloat16,
            contiguous. Rows from offsets[E] on are not used.
        right: [T*K, N], or [T, N] where `gather_right`; of left's dtype.
        plan: of these rows.

    Returns:
        [E, M, N] of that dtype, summed in float32; exact zeros for an expert without rows. The same bits each time.

    Raises:
        TypeError, ValueError: before any launch.

    Source: K-grouped GEMM as in MegaBlocks, arXiv 2211.15841, section 4 (the DDS product of its backward).
    """
    check_plan(plan)
    check_tensor("left", left, (plan.n_tokens if gather_left else plan.n_rows, "M"), FLOATS)
    check_tensor("right", right, (plan.n_tokens if gather_right else plan.n_rows, "N"), FLOATS)
    check_same_dtype(left=left, right=right)
    check_one_device(left=left, right=right, plan=plan.counts)
    return launch_ragged_gemm(left, right, plan, gather_left=gather_left, gather_right=gather_right)


def builds() -> list[Build]:
    """The kernel as the layer launches it (dW of up gathers right, of down gathers left) and with both in order."""
    forms = {"dw_up": (False, True), "dw_down": (True, False), "rows": (False, False)}
    families = [family for family in TILES if family != "interpreter"]
    return [
        _build(family, dtype, form, *gather)
        for family in families
        for dtype in ("bf16", "fp16", "fp32")
        for form, gather in forms.items()
        if dtype == "bf16" or form == "dw_up"
    ]


def _build(family: str, dtype: str, form: str, gather_left: bool, gather_right: bool) -> Build:
    wide = torch.float32 if dtype == "fp32" else torch.bfloat16
    c = ragged_config(ragged_kind(gather_left, gather_right), 2048, 2048, wide, family)
    tensor_cores = {"sm_80": ("mma",), "sm_90": ("wgmma", "tma"), "sm_100": ("tma",)}.get(family, ("mfma",))
    built = build(family, dtype, gather_left, gather_right, c)
    return replace(
        built, name=f"ragged_gemm {form} {dtype} {family}", expect=() if dtype == "fp32" else tensor_cores
    )  # fmt: skip


def build(family: str, dtype: str, gather_left: bool, gather_right: bool, c: RaggedConfig) -> Build:
    """One tile as it would be launched on aligned operands."""
    tma = family in TMA_FAMILIES
    blocks = {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_R": c.block_r, "GROUP_M": c.group_m}
    constants = blocks | {
        "TOP_K": 8, "GATHER_LEFT": gather_left, "GATHER_RIGHT": gather_right, "INTERPRET": False,
        "LEFT_TMA": tma and not gather_left, "RIGHT_TMA": tma and not gather_right,
    }  # fmt: skip
    types = dict.fromkeys(("offsets_ptr", "order_ptr", "row2assignment_ptr"), "*i32")
    for name, block, descriptor in (("left", c.block_m, "LEFT_TMA"), ("right", c.block_n, "RIGHT_TMA")):
        types[name] = f"tensordesc<{dtype}[{c.block_r}, {block}]>" if constants[descriptor] else f"*{dtype}"
    return Build(
        f"ragged_gemm {dtype}", _ragged_gemm_kernel, signature(_ragged_gemm_kernel, dtype, constants, **types),
        constants, (family,), c.num_warps, c.num_stages, unaligned=("n_experts",),
    )  # fmt: skip
