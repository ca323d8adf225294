"""Quantise: weights once and offline, activations row by row on the way.

Symmetric throughout: value = quantised * scale, with no zero point.

    kind        weights w [E, N, K]   their scales                             activations x [R, K]   their scales
    "fp8:row"   e4m3fn [E, N, K]      float32 [E, N]                           e4m3fn [R, K]          float32 [R]
    "fp8:128"   e4m3fn [E, N, K]      float32 [E, cdiv(N, 128), cdiv(K, 128)]  e4m3fn [R, K]          [R, cdiv(K, 128)]
    "int8"      int8 [E, N, K]        float32 [E, N]                           int8 [R, K]            float32 [R]
    "w4a16:G"   uint8 [E, N, K/2]     bfloat16 [E, N, cdiv(K, G)]              as they are            none

Scale = absmax / 448 (fp8), absmax / 127 (int8). Four bits hold q in -8..7, and each group of G columns takes the
better (least squared error) of two scales: absmax / 7, or the one that sends the extreme element to -8 (it may be
negative).

Bits of "w4a16:G": a nibble holds q + 8. The columns g*G .. of a row, 2h of them with h = min(G, K - g*G) / 2, lie in
its bytes g*G/2 ..: byte g*G/2 + j (j < h) has column g*G + j in the low nibble and column g*G + h + j in the high
one. A kernel thus reads two runs of activations as they lie and never interleaves nibbles; the order inside a sum is
free.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moebench_kernels.build import TARGETS, Build, signature
from moebench_kernels.checks import FLOATS, check_launch, check_no_gradient, check_tensor
from moebench_kernels.runtime import cdiv, interpreting, jit, next_power_of_2, on_device, tl

KINDS = ("fp8:row", "fp8:128", "int8", "w4a16:128")
FP8 = torch.float8_e4m3fn
BLOCK = 128  # side of a scale block of "fp8:128"
TOP = {"fp8": 448.0, "int8": 127.0}
FP8_TARGETS = ("sm_90", "sm_100", "gfx950")  # sm_80 has none; gfx942 has e4m3 in its fnuz form only
SMALLEST = 2.0**-100  # absmax counts as at least this, so that 1 / scale is finite


class QuantisedWeights(NamedTuple):
    """The matrices of all experts, quantised.

    Attributes:
        values: [E, N, K] float8_e4m3fn or int8; "w4a16:G": uint8 [E, N, K/2].
        scales: see the head of this file; any strides.
        kind: "fp8:row", "fp8:128", "int8" or "w4a16:G".
    """

    values: Tensor
    scales: Tensor
    kind: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K) of the matrices these stand for."""
        E, N, width = self.values.shape
        return E, N, 2 * width if group_of(self.kind) else width

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes


def group_of(kind: str) -> int:
    """G of "w4a16:G"; 0 for the other kinds.

    Raises:
        ValueError: a kind that does not exist, or a group that is not a multiple of 32.
    """
    found = re.fullmatch(r"w4a16:([1-9]\d*)", kind) if isinstance(kind, str) else None
    if found and int(found[1]) % 32 == 0:
        return int(found[1])
    if found or kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(KINDS)}, or w4a16:G with G a multiple of 32")
    return 0


def supported(kind: str, device: torch.device | str) -> str | None:
    """Whether a device has what a kind needs. Launches nothing; takes the interpreter for able.

    Args:
        kind: "fp8:row", "fp8:128", "int8" or "w4a16:G".
        device: any.

    Returns:
        None where it has; else why not, in one line that names the device.

    Raises:
        ValueError: a kind that does not exist.
    """
    group_of(kind)
    device = torch.device(device)
    if device.type != "cuda" or not kind.startswith("fp8"):
        return None
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = found.gcnArchName.split(":")[0]
        if arch.startswith("gfx94"):
            return f"{kind} needs e4m3fn matrix instructions; this is {arch}, whose e4m3 is fnuz (gfx950 has e4m3fn)"
        return None
    if (found.major, found.minor) < (8, 9):
        name = f"{found.name} ({found.major}.{found.minor})"
        return f"{kind} needs compute capability 8.9 or newer; this is an {name}"
    return None


def check_supported(kind: str, device: torch.device) -> None:
    """Raise ValueError where `supported` has a reason."""
    reason = supported(kind, device)
    if reason:
        raise ValueError(reason)


