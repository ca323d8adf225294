"""Quantising weights and rows, against loops in Python numbers and against the torch reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moebench_kernels.quantise import (
    KINDS,
    QuantisedWeights,
    _quantise_rows,
    dequantise_weights,
    quantise_rows,
    quantise_rows_torch,
    quantise_weights,
    supported,
)

FP8 = torch.float8_e4m3fn
ALL = (*KINDS, "w4a16:32", "w4a16:96")
# E, N, K: whole blocks and groups, partial ones, and less than one.
SHAPES = [(2, 130, 300), (1, 128, 256), (3, 1, 2)]


def step_of(kind: str, q: QuantisedWeights, w: Tensor) -> Tensor:
    """Half the distance between neighbouring codes at each weight: what rounding may cost, at most."""
    E, N, K = w.shape
    scales = q.scales.float().abs()
    if kind.startswith("w4a16"):
        scales = scales.repeat_interleave(int(kind.split(":")[1]), 2)[..., :K]
    elif kind == "fp8:128":
        scales = scales.repeat_interleave(128, 1)[:, :N].repeat_interleave(128, 2)[..., :K]
    else:
        scales = scales[..., None]
    if not kind.startswith("fp8"):
        return (scales / 2).expand(E, N, K)
    # e4m3 has three bits after the leading one, and steps of 2**-9 below 2**-6.
    exponent = torch.floor(torch.log2((w / scales).abs().clamp(min=2.0**-6)))
    return scales * torch.exp2(exponent - 3) / 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ALL)
def test_weights_come_back_within_half_a_step(kind: str, shape: tuple[int, int, int]) -> None:
    w = torch.randn(shape)
    w[0, 0] = 0.0
    q = quantise_weights(w, kind)
    back = dequantise_weights(q)
    assert q.shape == shape
    assert q.kind == kind
    # Four bits reach -8 .. 7: with the scale that sends the extreme to -8, its negative is one code short; and the
    # scale itself is rounded to bfloat16, at 8 steps a few hundredths of one.
    slack = 2.1 if kind.startswith("w4a16") else 1.0
    assert ((back - w).abs() <= slack * 1.001 * step_of(kind, q, w) + 1e-30).all()
    assert (back[0, 0] == 0).all()
    assert torch.isfinite(q.scales.float()).all()


def test_codes_are_the_nearest() -> None:
    """Every code of e4m3 and int8 quantises to itself, and what lies between goes to the nearer one."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    codes = codes[torch.isfinite(codes)].sort().values
    between = (codes[1:] + codes[:-1]) / 2 * 0.999  # a little nearer to zero
    nearer = torch.where(codes[1:] > 0, codes[:-1], codes[1:])
    for x, wanted in ((codes, codes), (torch.cat([between, codes[-1:]]), torch.cat([nearer, codes[-1:]]))):
        q = quantise_weights(x[None, None], "fp8:row")
        assert torch.equal(q.values.float()[0, 0] * (q.scales[0, 0] * 448 / x.abs().max()), wanted)
    whole = torch.arange(-127, 128).float()
    assert torch.equal(quantise_weights(whole[None, None], "int8").values[0, 0].float(), whole)


