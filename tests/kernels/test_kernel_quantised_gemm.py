"""The quantised GEMM and layer, against float64 on the dequantised operands and against Python loops."""

from __future__ import annotations

import pytest
import torch
from kernel_loops import TOLERANCES, assert_close, moe, random_ids
from torch import Tensor

from moebench_kernels.activation import ACTIVATIONS, GATED
from moebench_kernels.plan import routing_plan, routing_plan_torch
from moebench_kernels.quantise import KINDS, dequantise_weights, quantise_rows_torch, quantise_weights, supported
from moebench_kernels.quantised_gemm import _quantised_gemm, quantised_gemm, quantised_gemm_torch
from moebench_kernels.quantised_layer import _layer, quantised_moe_layer, quantised_moe_layer_torch
from moebench_kernels.quantised_tiles import quantised_tile

HALF = torch.float16
GROUPS = (*KINDS, "w4a16:32", "w4a16:96")
# T, E, K, D_in, D_out, dropped, activation, gather. Between them: rows of a tile 16 to 128; several tiles an
# expert; sizes that a descriptor takes and sizes that it does not; whole and partial groups and blocks; empty experts.
CASES = [
    (40, 8, 2, 256, 64, 0.1, "clamped_swiglu", True),
    (9, 60, 2, 160, 33, 0.1, "gelu", False),
    (30, 1, 1, 384, 200, 0.0, None, False),
    (130, 2, 1, 272, 200, 0.2, "swiglu", True),
    (300, 2, 1, 128, 300, 0.0, "geglu", False),
    (3, 2, 2, 48, 40, 1.0, "relu", True),
    (0, 2, 2, 48, 40, 0.0, "silu", True),
]
# Which of them each kind meets; the rest is for `make test-full`.
COMMON = {
    "fp8:row": {0, 1, 3, 5, 6}, "fp8:128": {0, 1, 2, 3, 5}, "int8": {0, 2, 4, 6}, "w4a16:128": {0, 1, 2, 4, 5},
    "w4a16:32": {1, 3}, "w4a16:96": {1, 2},
}  # fmt: skip


def sweep() -> list:
    found = []
    for kind in GROUPS:
        for at, case in enumerate(CASES):
            found.append(pytest.param(kind, *case, marks=[] if at in COMMON[kind] else pytest.mark.full))
    return found


