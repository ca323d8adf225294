"""The two kernels of `quantised_gemm`, which says what they compute; one for 8-bit operands and one for 4-bit weights.

Both walk the plan's row tiles times the column tiles from a grid as large as the device, in an order that keeps an
expert's weights in L2; rows may be gathered from a token-major tensor while they are loaded; rows of no expert become
zeros.

Sums of int8 are int32 and exact. Sums of fp8 are the matrix unit's: Hopper's keeps about 14 bits while it adds
(DeepSeek-V3, arXiv 2412.19437, section 3.3.2), so "fp8:row" leaves the whole sum to it and "fp8:128" only 128
columns, which are then added in float32. The integers -8..7 are exact in 16 bits, so "w4a16" rounds no weight: a
group's partial sum is scaled, which for few rows is also less work than scaling the weights.

Where a tile has few rows the product is taken transposed (weights on the M side): Hopper's matrix instruction wants
64 there, and 8 suffice on the other. "w4a16" is always taken so: that side may come from registers, where its
integers arise.
"""

from moebench_kernels.activation import act, up_factor
from moebench_kernels.runtime import jit, tl


@jit
def tile_at(
    tile, column_tiles, offsets_ptr, tile_offsets_ptr, tile2expert_ptr, n_experts, n_rows,
    BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Group, first row, end of its rows, column tile: GROUP_M row tiles of an expert go together over its columns."""
    expert = tl.load(tile2expert_ptr + tile // column_tiles)
    top = tl.load(tile_offsets_ptr + expert)
    height = tl.load(tile_offsets_ptr + expert + 1) - top
    inside = tile - top * column_tiles
    band = inside // (GROUP_M * column_tiles) * GROUP_M
    inside -= band * column_tiles
    band_height = tl.minimum(height - band, GROUP_M)
    first = tl.load(offsets_ptr + expert) + (band + inside % band_height) * BLOCK_M
    end = tl.load(offsets_ptr + expert + 1, mask=expert < n_experts, other=n_rows)
    return expert, first, end, inside // band_height


@jit
def _load_tile(tensor, first, row, row_ok, k, inner, width, stop, TMA: tl.constexpr):
    """Columns k .. stop - 1 of rows of a row-major tensor. A descriptor reads from row `first` on, to its own end."""
    if TMA:
        tile = tensor.load([first, k])
    else:
        col = k + inner
        tile = tl.load(
            tensor + row[:, None] * width + col[None, :], mask=row_ok[:, None] & (col < stop)[None, :], other=0.0
        )
    return tile


@jit
def _dot(rows, w, total, SWAP: tl.constexpr):
    """total + rows @ w.T, or its transpose."""
    if SWAP:
        total = tl.dot(w, tl.trans(rows), total, out_dtype=total.dtype)
    else:
        total = tl.dot(rows, tl.trans(w), total, out_dtype=total.dtype)
    return total


@jit
def _scaled(total, row_scale, w_scale, SWAP: tl.constexpr, UNIFORM: tl.constexpr):
    """total * outer(row_scale, w_scale), float32; UNIFORM: w_scale is one number for the whole tile."""
    if UNIFORM and SWAP:
        scale = (row_scale * w_scale)[None, :]
    elif UNIFORM:
        scale = (row_scale * w_scale)[:, None]
    elif SWAP:
        scale = w_scale[:, None] * row_scale[None, :]
    else:
        scale = row_scale[:, None] * w_scale[None, :]
    return total.to(tl.float32) * scale


@jit
def _eight_bit_kernel(
    rows, row_scales_ptr, w, w_scales_ptr, out_ptr, offsets_ptr, tile_offsets_ptr, tile2expert_ptr, row2assignment_ptr,
    n_rows, N, K, n_experts,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, KIND: tl.constexpr, IS_GATED: tl.constexpr, INTEGER: tl.constexpr,
    BLOCKED: tl.constexpr, UNIFORM: tl.constexpr, SWAP: tl.constexpr, ROWS_TMA: tl.constexpr, W_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.int32 if INTEGER else tl.float32
    height: tl.constexpr = BLOCK_N if SWAP else BLOCK_M
    width: tl.constexpr = BLOCK_M if SWAP else BLOCK_N
    w_height = N
    if IS_GATED:
        w_height = 2 * N
    column_tiles = tl.cdiv(N, BLOCK_N)
    k_blocks = tl.cdiv(K, 128)
    inner = tl.arange(0, BLOCK_K)
    n_tiles = tl.load(tile_offsets_ptr + n_experts + 1) * column_tiles
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        expert, first, end, column_tile = tile_at(
            tile, column_tiles, offsets_ptr, tile_offsets_ptr, tile2expert_ptr, n_experts, n_rows, BLOCK_M, GROUP_M
        )
        real = expert < n_experts
        row = first.to(tl.int64) + tl.arange(0, BLOCK_M)
        row_ok = (row < end) & real
        source = row
        if GATHER:
            source = (tl.load(row2assignment_ptr + row, mask=row_ok, other=0) // TOP_K).to(tl.int64)
        first_col = column_tile * BLOCK_N
        col = first_col + tl.arange(0, BLOCK_N)
        col_ok = col < N
        first_w = expert * w_height + first_col
        w_row = expert.to(tl.int64) * w_height + col
        total = tl.zeros([height, width], SUM)
        total_up = tl.zeros([height, width], SUM)
        for k in range(0, tl.where(real, K, 0), BLOCK_K):
            a = _load_tile(rows, first, source, row_ok, k, inner, K, K, ROWS_TMA)
            b = _load_tile(w, first_w, w_row, col_ok, k, inner, K, K, W_TMA)
            if BLOCKED:
                a_scale = tl.load(row_scales_ptr + source * k_blocks + k // 128, mask=row_ok, other=0.0)
                b_scale = _block_scale(w_scales_ptr, expert, w_height, first_col, col, col_ok, k, k_blocks, UNIFORM)
                total += _scaled(_dot(a, b, tl.zeros_like(total), SWAP), a_scale, b_scale, SWAP, UNIFORM)
            else:
                total = _dot(a, b, total, SWAP)
            if IS_GATED:
                up = _load_tile(w, first_w + N, w_row + N, col_ok, k, inner, K, K, W_TMA)
                if BLOCKED:
                    b_scale = _block_scale(
                        w_scales_ptr, expert, w_height, first_col + N, col + N, col_ok, k, k_blocks, UNIFORM
                    )
                    total_up += _scaled(_dot(a, up, tl.zeros_like(total), SWAP), a_scale, b_scale, SWAP, UNIFORM)
                else:
                    total_up = _dot(a, up, total_up, SWAP)
        out, out_up = total, total_up
        if not BLOCKED:
            a_scale = tl.load(row_scales_ptr + source, mask=row_ok, other=0.0)
            out = _scaled(total, a_scale, tl.load(w_scales_ptr + w_row, mask=col_ok & real, other=0.0), SWAP, False)
            if IS_GATED:
                b_scale = tl.load(w_scales_ptr + w_row + N, mask=col_ok & real, other=0.0)
                out_up = _scaled(total_up, a_scale, b_scale, SWAP, False)
        if KIND != "none":
            out = act(out, KIND)
        if IS_GATED:
            out *= up_factor(out_up, KIND)
        if SWAP:
            out = tl.trans(out)
        exists = (row < end)[:, None] & col_ok[None, :]
        tl.store(out_ptr + row[:, None] * N + col[None, :], out.to(out_ptr.dtype.element_ty), mask=exists)


@jit
def _block_scale(
    w_scales_ptr, expert, w_height, first_col, col, col_ok, k, k_blocks, UNIFORM: tl.constexpr
):  # fmt: skip
    """The weights' scales at 128-block k // 128: of the tile where one covers it, else of each column."""
    base = w_scales_ptr + expert.to(tl.int64) * tl.cdiv(w_height, 128) * k_blocks + k // 128
    if UNIFORM:
        scale = tl.load(base + first_col // 128 * k_blocks)
    else:
        scale = tl.load(base + col // 128 * k_blocks, mask=col_ok, other=0.0)
    return scale


@jit
def _integers(nibble, WIDE: tl.constexpr, INTERPRET: tl.constexpr):
    """nibble - 8 in 16 bits, without a conversion: or-ed into the mantissa of 128 (1024 in float16) it is added."""
    if INTERPRET:
        value = nibble.to(tl.float32) - 8.0
    elif WIDE:
        value = (nibble.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    else:
        value = (nibble.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
    return value


@jit
def _four_bit_dot(low_rows, high_rows, packed, scale, WIDE: tl.constexpr, INTERPRET: tl.constexpr):
    """[columns, rows]: scale * (integers @ rows.T) of one stretch of a group."""
    if INTERPRET:
        low_rows = low_rows.to(tl.float32)
        high_rows = high_rows.to(tl.float32)
    part = tl.dot(_integers(packed & 15, WIDE, INTERPRET), tl.trans(low_rows), input_precision="ieee")
    part = tl.dot(_integers(packed >> 4, WIDE, INTERPRET), tl.trans(high_rows), part, input_precision="ieee")
    return part * scale[:, None]


@jit
def _four_bit_kernel(
    rows, w, w_scales_ptr, out_ptr, offsets_ptr, tile_offsets_ptr, tile2expert_ptr, row2assignment_ptr,
    n_rows, N, K, n_experts, stride_e, stride_n, stride_g,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, KIND: tl.constexpr, IS_GATED: tl.constexpr, WIDE: tl.constexpr,
    ROWS_TMA: tl.constexpr, W_TMA: tl.constexpr, INTERPRET: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    w_height = N
    if IS_GATED:
        w_height = 2 * N
    column_tiles = tl.cdiv(N, BLOCK_N)
    half_k = K // 2
    inner = tl.arange(0, BLOCK_B)
    n_tiles = tl.load(tile_offsets_ptr + n_experts + 1) * column_tiles
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        expert, first, end, column_tile = tile_at(
            tile, column_tiles, offsets_ptr, tile_offsets_ptr, tile2expert_ptr, n_experts, n_rows, BLOCK_M, GROUP_M
        )
        real = expert < n_experts
        row = first.to(tl.int64) + tl.arange(0, BLOCK_M)
        row_ok = (row < end) & real
        source = row
        if GATHER:
            source = (tl.load(row2assignment_ptr + row, mask=row_ok, other=0) // TOP_K).to(tl.int64)
        first_col = column_tile * BLOCK_N
        col = first_col + tl.arange(0, BLOCK_N)
        col_ok = col < N
        first_w = expert * w_height + first_col
        w_row = expert.to(tl.int64) * w_height + col
        scales_ptr = w_scales_ptr + expert.to(tl.int64) * stride_e + col * stride_n
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        total_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for byte in range(0, tl.where(real, half_k, 0), BLOCK_B):
            group = byte // (GROUP // 2)
            low = byte + group * (GROUP // 2)
            half = tl.minimum(GROUP // 2, half_k - group * (GROUP // 2))
            # Past the end of a partial group the rows read as 0, so that it does not matter what the bytes are.
            stop = group * GROUP + half
            low_rows = _load_tile(rows, first, source, row_ok, low, inner, K, stop, ROWS_TMA)
            high_rows = _load_tile(rows, first, source, row_ok, low + half, inner, K, stop + half, ROWS_TMA)
            packed = _load_tile(w, first_w, w_row, col_ok, byte, inner, half_k, half_k, W_TMA)
            scale = tl.load(scales_ptr + group * stride_g, mask=col_ok, other=0.0).to(tl.float32)
            total += _four_bit_dot(low_rows, high_rows, packed, scale, WIDE, INTERPRET)
            if IS_GATED:
                packed = _load_tile(w, first_w + N, w_row + N, col_ok, byte, inner, half_k, half_k, W_TMA)
                scale = tl.load(scales_ptr + N * stride_n + group * stride_g, mask=col_ok, other=0.0).to(tl.float32)
                total_up += _four_bit_dot(low_rows, high_rows, packed, scale, WIDE, INTERPRET)
        if KIND != "none":
            total = act(total, KIND)
        if IS_GATED:
            total *= up_factor(total_up, KIND)
        exists = (row < end)[:, None] & col_ok[None, :]
        out = tl.trans(total).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row[:, None] * N + col[None, :], out, mask=exists)