@pytest.mark.parametrize(("group", "K"), [(128, 300), (32, 70), (96, 96), (32, 2)])
def test_nibbles_lie_as_documented(group: int, K: int) -> None:
    """Read bit by bit with Python integers."""
    w = torch.randn(1, 3, K)
    q = quantise_weights(w, f"w4a16:{group}")
    back = dequantise_weights(q, torch.float64)
    packed = q.values.tolist()[0]
    for n in range(3):
        for k in range(K):
            g = k // group
            h = min(group, K - g * group) // 2
            j = k - g * group
            byte = packed[n][g * group // 2 + (j if j < h else j - h)]
            nibble = byte & 15 if j < h else byte >> 4
            assert (nibble - 8) * q.scales[0, n, g].item() == back[0, n, k].item()
            assert abs(back[0, n, k] - w[0, n, k]) <= 1.1 * abs(q.scales[0, n, g].item()), "another column's"


def test_four_bits_take_the_better_scale() -> None:
    """One far element on the negative side costs nothing more at -8; a symmetric group is better off with 7."""
    one_sided = torch.tensor([-8.0, 7.0, 3.0, 1.0]).repeat(8)[None, None]
    symmetric = torch.tensor([-7.0, 7.0, 3.0, 1.0]).repeat(8)[None, None]
    for w in (one_sided, -one_sided, symmetric, 2**-10 * symmetric):
        assert torch.equal(dequantise_weights(quantise_weights(w, "w4a16:32")), w)


@pytest.mark.parametrize("kind", ALL)
def test_zeros_have_scale_one(kind: str) -> None:
    q = quantise_weights(torch.zeros(1, 4, 64), kind)
    assert (q.scales == 1).all()
    assert (dequantise_weights(q) == 0).all()


def rows(T: int, K: int, dtype: torch.dtype) -> Tensor:
    """Rows of every size, one all zero, with Inf in two and elements too small to matter in one."""
    x = torch.randn(T, K) * torch.exp2(torch.randint(-8, 8, (T, 1)).float())
    x[0] = 0
    x[1, K // 2] = float("inf")
    x[2] = -float("inf")
    x[3] *= 1e-38 if dtype != torch.float16 else 1e-7
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("T", "K"), [(37, 300), (4, 2100), (5, 1)])
@pytest.mark.parametrize("kind", ["fp8:row", "fp8:128", "int8"])
def test_rows(kind: str, T: int, K: int, dtype: torch.dtype, device: torch.device) -> None:
    x = rows(T, K, dtype)
    values, scales = quantise_rows(x.to(device), kind)
    wanted, wanted_scales = quantise_rows_torch(x, kind)
    assert torch.equal(scales.cpu(), wanted_scales)
    assert (torch.isfinite(scales) & (scales > 0)).all()
    assert values.dtype == wanted.dtype
    assert torch.equal(values.cpu().float(), wanted.float())


def test_rows_reference_equals_loop() -> None:
    x = rows(5, 130, torch.float32)
    values, scales = quantise_rows_torch(x, "int8")
    for row, codes, scale in zip(x.tolist(), values.tolist(), scales.tolist(), strict=True):
        top = max([abs(v) for v in row if math.isfinite(v)], default=0.0)
        assert math.isclose(scale, max(top, 2.0**-100) / 127 if top else 1.0, rel_tol=1e-6)
        for v, code in zip(row, codes, strict=True):
            exact = max(-127.0, min(127.0, v / scale))
            assert abs(code - exact) <= 0.5001
    blocks, block_scales = quantise_rows_torch(x, "fp8:128")
    for first, width in ((0, 128), (128, 2)):
        part, part_scales = quantise_rows_torch(x[:, first : first + width], "fp8:row")
        assert torch.equal(blocks[:, first : first + width].view(torch.uint8), part.view(torch.uint8))
        assert torch.equal(block_scales[:, first // 128], part_scales)


def test_nan_in_the_reference() -> None:
    """In fp8 it stays; int8 has none. The scale never sees it."""
    x = torch.tensor([[1.0, float("nan"), -2.0]])
    for kind in ("fp8:row", "fp8:128"):
        values, scales = quantise_rows_torch(x, kind)
        assert values.float().isnan().tolist() == [[False, True, False]]
        assert scales.flatten().item() == pytest.approx(2 / 448)
    values, scales = quantise_rows_torch(x, "int8")
    assert values.tolist() == [[64, 0, -127]]


@pytest.mark.gpu
def test_nan_on_a_gpu(device: torch.device) -> None:
    """Only here: the interpreter's cast turns NaN into a number."""
    x = torch.tensor([[1.0, float("nan"), -2.0]], device=device)
    kinds = [kind for kind in ("fp8:row", "fp8:128", "int8") if supported(kind, device) is None]
    for kind in kinds:
        values, scales = quantise_rows(x, kind)
        assert values[0, 1].float().isnan().item() == (kind != "int8")
        assert torch.isfinite(scales).all()


def test_no_rows(device: torch.device) -> None:
    values, scales = quantise_rows(torch.zeros(0, 8, device=device), "fp8:128")
    assert values.shape == (0, 8)
    assert scales.shape == (0, 1)


def test_operator(device: torch.device) -> None:
    for kind in ("fp8:128", "int8"):
        torch.library.opcheck(_quantise_rows, (torch.randn(3, 130, device=device), kind))
    compiled = torch.compile(lambda x: quantise_rows(x * 2, "int8"), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 130, device=device)
    assert all(torch.equal(a, b) for a, b in zip(compiled(x), quantise_rows(x * 2, "int8"), strict=True))


class Device:
    """What torch says of a GPU that is not here."""

    def __init__(self, name: str, major: int, minor: int, arch: str = "") -> None:
        self.name, self.major, self.minor, self.gcnArchName = name, major, minor, arch


@pytest.mark.parametrize(
    ("found", "hip", "kind", "reason"),
    [
        (Device("NVIDIA A100", 8, 0), None, "fp8:row", "fp8:row needs compute capability 8.9 or newer; this is an NV"),
        (Device("NVIDIA A100", 8, 0), None, "int8", None),
        (Device("NVIDIA A100", 8, 0), None, "w4a16:64", None),
        (Device("NVIDIA L4", 8, 9), None, "fp8:128", None),
        (Device("NVIDIA H200", 9, 0), None, "fp8:128", None),
        (Device("MI300X", 9, 4, "gfx942:sramecc+"), "6.4", "fp8:row", "this is gfx942, whose e4m3 is fnuz"),
        (Device("MI355X", 9, 5, "gfx950:sramecc+"), "6.4", "fp8:row", None),
    ],
)
def test_supported(
    found: Device, hip: str | None, kind: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.version, "hip", hip)
    said = supported(kind, "cuda:0")
    assert (said is None) == (reason is None)
    assert reason is None or reason in said
    assert supported(kind, "cpu") is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantise_weights(torch.zeros(1, 2, 4), "fp4"), ValueError, "kind is 'fp4'; allowed: fp8:row, fp8:128"),
        (lambda: quantise_weights(torch.zeros(1, 2, 4), "w4a16:48"), ValueError, "with G a multiple of 32"),
        (lambda: quantise_weights(torch.zeros(1, 2, 4), "w4a16:0"), ValueError, "with G a multiple of 32"),
        (lambda: quantise_weights(torch.zeros(2, 4), "int8"), ValueError, r"w has shape \[2, 4\]; needed: \[E, N, K\]"),
        (lambda: quantise_weights(torch.zeros(1, 2, 3), "w4a16:32"), ValueError, "w has 3 columns"),
        (lambda: quantise_weights(torch.full((1, 2, 2), math.nan), "int8"), ValueError, "w has NaN, Inf or"),
        (
            lambda: quantise_weights(torch.full((1, 2, 2), 1e300, dtype=torch.float64), "int8"),
            ValueError,
            "past float32",
        ),
        (lambda: dequantise_weights(quantise_weights(torch.ones(1, 2, 2), "int8"), torch.int8), TypeError, "int8; all"),
        (lambda: quantise_weights(torch.zeros(1, 2, 2).int(), "int8"), TypeError, "w is int32; allowed: float32"),
        (lambda: quantise_rows(torch.zeros(2, 4), "w4a16:128"), ValueError, "which leaves activations as they are"),
        (lambda: quantise_rows(torch.zeros(4, 2).T, "int8"), ValueError, "x has strides"),
        (lambda: quantise_rows(torch.zeros(4, 2).double(), "int8"), TypeError, "x is float64"),
        (lambda: quantise_rows(torch.zeros(4, 2).requires_grad_(), "int8"), ValueError, "x requires a gradient"),
        (
            lambda: dequantise_weights(QuantisedWeights(torch.zeros(1, 2, 4), torch.ones(1, 2), "int8")),
            TypeError,
            "q.values is float32; allowed: int8",
        ),
        (
            lambda: dequantise_weights(QuantisedWeights(torch.zeros(1, 2, 4).char(), torch.ones(1, 3), "int8")),
            ValueError,
            r"q.scales has shape \[1, 3\]; needed: \[1, 2\]",
        ),
        (lambda: dequantise_weights(torch.zeros(1, 2, 4)), TypeError, "q is a Tensor; QuantisedWeights are needed"),
    ],
)
def test_refused(call: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
