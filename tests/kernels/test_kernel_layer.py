"""moe_layer: forward and every gradient, by shape, activation and dtype; and bit-identical repetition."""

from __future__ import annotations

import pytest
import torch
from kernel_loops import TOLERANCES, assert_close, leaf, moe, random_ids
from torch import Tensor

from moebench_kernels import (
    ACTIVATIONS,
    combine,
    down_projection,
    moe_layer,
    moe_layer_torch,
    permute,
    routing_plan,
    up_projection,
)
from moebench_kernels.activation import GATED

HALF, WIDE, BRAIN = torch.float16, torch.float32, torch.bfloat16
# T, E, K, D, F, activation, dropped, dtype
CASES = [
    (0, 5, 2, 17, 40, "swiglu", 0.0, WIDE),
    (1, 1, 1, 1, 1, "swiglu", 0.0, WIDE),
    (1, 8, 8, 48, 17, "geglu", 0.0, HALF),
    (3, 2, 2, 17, 40, "relu", 0.0, WIDE),
    (3, 60, 4, 40, 48, "swiglu", 0.2, HALF),
    (33, 1, 1, 48, 48, "silu", 0.0, HALF),
    (33, 2, 1, 40, 17, "geglu", 0.5, WIDE),
    (33, 5, 4, 17, 17, "gelu", 0.1, WIDE),
    (33, 8, 2, 48, 40, "swiglu", 0.0, BRAIN),
    (65, 5, 2, 40, 48, "relu", 1.0, WIDE),
    (65, 8, 4, 17, 48, "swiglu", 0.3, WIDE),
    (33, 60, 1, 48, 40, "silu", 0.0, WIDE),
    (65, 2, 2, 40, 17, "gelu", 0.3, HALF),
    (9, 60, 8, 40, 17, "geglu", 0.1, BRAIN),
]
NAMES = ("dx", "d_weights", "d_w_gate_up", "d_w_down")


def tensors(T: int, E: int, K: int, D: int, F: int, activation: str, dropped: float) -> tuple[Tensor, list[Tensor]]:
    """ids, and [x, weights, w_gate_up, w_down] in float32."""
    m = 2 if activation in GATED else 1
    ids, weights = random_ids(T, E, K, dropped), torch.rand(T, K)
    w_gate_up, w_down = torch.randn(E, m * F, D) * D**-0.5, torch.randn(E, D, F) * F**-0.5
    return ids, [torch.randn(T, D), weights, w_gate_up, w_down]


def leaves(values: list[Tensor], dtype: torch.dtype, device: torch.device, weights_dtype: torch.dtype) -> list[Tensor]:
    """Fresh leaves of `dtype`, the router weights of their own."""
    return [leaf(v, weights_dtype if i == 1 else dtype, device) for i, v in enumerate(values)]


def check(ids: Tensor, values: list[Tensor], activation: str, dtype: torch.dtype, device: torch.device) -> None:
    values = [v if i == 1 else v.to(dtype).float() for i, v in enumerate(values)]
    upstream = torch.randn(values[0].shape).to(dtype)
    mine = leaves(values, dtype, device, torch.float32)
    exact = leaves(values, torch.float64, torch.device("cpu"), torch.float64)
    y = moe_layer(mine[0], ids.to(device), *mine[1:], activation=activation)
    wanted = moe_layer_torch(exact[0], ids, *exact[1:], activation=activation)
    assert y.dtype == dtype
    assert_close("y", y, wanted, TOLERANCES[dtype])
    y.backward(upstream.to(device))
    wanted.backward(upstream.double())
    for name, found, want in zip(NAMES, mine, exact, strict=True):
        assert_close(name, found.grad, want.grad, TOLERANCES[dtype])
    idle = torch.bincount(ids[(ids >= 0) & (ids < len(values[2]))], minlength=len(values[2])) == 0
    assert (mine[2].grad.cpu()[idle] == 0).all()
    assert (mine[3].grad.cpu()[idle] == 0).all()


@pytest.mark.parametrize(("T", "E", "K", "D", "F", "activation", "dropped", "dtype"), CASES)
def test_layer(
    T: int, E: int, K: int, D: int, F: int, activation: str, dropped: float, dtype: torch.dtype, device: torch.device
) -> None:
    ids, values = tensors(T, E, K, D, F, activation, dropped)
    check(ids, values, activation, dtype, device)


def test_all_tokens_on_one_expert(device: torch.device) -> None:
    _, values = tensors(65, 5, 1, 17, 40, "swiglu", 0.0)
    check(torch.full((65, 1), 3), values, "swiglu", torch.float32, device)