def quantised_rows(x: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    """x as the GEMM takes it."""
    return (x, None) if kind.startswith("w4a16") else quantise_rows_torch(x, kind)


def to(device: torch.device, *tensors: Tensor | None) -> list[Tensor | None]:
    """All on the device."""
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


def runs(kind: str, device: torch.device) -> None:
    """Skip what this device lacks, saying so."""
    if reason := supported(kind, device):
        pytest.skip(reason)


@pytest.mark.parametrize(("kind", "T", "E", "K", "D_in", "D_out", "dropped", "activation", "gather"), sweep())
def test_quantised_gemm(
    kind: str, T: int, E: int, K: int, D_in: int, D_out: int, dropped: float, activation: str | None, gather: bool,
    device: torch.device,
) -> None:  # fmt: skip
    runs(kind, device)
    ids = random_ids(T, E, K, dropped)
    plan, reference = routing_plan(ids.to(device), E), routing_plan_torch(ids, E)
    weights = quantise_weights(torch.randn(E, (2 if activation in GATED else 1) * D_out, D_in) * D_in**-0.5, kind)
    values, scales = quantised_rows(torch.randn(T if gather else T * K, D_in).to(HALF), kind)
    if not gather and T:  # what belongs to no expert is not read
        end = int(reference.offsets[-1])
        if kind.startswith("w4a16"):
            values[end:] = float("nan")
        else:
            scales[end:] = float("nan")
    on_device = weights._replace(values=weights.values.to(device), scales=weights.scales.to(device))
    out = quantised_gemm(*to(device, values, scales), on_device, plan, activation=activation, gather=gather, dtype=HALF)
    wanted = quantised_gemm_torch(
        values, scales, weights, reference, activation=activation, gather=gather, dtype=torch.float64
    )
    assert out.dtype == HALF
    assert_close("out", out, wanted, TOLERANCES[HALF])
    assert (out[int(reference.offsets[-1]) :] == 0).all()


@pytest.mark.parametrize("kind", ["int8", "w4a16:32"])
def test_bands_of_row_tiles(kind: str, device: torch.device) -> None:
    """One expert with more row tiles than go together over its columns, several columns, and one that is idle."""
    ids = torch.zeros(300, 1, dtype=torch.int32).masked_fill_(torch.arange(300)[:, None] % 60 == 0, 29)
    plan, reference = routing_plan(ids.to(device), 40), routing_plan_torch(ids, 40)
    assert reference.block_m == 16
    weights = quantise_weights(torch.randn(40, 260, 32, device=device), kind)
    rows = quantised_rows(torch.randn(300, 32).to(HALF), kind)
    out = quantised_gemm(*to(device, *rows), weights, plan, dtype=HALF)
    wanted = quantised_gemm_torch(*rows, cpu(weights), reference, dtype=torch.float64)
    assert_close("out", out, wanted, TOLERANCES[HALF])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """float32 out shows that nothing but int8's and fp8's own rounding takes place; w4a16 takes bfloat16 rows."""
    runs(kind, device)
    if kind.startswith("w4a16") and dtype == torch.float32:
        pytest.skip("w4a16 takes 16-bit rows")
    plan = routing_plan(random_ids(9, 2, 1).to(device), 2)
    weights = quantise_weights(torch.randn(2, 40, 256, device=device), kind)
    rows = quantised_rows(torch.randn(9, 256, device=device).bfloat16(), kind)
    out = quantised_gemm(*rows, weights, plan, dtype=dtype)
    assert out.dtype == dtype
    # Hopper's fp8 sums keep about 14 bits, within 2e-4 of the result at this width.
    tolerance = 2e-3 if dtype == torch.float32 and device.type == "cuda" else TOLERANCES[dtype]
    assert_close("out", out, quantised_gemm_torch(*rows, weights, plan, dtype=torch.float64), tolerance)


def test_int8_is_exact(device: torch.device) -> None:
    """The largest sums there are: every product 127 * 127, and none rounded."""
    plan = routing_plan(torch.zeros(3, 1, dtype=torch.int32, device=device), 1)
    weights = quantise_weights(torch.full((1, 16, 1024), 127.0, device=device), "int8")
    rows = torch.full((3, 1024), -127, dtype=torch.int8, device=device)
    out = quantised_gemm(rows, torch.ones(3, device=device), weights, plan, dtype=torch.float32)
    assert (out == -127 * 127 * 1024).all()


def test_reference_equals_loop() -> None:
    weights, plan = quantise_weights(torch.randn(2, 3, 130), "fp8:128"), routing_plan_torch(random_ids(4, 2, 1), 2)
    values, scales = quantise_rows_torch(torch.randn(4, 130), "fp8:128")
    found = quantised_gemm_torch(values, scales, weights, plan, dtype=torch.float64)
    rows, matrices = values.double().tolist(), weights.values.double().tolist()
    for r, e in enumerate(plan.row2expert.tolist()):
        for n in range(3):
            wanted = sum(
                rows[r][k] * scales[r, k // 128].item() * matrices[e][n][k] * weights.scales[e, 0, k // 128].item()
                for k in range(130)
            )
            assert found[r, n].item() == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def layer_inputs(T: int, D: int, F: int, E: int, K: int, activation: str, kind: str, dtype: torch.dtype) -> tuple:
    """x, ids, weights, w_gate_up, w_down."""
    m = 2 if activation in GATED else 1
    up, down = torch.randn(E, m * F, D) * D**-0.5, torch.randn(E, D, F) * F**-0.5
    routing = random_ids(T, E, K, 0.1), torch.rand(T, K)
    return torch.randn(T, D).to(dtype), *routing, quantise_weights(up, kind), quantise_weights(down, kind)


# T, D, F, E, K, kind, activation, dtype
LAYERS = [
    (9, 144, 80, 4, 2, "fp8:row", "swiglu", HALF),
    (7, 144, 136, 4, 2, "fp8:128", "clamped_swiglu", HALF),
    (20, 48, 32, 1, 1, "int8", "gelu", torch.float32),
    (5, 256, 40, 4, 2, "w4a16:128", "swiglu", HALF),
    (5, 96, 64, 4, 2, "w4a16:32", "geglu", torch.bfloat16),
    (5, 32, 16, 2, 2, "int8", "relu", torch.bfloat16),
    (0, 32, 16, 2, 2, "int8", "silu", torch.bfloat16),
]


@pytest.mark.parametrize(("T", "D", "F", "E", "K", "kind", "activation", "dtype"), LAYERS)
def test_layer(
    T: int, D: int, F: int, E: int, K: int, kind: str, activation: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Quantised at the same points as the reference; a hidden element near a tie may still fall to the other side."""
    runs(kind, device)
    inputs = layer_inputs(T, D, F, E, K, activation, kind, dtype)
    wanted = quantised_moe_layer_torch(*inputs, activation=activation)
    x, ids, weights, *matrices = inputs
    matrices = [q._replace(values=q.values.to(device), scales=q.scales.to(device)) for q in matrices]
    on_device = (*to(device, x, ids, weights), *matrices)
    y = quantised_moe_layer(*on_device, activation=activation)
    assert y.dtype == dtype
    assert y.shape == (T, D)
    assert_close("y", y, wanted, max(TOLERANCES[dtype], 1e-2))
    plan = routing_plan(on_device[1], E)
    assert torch.equal(quantised_moe_layer(*on_device, activation=activation, plan=plan), y)


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("fp8:row", 0.08), ("fp8:128", 0.08), ("int8", 0.02), ("w4a16:32", 1e-6)]
)
def test_reference_layer_is_near_the_dequantised_one(kind: str, tolerance: float) -> None:
    """What quantising activations costs, against a loop on the dequantised weights; a wrong scale costs far more."""
    x, ids, weights, up, down = layer_inputs(6, 32, 16, 3, 2, "swiglu", kind, torch.float32)
    matrices = (dequantise_weights(q, torch.float64) for q in (up, down))
    exact = moe(x.double(), ids, weights.double(), *matrices, "swiglu")
    found = quantised_moe_layer_torch(x, ids, weights, up, down).double()
    assert (found - exact).norm() <= tolerance * exact.norm()
    if tolerance > 1e-3:
        assert (found - exact).norm() >= tolerance / 20 * exact.norm(), "were the activations quantised at all?"


def test_mixed_kinds(device: torch.device) -> None:
    x, ids, weights = to(device, *layer_inputs(5, 32, 16, 2, 2, "swiglu", "int8", HALF)[:3])
    up = quantise_weights(torch.randn(2, 32, 32, device=device), "int8")
    down = quantise_weights(torch.randn(2, 32, 16, device=device), "w4a16:32")
    found = quantised_moe_layer(x, ids, weights, up, down)
    wanted = quantised_moe_layer_torch(x.cpu(), ids.cpu(), weights.cpu(), cpu(up), cpu(down))
    assert_close("y", found, wanted, 1e-2)


def cpu(q: object) -> object:
    """The same on the CPU."""
    return q._replace(values=q.values.cpu(), scales=q.scales.cpu())


@pytest.mark.parametrize("kind", ["int8", "w4a16:32"])
def test_operators(kind: str, device: torch.device) -> None:
    plan = routing_plan(random_ids(5, 2, 2).to(device), 2)
    weights = quantise_weights(torch.randn(2, 32, 32, device=device), kind)
    rows = quantised_rows(torch.randn(5, 32, device=device).to(HALF), kind)
    maps = (plan.offsets, plan.tile_offsets, plan.tile2expert, plan.row2assignment, plan.block_m, plan.top_k)
    arguments = (*rows, weights.values, weights.scales, kind, *maps, "swiglu", True, HALF)
    torch.library.opcheck(_quantised_gemm, arguments)


def test_layer_compiles_whole(device: torch.device) -> None:
    x, ids, weights, up, down = layer_inputs(5, 32, 16, 2, 2, "swiglu", "int8", HALF)
    x, ids, weights = to(device, x, ids, weights)
    up, down = (q._replace(values=q.values.to(device), scales=q.scales.to(device)) for q in (up, down))
    plan = routing_plan(ids, 2)
    compiled = torch.compile(
        lambda x: quantised_moe_layer(x * 2, ids, weights, up, down, plan=plan), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), quantised_moe_layer(x * 2, ids, weights, up, down, plan=plan))
    maps = (plan.counts, plan.offsets, plan.row2assignment, plan.token2row, plan.tile_offsets, plan.tile2expert)
    matrices = (up.values, up.scales, down.values, down.scales)
    torch.library.opcheck(_layer, (x, weights, *matrices, *maps, plan.block_m, "int8", "int8", "swiglu"))


def test_every_tile_is_used() -> None:
    """The cases reach each class of rows."""
    found = {routing_plan_torch(random_ids(T, E, K), E).block_m for T, E, K, *_ in CASES}
    assert found == {16, 32, 64, 128}
    for family in ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942", "gfx950"):
        for kind in KINDS:
            # A tile of a blocked GEMM has one scale of a 128-block at most.
            assert quantised_tile(kind, 128, True, family).block_n <= (128 if kind == "fp8:128" else 256)


def test_activations_are_all_known() -> None:
    assert {act for *_, act, _ in CASES if act} >= set(ACTIVATIONS), "an activation that no case has"


def call(**change: object) -> Tensor:
    """A layer that is right but for `change`."""
    names = ("x", "ids", "weights", "w_gate_up", "w_down")
    inputs = dict(zip(names, layer_inputs(4, 32, 16, 2, 2, "swiglu", "int8", HALF), strict=True))
    return quantised_moe_layer(**inputs | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w_gate_up": torch.zeros(2, 32, 32)}, TypeError, "w_gate_up is a Tensor; QuantisedWeights are needed"),
        (
            {"x": torch.zeros(4, 31).half()},
            ValueError,
            r"w_gate_up.values has shape \[2, 32, 32\]; needed: \[E, 2F, 31\]",
        ),
        ({"w_down": quantise_weights(torch.ones(2, 32, 17), "int8")}, ValueError, r"needed: \[2, 32, 16\]"),
        ({"w_gate_up": quantise_weights(torch.ones(2, 33, 32), "int8")}, ValueError, "needs an even number"),
        ({"activation": "tanh"}, ValueError, "activation is 'tanh'; allowed"),
        (
            {"x": torch.zeros(4, 32).half().requires_grad_()},
            ValueError,
            "x requires a gradient; quantised products are",
        ),
        ({"weights": torch.zeros(4, 2).requires_grad_()}, ValueError, "weights requires a gradient"),
        ({"x": torch.zeros(4, 32).double()}, TypeError, "x is float64"),
        (
            {"x": torch.zeros(4, 32), "w_down": quantise_weights(torch.ones(2, 32, 16), "w4a16:32")},
            TypeError,
            "x is float32; allowed with w4a16:32: float16, bfloat16",
        ),
    ],
)
def test_layer_refuses(change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(**change)


def test_gradients_may_be_switched_off() -> None:
    with torch.no_grad():
        assert call(x=torch.ones(4, 32).half().requires_grad_()).shape == (4, 32)


def test_gemm_refuses() -> None:
    plan = routing_plan_torch(random_ids(4, 2, 2), 2)
    weights = quantise_weights(torch.ones(2, 16, 32), "int8")
    rows = torch.zeros(8, 32, dtype=torch.int8)
    with pytest.raises(TypeError, match="rows is float32; allowed: int8"):
        quantised_gemm(rows.float(), torch.ones(8), weights, plan)
    with pytest.raises(ValueError, match=r"row_scales has shape \[4\]; needed: \[8\]"):
        quantised_gemm(rows, torch.ones(4), weights, plan)
    with pytest.raises(TypeError, match="row_scales is a NoneType"):
        quantised_gemm(rows, None, weights, plan)
    with pytest.raises(ValueError, match="row_scales must be None for w4a16:32"):
        quantised_gemm(rows.half(), torch.ones(8), quantise_weights(torch.ones(2, 16, 32), "w4a16:32"), plan)
    with pytest.raises(ValueError, match="rows requires a gradient"):
        quantised_gemm(rows.half().requires_grad_(), None, quantise_weights(torch.ones(2, 16, 32), "w4a16:32"), plan)
    with pytest.raises(ValueError, match="rows has 140000 columns; int8 sums 133143 at most"):
        quantised_gemm(torch.zeros(8, 140000, dtype=torch.int8), torch.ones(8), weights, plan)
    with pytest.raises(TypeError, match=r"dtype is torch\.float64; allowed: float32, float16, bfloat16"):
        quantised_gemm(rows, torch.ones(8), weights, plan, dtype=torch.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_again(kind: str, device: torch.device) -> None:
    """Nothing depends on the order in which programs run, and a CUDA graph replays the same."""
    runs(kind, device)
    x, ids, weights, up, down = layer_inputs(500, 512, 384, 8, 2, "swiglu", kind, torch.bfloat16)
    x, ids, weights = to(device, x, ids, weights)
    up, down = (q._replace(values=q.values.to(device), scales=q.scales.to(device)) for q in (up, down))
    y = quantised_moe_layer(x, ids, weights, up, down)
    for _ in range(20):
        assert torch.equal(quantised_moe_layer(x, ids, weights, up, down), y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = quantised_moe_layer(x, ids, weights, up, down)
    graph.replay()
    assert torch.equal(replayed, y)