def check_quantised(name: str, weights: QuantisedWeights, n_experts: int | str, N: int | str, K: int | str) -> None:
    """Raise unless `weights` are QuantisedWeights of [n_experts, N, K] whose parts fit each other."""
    if not isinstance(weights, QuantisedWeights):
        raise TypeError(f"{name} is a {type(weights).__name__}; QuantisedWeights are needed (see quantise_weights)")
    group = group_of(weights.kind)
    dtype = torch.uint8 if group else torch.int8 if weights.kind == "int8" else FP8
    if isinstance(K, int) and group and K % 2:
        raise ValueError(f"{name}: {weights.kind} needs an even number of columns, not {K}")
    width = K // 2 if group and isinstance(K, int) else K
    check_tensor(f"{name}.values", weights.values, (n_experts, N, width), (dtype,))
    E, N, K = weights.shape
    blocks = (E, cdiv(N, BLOCK), cdiv(K, BLOCK))
    shape = (E, N, cdiv(K, group)) if group else blocks if weights.kind == "fp8:128" else (E, N)
    dtype = torch.bfloat16 if group else torch.float32
    check_tensor(f"{name}.scales", weights.scales, shape, (dtype,), strided=bool(group))


def quantise_weights(w: Tensor, kind: str) -> QuantisedWeights:
    """Quantise the matrices of all experts; offline, in torch, one expert at a time. Waits for the device.

    Args:
        w: [E, N, K], float32, float16, bfloat16 or float64, finite. "w4a16:G" needs an even K.
        kind: "fp8:row", "fp8:128", "int8", or "w4a16:G" with G a multiple of 32.

    Returns:
        QuantisedWeights on w's device; an all-zero row, block or group has scale 1.

    Raises:
        TypeError, ValueError: another dtype or shape, an unknown kind, NaN or Inf.

    Source: e4m3: Micikevicius et al. 2022, arXiv 2209.05433; blocks: DeepSeek-V3, arXiv 2412.19437, section 3.3.2.
    """
    group = group_of(kind)
    check_tensor("w", w, ("E", "N", "K"), (*FLOATS, torch.float64), strided=True)
    if group and w.shape[2] % 2:
        raise ValueError(f"w has {w.shape[2]} columns; {kind} packs two in a byte and needs an even number")
    if w.is_meta:
        raise ValueError("w is on the meta device, where it has no values to quantise")
    if not all(bool(torch.isfinite(expert.float()).all()) for expert in w):
        raise ValueError("w has NaN, Inf or numbers past float32's range; only finite weights can be quantised")
    parts = [_quantise_matrix(expert.float(), kind, group) for expert in w]
    values = torch.stack([part[0].view(torch.uint8) for part in parts]).view(parts[0][0].dtype)
    if not group:
        return QuantisedWeights(values, torch.stack([part[1] for part in parts]), kind)
    # Scales of neighbouring rows lie side by side: a kernel reads one group of a tile's rows at a time.
    return QuantisedWeights(values, torch.stack([part[1].T for part in parts]).mT, kind)


def _quantise_matrix(w: Tensor, kind: str, group: int) -> tuple[Tensor, Tensor]:
    """Values and scales of one float32 [N, K]."""
    if group:
        return _quantise_int4(w, group)
    if kind == "fp8:128":
        N, K = w.shape
        padded = torch.nn.functional.pad(w, (0, -K % BLOCK, 0, -N % BLOCK))
        blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
        scales = _scale(blocks.abs().amax((1, 3)), TOP["fp8"])
        spread = scales.repeat_interleave(BLOCK, 0)[:N].repeat_interleave(BLOCK, 1)[:, :K]
        return _round(w, spread, kind), scales
    scales = _scale(w.abs().amax(1), TOP[kind.split(":")[0]])
    return _round(w, scales[:, None], kind), scales


def _scale(absmax: Tensor, top: float) -> Tensor:
    """absmax / top as the kernel has it (times the rounded inverse); 1 where absmax is 0."""
    return torch.where(absmax > 0, absmax.clamp(min=SMALLEST) * (1.0 / top), 1.0)


def _round(x: Tensor, scales: Tensor, kind: str) -> Tensor:
    """x / scales (times the inverse), saturated, to the nearest code, ties to even. NaN: NaN in fp8, 0 in int8."""
    scaled = x * (1.0 / scales)
    if kind == "int8":
        return scaled.nan_to_num(0.0).clamp(-127.0, 127.0).round().to(torch.int8)
    return scaled.clamp(-448.0, 448.0).to(FP8)


