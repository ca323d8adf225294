"""grouped_gemm and the two projections, forward and backward, against reference, loop and float64 autograd."""

from __future__ import annotations

import pytest
import torch
from kernel_loops import SCALARS, TOLERANCES, assert_close, expert, leaf, matvec, random_ids
from torch import Tensor

from moebench_kernels import (
    ACTIVATIONS,
    down_projection,
    down_projection_torch,
    grouped_gemm,
    grouped_gemm_torch,
    permute_torch,
    routing_plan,
    routing_plan_torch,
    up_projection,
    up_projection_torch,
)
from moebench_kernels.activation import GATED, activate_torch
from moebench_kernels.tiles import BLOCK_MS, tile_rows

HALF = torch.float16
# T, E, K, D_in, D_out, dropped, dtype; the last crosses tiles in every direction.
GEMMS = [
    (0, 5, 2, 17, 48, 0.0, torch.float32),
    (1, 1, 1, 1, 1, 0.0, torch.float32),
    (3, 2, 2, 17, 40, 1.0, torch.float32),
    (33, 5, 4, 48, 17, 0.3, torch.float32),
    (9, 60, 8, 40, 48, 0.1, HALF),
    (65, 8, 1, 17, 17, 0.0, HALF),
    (65, 2, 1, 48, 40, 0.3, torch.bfloat16),
    (150, 2, 1, 70, 140, 0.1, torch.float32),
    (140, 1, 1, 150, 140, 0.1, HALF),
]


def operands(T: int, E: int, K: int, n_in: int, n_out: int, dropped: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, rows (poisoned where they belong to no expert), weights, upstream gradient."""
    ids = random_ids(T, E, K, dropped)
    rows = torch.randn(T * K, n_in)
    rows[int(routing_plan_torch(ids, E).offsets[-1]) :] = float("nan")
    return ids, rows, torch.randn(E, n_out, n_in) * n_in**-0.5, torch.randn(T * K, n_out)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("T", "E", "K", "n_in", "n_out", "dropped", "dtype"), GEMMS)
def test_grouped_gemm(
    T: int, E: int, K: int, n_in: int, n_out: int, dropped: float, dtype: torch.dtype, transpose: bool,
    device: torch.device,
) -> None:  # fmt: skip
    ids, rows, weights, upstream = operands(T, E, K, n_in, n_out, dropped)
    weights = weights.mT.contiguous() if transpose else weights
    plan, reference = routing_plan(ids.to(device), E), routing_plan_torch(ids, E)
    mine = [leaf(tensor, dtype, device) for tensor in (rows, weights)]
    exact = [leaf(tensor.to(dtype), torch.float64) for tensor in (rows, weights)]
    out, wanted = (
        grouped_gemm(*mine, plan, transpose=transpose),
        grouped_gemm_torch(*exact, reference, transpose=transpose),
    )
    assert out.dtype == dtype
    assert_close("out", out, wanted, TOLERANCES[dtype])
    out.backward(upstream.to(device, dtype))
    wanted.backward(upstream.to(dtype).double())
    for name, found, want in zip(("d_rows", "d_weights"), mine, exact, strict=True):
        assert_close(name, found.grad, want.grad, TOLERANCES[dtype])
    idle = (reference.counts == 0).tolist()
    assert (mine[1].grad.cpu()[idle] == 0).all(), "an idle expert has a gradient"


def test_reference_equals_loop() -> None:
    ids, rows, weights, _ = operands(9, 3, 2, 7, 5, 0.3)
    plan = routing_plan_torch(ids, 3)
    found = grouped_gemm_torch(rows.double(), weights.double(), plan)
    matrices = weights.double().tolist()
    for r, e in enumerate(plan.row2expert.tolist()):
        loop = matvec(matrices[e], rows[r].double().tolist()) if e >= 0 else [0.0] * 5
        assert_close("row", found[r], torch.tensor(loop, dtype=torch.float64), 1e-12)


def test_every_tile_is_used() -> None:
    """The sweep above reaches each row-count class of the tile table."""
    assert {tile_rows(T * K / E) for T, E, K, *_ in GEMMS} == set(BLOCK_MS)


# T, E, K, D, F, dropped, dtype
PROJECTIONS = [
    (0, 5, 2, 17, 40, 0.0, torch.float32),
    (33, 5, 4, 48, 17, 0.3, torch.float32),
    (9, 8, 2, 17, 40, 0.2, HALF),
    (130, 2, 1, 40, 70, 0.0, HALF),
]


# Every activation with every case; both forms of x with each of either, but not with each pair.
SWEEP = [(*case, kind, (i + j) % 2 == 0) for i, case in enumerate(PROJECTIONS) for j, kind in enumerate(ACTIVATIONS)]


@pytest.mark.parametrize(("T", "E", "K", "D", "F", "dropped", "dtype", "activation", "permuted"), SWEEP)
def test_up_projection(
    T: int, E: int, K: int, D: int, F: int, dropped: float, dtype: torch.dtype, activation: str, permuted: bool,
    device: torch.device,
) -> None:  # fmt: skip
    m = 2 if activation in GATED else 1
    ids, _, w_gate_up, _ = operands(T, E, K, D, m * F, dropped)
    x, upstream = torch.randn(T, D), torch.randn(T * K, F)
    plan, reference = routing_plan(ids.to(device), E), routing_plan_torch(ids, E)
    x = permute_torch(x, reference) if permuted else x
    mine = [leaf(tensor, dtype, device) for tensor in (x, w_gate_up)]
    exact = [leaf(tensor.to(dtype), torch.float64) for tensor in (x, w_gate_up)]
    hidden = up_projection(*mine, plan, activation=activation, permuted=permuted)
    wanted = up_projection_torch(*exact, reference, activation=activation, permuted=permuted)
    assert_close("hidden", hidden, wanted, TOLERANCES[dtype])
    hidden.backward(upstream.to(device, dtype))
    wanted.backward(upstream.to(dtype).double())
    for name, found, want in zip(("dx", "d_w_gate_up"), mine, exact, strict=True):
        assert_close(name, found.grad, want.grad, TOLERANCES[dtype])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_up_projection_reference_equals_loop(activation: str) -> None:
    m = 2 if activation in GATED else 1
    ids, _, w_gate_up, _ = operands(5, 3, 2, 7, m * 4, 0.3)
    x, plan = torch.randn(5, 7).double(), routing_plan_torch(ids, 3)
    found = up_projection_torch(x, w_gate_up.double(), plan, activation=activation)
    for r, (e, t) in enumerate(zip(plan.row2expert.tolist(), plan.row2token.tolist(), strict=True)):
        loop = expert(x[t].tolist(), w_gate_up[e].double().tolist(), activation) if e >= 0 else [0.0] * 4
        assert_close("row", found[r], torch.tensor(loop, dtype=torch.float64), 1e-12)


def test_activation_at_far_inputs() -> None:
    """The loops' own scalars agree with the reference where exp and erf saturate."""
    z = torch.tensor([-30.0, -1.0, 0.0, 1.0, 30.0], dtype=torch.float64)
    for kind, scalar in SCALARS.items():
        wanted = torch.tensor([scalar(value) for value in z.tolist()], dtype=torch.float64)
        assert torch.allclose(activate_torch(z, kind), wanted, atol=1e-14)


def test_up_projection_saturates_without_nan(device: torch.device) -> None:
    plan = routing_plan(torch.zeros(2, 1, dtype=torch.int32, device=device), 1)
    for activation in ACTIVATIONS:
        m = 2 if activation in GATED else 1
        x = torch.tensor([[1.0], [-1.0]], device=device).requires_grad_()
        hidden = up_projection(x, torch.full((1, m, 1), 200.0, device=device), plan, activation=activation)
        hidden.sum().backward()
        assert torch.isfinite(hidden).all()
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.bfloat16])
def test_down_projection(dtype: torch.dtype, device: torch.device) -> None:
    ids, hidden, w_down, _ = operands(33, 5, 2, 40, 17, 0.2)
    plan, reference = routing_plan(ids.to(device), 5), routing_plan_torch(ids, 5)
    found = down_projection(hidden.to(device, dtype), w_down.to(device, dtype), plan)
    wanted = down_projection_torch(hidden.to(dtype).double(), w_down.to(dtype).double(), reference)
    assert_close("rows", found, wanted, TOLERANCES[dtype])