def test_one_expert_named_twice_by_a_token(device: torch.device) -> None:
    """Ids need not be distinct in a row."""
    _, values = tensors(5, 3, 2, 17, 8, "swiglu", 0.0)
    check(torch.ones(5, 2, dtype=torch.int64), values, "swiglu", torch.float32, device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_equals_loop(activation: str) -> None:
    ids, values = tensors(9, 5, 3, 7, 6, activation, 0.3)
    x, weights, w_gate_up, w_down = (v.double() for v in values)
    found = moe_layer_torch(x, ids, weights, w_gate_up, w_down, activation=activation)
    assert_close("reference", found, moe(x, ids, weights, w_gate_up, w_down, activation), 1e-12)


def test_stages_make_the_layer(device: torch.device) -> None:
    """The public stages, composed, give the layer's answer and gradients."""
    ids, values = tensors(33, 5, 2, 48, 40, "swiglu", 0.2)
    upstream = torch.randn(33, 48, device=device)
    whole, staged = (leaves(values, torch.float32, device, torch.float32) for _ in range(2))
    x, weights, w_gate_up, w_down = staged
    plan = routing_plan(ids.to(device), 5)
    hidden = up_projection(permute(x, plan), w_gate_up, plan, permuted=True)
    y = combine(down_projection(hidden, w_down, plan), weights, plan)
    y.backward(upstream)
    moe_layer(whole[0], ids.to(device), *whole[1:]).backward(upstream)
    for name, one, other in zip(NAMES, whole, staged, strict=True):
        assert_close(name, one.grad, other.grad, 4e-6)


def test_strided_ids_and_weights(device: torch.device) -> None:
    """Slices of a sort, as routers make them; the answer is that of their copies."""
    ids, (x, _, w_gate_up, w_down) = tensors(9, 3, 2, 17, 8, "swiglu", 0.0)
    full = torch.stack([ids, ids.flip(0)], dim=2).to(device)
    gates = torch.rand(9, 5, device=device).requires_grad_()
    x, w_gate_up, w_down = (tensor.to(device) for tensor in (x, w_gate_up, w_down))
    y = moe_layer(x, full[:, :, 0], gates[:, 1:3], w_gate_up, w_down)
    y.sum().backward()
    assert torch.equal(y, moe_layer(x, ids.to(device), gates[:, 1:3].contiguous(), w_gate_up, w_down))
    plan = routing_plan(full[:, :, 0], 3)
    rows = down_projection(up_projection(x, w_gate_up, plan), w_down, plan)
    assert torch.equal(y, combine(rows, gates[:, 1:3], plan))
    assert (gates.grad[:, 1:3] != 0).all()
    assert (gates.grad[:, [0, 3, 4]] == 0).all()


def test_only_what_is_asked_for(device: torch.device) -> None:
    """Each gradient alone, the others' tensors frozen."""
    ids, values = tensors(9, 3, 2, 17, 8, "swiglu", 0.0)
    every = leaves(values, torch.float32, device, torch.float32)
    moe_layer(every[0], ids.to(device), *every[1:]).sum().backward()
    for i, name in enumerate(NAMES):
        one = [v.detach().clone().requires_grad_(i == j) for j, v in enumerate(every)]
        moe_layer(one[0], ids.to(device), *one[1:]).sum().backward()
        assert torch.equal(one[i].grad, every[i].grad), name
        assert all(v.grad is None for j, v in enumerate(one) if j != i)


def test_weights_of_dropped_assignments_are_not_read(device: torch.device) -> None:
    ids, values = tensors(9, 3, 2, 17, 8, "swiglu", 0.0)
    ids[2] = -1
    values[1][2] = float("nan")
    mine = leaves(values, torch.float32, device, torch.float32)
    y = moe_layer(mine[0], ids.to(device), *mine[1:])
    y.sum().backward()
    assert (y[2] == 0).all()
    assert (mine[0].grad[2] == 0).all()
    assert (mine[1].grad[2] == 0).all()
    assert all(torch.isfinite(tensor.grad).all() for tensor in mine)


def test_repetition_is_bit_identical(device: torch.device) -> None:
    ids, values = tensors(33, 5, 2, 48, 40, "swiglu", 0.1)
    runs = []
    for _ in range(3 if device.type == "cuda" else 2):
        mine = leaves(values, torch.float32, device, torch.float32)
        y = moe_layer(mine[0], ids.to(device), *mine[1:])
        y.square().sum().backward()
        runs.append([y, *(tensor.grad for tensor in mine)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, torch.zeros(4, 15), ValueError, r"w_gate_up has shape \[8, 24, 16\]; needed: \[E, 2F, 15\]"),
        (0, torch.zeros(4, 16).half(), TypeError, "one dtype is needed for all, found: x float16, w_gate_up float32"),
        (1, torch.zeros(3, 2, dtype=torch.int64), ValueError, r"ids has shape \[3, 2\]; needed: \[4, K\]"),
        (1, torch.zeros(4, 2), TypeError, "ids is float32; allowed: int32, int64"),
        (2, torch.zeros(4, 3), ValueError, r"weights has shape \[4, 3\]; needed: \[4, 2\]"),
        (2, torch.zeros(4, 2).double(), TypeError, "weights is float64; allowed: float32"),
        (4, torch.zeros(8, 12, 16), ValueError, r"w_down has shape \[8, 12, 16\]; needed: \[8, 16, 12\]"),
        (4, torch.zeros(8, 12, 16).mT, ValueError, "w_down has strides"),
    ],
)
def test_layer_refuses(position: int, value: Tensor, error: type, message: str, device: torch.device) -> None:
    good = [torch.zeros(4, 16), torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2), torch.zeros(8, 24, 16)]
    arguments = [tensor.to(device) for tensor in [*good, torch.zeros(8, 16, 12)]]
    arguments[position] = value.to(device)
    with pytest.raises(error, match=message):
        moe_layer(*arguments)


@pytest.mark.gpu
def test_layer_large_bf16(device: torch.device) -> None:
    """The large tiles on real hardware, in the dtype the interpreter cannot round."""
    ids, values = tensors(4096, 16, 2, 512, 384, "swiglu", 0.05)
    check(ids, values, "swiglu", torch.bfloat16, device)