def _quantise_int4(w: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Packed nibbles [N, K/2] and scales bfloat16 [N, cdiv(K, group)] of one float32 [N, K]."""
    K = w.shape[1]
    groups = torch.nn.functional.pad(w, (0, -K % group)).unflatten(1, (-1, group))
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    best, least, chosen = None, None, None
    for scale in (extreme.abs() / 7.0, extreme / -8.0):
        scale = torch.where(extreme == 0, 1.0, scale).bfloat16().float()
        scale = torch.where(scale == 0, 1.0, scale)  # an extreme too small for bfloat16
        q = (groups / scale).round().clamp(-8, 7)
        error = (q * scale - groups).square().sum(2, keepdim=True)
        if best is None:
            best, least, chosen = q, error, scale
        else:
            better = error < least
            best, chosen = torch.where(better, q, best), torch.where(better, scale, chosen)
    return _pack(best.flatten(1)[:, :K], group), chosen[:, :, 0].bfloat16()


def _pack(q: Tensor, group: int) -> Tensor:
    """-8..7 [N, K] -> bytes [N, K/2]; see the head of this file."""
    whole = q.shape[1] // group * group
    return torch.cat([_pack_groups(q[:, :whole], group), _pack_groups(q[:, whole:], q.shape[1] - whole)], 1)


def _pack_groups(q: Tensor, width: int) -> Tensor:
    half = max(width // 2, 1)  # there may be no partial group
    low, high = (q + 8).to(torch.uint8).reshape(len(q), -1 if q.numel() else 0, 2, half).unbind(2)
    return (low | high << 4).flatten(1)


def _unpack(packed: Tensor, group: int) -> Tensor:
    """Bytes [E, N, K/2] -> -8..7 [E, N, K], float32."""
    half, width = group // 2, packed.shape[2]
    whole = width // half * half
    return torch.cat([_unpack_groups(packed[..., :whole], half), _unpack_groups(packed[..., whole:], width - whole)], 2)


def _unpack_groups(packed: Tensor, half: int) -> Tensor:
    E, N, width = packed.shape
    split = packed.reshape(E, N, width // max(half, 1), half)
    return torch.stack([split & 15, split >> 4], 3).reshape(E, N, 2 * width).float() - 8.0


def dequantise_weights(q: QuantisedWeights, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrices that quantised weights stand for; runs on any device, differentiable in nothing.

    Args:
        q: of any kind.
        dtype: of the result; float64 holds value * scale without rounding.

    Returns:
        [E, N, K] of `dtype`.

    Raises:
        TypeError, ValueError: parts that do not fit each other.
    """
    check_quantised("q", q, "E", "N", "K")
    if dtype not in (*FLOATS, torch.float64):
        raise TypeError(f"dtype is {dtype}; allowed: float32, float16, bfloat16, float64")
    (_, N, K), group = q.shape, group_of(q.kind)
    wide = torch.promote_types(dtype, torch.float32)
    scales = q.scales.to(wide)
    if group:
        return (_unpack(q.values, group).to(wide) * scales.repeat_interleave(group, 2)[..., :K]).to(dtype)
    if q.kind == "fp8:128":
        scales = scales.repeat_interleave(BLOCK, 1)[:, :N].repeat_interleave(BLOCK, 2)[..., :K]
    else:
        scales = scales[..., None]
    return (q.values.to(wide) * scales).to(dtype)


def quantise_rows_torch(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Reference of `quantise_rows`; runs on any device."""
    K = x.shape[1]
    width = BLOCK if kind == "fp8:128" else K
    blocks = torch.nn.functional.pad(x.float(), (0, -K % width)).unflatten(1, (-1, width))
    magnitude = blocks.abs()
    absmax = torch.where(magnitude < float("inf"), magnitude, 0.0).amax(2)
    scales = _scale(absmax, TOP[kind.split(":")[0]])
    values = _round(blocks, scales[:, :, None], kind).flatten(1)[:, :K].contiguous()
    return values, scales if kind == "fp8:128" else scales[:, 0]


@dataclass(frozen=True)
class QuantiseConfig:
    """Rows and columns a program holds at a time; it goes over its scale's columns twice, the second time from L1."""

    block_r: int
    block_k: int
    num_warps: int = 4


def quantise_config(K: int, kind: str) -> QuantiseConfig:
    """One row a program, so that a decode step still fills the device; 16 rows where a scale has 128 columns."""
    if kind == "fp8:128":
        return QuantiseConfig(block_r=16, block_k=BLOCK)
    return QuantiseConfig(block_r=1, block_k=min(2048, max(128, next_power_of_2(K))))


@jit
def _to_fp8(x, INTERPRET: tl.constexpr):
    """Cast to e4m3fn. The interpreter's own cast loses the carry of a mantissa (127 becomes 64): round before it."""
    if INTERPRET:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        # Below 2**-6 steps are 2**-9, as float32 has them at 1.5 * 2**14.
        x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, rounded)
    return x.to(tl.float8e4nv)


@jit
def _quantise_rows_kernel(
    x_ptr, values_ptr, scales_ptr, n_rows, K, width, inverse_top,
    TOP: tl.constexpr, SMALLEST: tl.constexpr, INTEGER: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n_scales = tl.cdiv(K, width)
    row = (tl.program_id(0) // n_scales).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = (row < n_rows)[:, None]
    first = tl.program_id(0) % n_scales * width
    end = tl.minimum(first + width, K)
    absmax = tl.zeros([BLOCK_R], tl.float32)
    for k in range(first, end, BLOCK_K):
        col = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row[:, None] * K + col[None, :], mask=row_ok & (col < end)[None, :], other=0.0)
        magnitude = tl.abs(x.to(tl.float32))
        absmax = tl.maximum(absmax, tl.max(tl.where(magnitude < float("inf"), magnitude, 0.0), axis=1))
    scale = tl.where(absmax > 0, tl.maximum(absmax, SMALLEST) * inverse_top, 1.0)
    inverse = tl.div_rn(1.0, scale)
    tl.store(scales_ptr + row * n_scales + tl.program_id(0) % n_scales, scale, mask=row < n_rows)
    for k in range(first, end, BLOCK_K):
        col = k + tl.arange(0, BLOCK_K)
        inside = row_ok & (col < end)[None, :]
        at = row[:, None] * K + col[None, :]
        scaled = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * inverse[:, None]
        if INTEGER:
            scaled = tl.where(scaled == scaled, scaled, 0.0)
        scaled = tl.where(scaled > TOP, TOP, tl.where(scaled < -TOP, -TOP, scaled))
        if INTEGER:
            # Rounds to even: at 1.5 * 2**23 float32 holds integers only.
            tl.store(values_ptr + at, ((scaled + 12582912.0) - 12582912.0).to(tl.int8), mask=inside)
        else:
            tl.store(values_ptr + at, _to_fp8(scaled, INTERPRET), mask=inside)


@torch.library.custom_op("moebench::quantise_rows", mutates_args=())
def _quantise_rows(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    check_launch(x=x)
    check_supported(kind, x.device)
    values, scales = _empty_rows(x, kind)
    n_rows, K = x.shape
    width = BLOCK if kind == "fp8:128" else K
    top, c = TOP[kind.split(":")[0]], quantise_config(K, kind)
    if n_rows:
        with on_device(x):
            _quantise_rows_kernel[(cdiv(n_rows, c.block_r) * cdiv(K, width),)](
                x, values, scales, n_rows, K, width, 1.0 / top, TOP=top, SMALLEST=SMALLEST, INTEGER=kind == "int8",
                INTERPRET=interpreting(), BLOCK_R=c.block_r, BLOCK_K=c.block_k, num_warps=c.num_warps,
            )  # fmt: skip
    return values, scales


@_quantise_rows.register_fake
def _empty_rows(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    n_rows, K = x.shape
    values = x.new_empty(n_rows, K, dtype=torch.int8 if kind == "int8" else FP8)
    shape = (n_rows, cdiv(K, BLOCK)) if kind == "fp8:128" else (n_rows,)
    return values, x.new_empty(shape, dtype=torch.float32)


def quantise_rows(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Quantise activations, each row (or each 128 columns of it) by its own largest magnitude. Not differentiable.

    Args:
        x: [T, K], float32, float16 or bfloat16, contiguous; T may be 0.
        kind: "fp8:row", "fp8:128" or "int8".

    Returns:
        values [T, K], float8_e4m3fn or int8; scales float32 [T], or [T, cdiv(K, 128)] for "fp8:128".
        Scales are finite and positive: only finite elements count, absmax below 2**-100 counts as that, and where
        absmax is 0 the scale is 1. Inf saturates; NaN stays NaN in fp8 and becomes 0 in int8, which has none.

    Raises:
        TypeError, ValueError: before any launch; also where the device has no fp8 (see `supported`).

    Source: per 1 x 128 tile: DeepSeek-V3, arXiv 2412.19437, section 3.3.2.
    """
    if group_of(kind):
        raise ValueError(f"kind is {kind!r}, which leaves activations as they are; allowed: fp8:row, fp8:128, int8")
    check_tensor("x", x, ("T", "K"), FLOATS)
    check_no_gradient(x=x)
    return _quantise_rows(x, kind)


def builds() -> list[Build]:
    """The quantising kernel at D = 2048, for each kind."""
    found = []
    for kind in ("fp8:row", "fp8:128", "int8"):
        c, fp8 = quantise_config(2048, kind), kind != "int8"
        constants = {
            "TOP": TOP[kind.split(":")[0]], "SMALLEST": SMALLEST, "INTEGER": not fp8, "INTERPRET": False,
            "BLOCK_R": c.block_r, "BLOCK_K": c.block_k,
        }  # fmt: skip
        types = {"values_ptr": "*fp8e4nv" if fp8 else "*i8", "scales_ptr": "*fp32", "inverse_top": "fp32"}
        named = signature(_quantise_rows_kernel, "bf16", constants, **types)
        targets = FP8_TARGETS if fp8 else TARGETS
        name = f"quantise_rows {kind} bf16"
        found.append(Build(name, _quantise_rows_kernel, named, constants, targets, num_warps=c.num_warps))
    return found