def test_no_gradient_keeps_nothing(device: torch.device) -> None:
    """Without a gradient the pre-activation is not even stored."""
    plan = routing_plan(random_ids(4, 2, 1).to(device), 2)
    x, w = torch.randn(4, 8, device=device), torch.randn(2, 8, 8, device=device).requires_grad_()
    with torch.no_grad():
        assert up_projection(x, w, plan).grad_fn is None
    assert up_projection(x, w, plan).grad_fn is not None


def test_second_derivatives_are_refused(device: torch.device) -> None:
    plan = routing_plan(random_ids(4, 2, 1).to(device), 2)
    x, w = torch.randn(4, 8, device=device).requires_grad_(), torch.randn(2, 8, 8, device=device)
    (dx,) = torch.autograd.grad(up_projection(x, w, plan).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "error", "message"),
    [
        ((8, 24, 15), torch.float32, {}, ValueError, r"w_gate_up has shape \[8, 24, 15\]; needed: \[8, 2F, 16\]"),
        ((7, 24, 16), torch.float32, {}, ValueError, r"needed: \[8, 2F, 16\]"),
        ((8, 23, 16), torch.float32, {}, ValueError, "w_gate_up has 23 rows an expert; swiglu needs an even number"),
        ((8, 24, 16), HALF, {}, TypeError, "one dtype is needed for all, found: x float32, w_gate_up float16"),
        (
            (8, 24, 16),
            torch.float32,
            {"activation": "tanh"},
            ValueError,
            "activation is 'tanh'; allowed: swiglu, geglu",
        ),
        ((8, 24, 16), torch.float32, {"permuted": True}, ValueError, r"x has shape \[4, 16\]; needed: \[8, D\]"),
        ((8, 24, 16), torch.float64, {}, TypeError, "w_gate_up is float64"),
    ],
)
def test_up_projection_refuses(
    shape: tuple[int, ...], dtype: torch.dtype, options: dict, error: type, message: str, device: torch.device
) -> None:
    plan = routing_plan(random_ids(4, 8, 2).to(device), 8)
    with pytest.raises(error, match=message):
        up_projection(
            torch.zeros(4, 16, device=device), torch.zeros(shape, dtype=dtype, device=device), plan, **options
        )


def test_down_projection_refuses(device: torch.device) -> None:
    plan = routing_plan(random_ids(4, 8, 2).to(device), 8)
    with pytest.raises(ValueError, match=r"w_down has shape \[8, 16, 11\]; needed: \[8, D, 12\]"):
        down_projection(torch.zeros(8, 12, device=device), torch.zeros(8, 16, 11, device=device), plan)
    with pytest.raises(ValueError, match=r"weights has shape \[9, 16, 12\]; needed: \[8, D_out, D_in\]"):
        grouped_gemm(torch.zeros(8, 12, device=device), torch.zeros(9, 16, 12, device=device), plan)
