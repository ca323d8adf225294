"""moe_layer: forward and every gradient, by shape, activation, biases and dtype; repetition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_gate_loops import pairwise
from kernel_layers import NAMES, layer, leaves, tensors
from kernel_loops import TOLERANCES, assert_close, moe, random_ids
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

HALF, WIDE, BRAIN = torch.float16, torch.float32, torch.bfloat16
FACTORS: dict[str, tuple[Any, ...]] = {
    "T": (0, 1, 3, 33, 127, 128, 129, 500),
    "E": (1, 2, 8, 60, 64, 160, 257),
    "K": (1, 2, 3, 4, 5, 6, 7, 8, 16),
    "D": (16, 17, 40),
    "F": (16, 17, 72),
    "activation": ACTIVATIONS,
    "dropped": (0.0, 0.3, 1.0),
    "bias": (None, "same", "float32"),
    "dtype": (WIDE, HALF, BRAIN),
}


def effort(case: dict[str, Any]) -> float:
    """About how many tiles a case takes; the interpreter needs some 10 ms for each."""
    rows = case["T"] * case["K"]
    return case["E"] / 4 + min(case["E"], rows) + rows / 40


# What is heavy in the interpreter is left to `make test-full`, and to a GPU.
CASES = pairwise(FACTORS)
LIGHT = [case for case in CASES if effort(case) <= 32]
small = {"D": 17, "F": 16, "bias": None}
LIGHT += [CASES[0] | small | {"T": 3, "E": 257, "K": 1}, CASES[1] | small | {"T": 1, "E": 160, "K": 2, "dropped": 0.3}]


def label(case: dict[str, Any]) -> str:
    """A case in a few letters."""
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


def check(
    ids: Tensor, values: list[Tensor], activation: str, dtype: torch.dtype, device: torch.device,
    bias: torch.dtype | None = None,
) -> None:  # fmt: skip
    values = [v if i == 1 or (i >= 4 and bias == WIDE) else v.to(dtype).float() for i, v in enumerate(values)]
    upstream = torch.randn(values[0].shape).to(dtype)
    mine = leaves(values, dtype, device, torch.float32, bias)
    exact = leaves(values, torch.float64, torch.device("cpu"), torch.float64)
    y = layer(moe_layer, ids.to(device), mine, activation=activation)
    wanted = layer(moe_layer_torch, ids, exact, activation=activation)
    assert y.dtype == dtype
    assert_close("y", y, wanted, TOLERANCES[dtype])
    y.backward(upstream.to(device))
    wanted.backward(upstream.double())
    for name, found, want in zip(NAMES, mine, exact, strict=False):
        assert found.grad.dtype == found.dtype
        assert_close(name, found.grad, want.grad, GRADIENT_TOLERANCES[dtype])
    idle = torch.bincount(ids[(ids >= 0) & (ids < len(values[2]))], minlength=len(values[2])) == 0
    for found in mine[2:]:
        assert (found.grad.cpu()[idle] == 0).all()


# Sums that cancel (a router weight's gradient with a bias, say) lose a digit.
GRADIENT_TOLERANCES = {dtype: 2 * tolerance for dtype, tolerance in TOLERANCES.items()}


@pytest.mark.parametrize("case", LIGHT, ids=label)
def test_layer(case: dict[str, Any], device: torch.device) -> None:
    run(case, device)


def run(case: dict[str, Any], device: torch.device) -> None:
    """One case of FACTORS."""
    shape = {name: case[name] for name in ("T", "E", "K", "D", "F", "activation", "dropped")}
    ids, values = tensors(**shape, bias=case["bias"] is not None)
    check(ids, values, case["activation"], case["dtype"], device, WIDE if case["bias"] == "float32" else None)


def test_the_cover_is_broad() -> None:
    """Without the heavy cases every value but the most tokens still occurs."""
    for name, values in FACTORS.items():
        assert {case[name] for case in CASES} == set(values)
        assert {case[name] for case in LIGHT} >= set(values) - {500}, name


@pytest.mark.full
@pytest.mark.parametrize("E", FACTORS["E"])
@pytest.mark.parametrize("T", FACTORS["T"])
def test_layer_on_the_whole_product(T: int, E: int, device: torch.device) -> None:
    """Every T, E and K; the rest as a pairwise cover in turn, begun elsewhere for each T and E (hours, not days)."""
    rest = pairwise({name: values for name, values in FACTORS.items() if name not in ("T", "E", "K")})
    for place, K in enumerate(FACTORS["K"], start=T + E):
        run({"T": T, "E": E, "K": K} | rest[place % len(rest)], device)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=label)
def test_layer_every_case_on_a_gpu(case: dict[str, Any], device: torch.device) -> None:
    run(case, device)


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
    for name, one, other in zip(NAMES[:4], whole, staged, strict=True):
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
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layer_large_bf16(activation: str, device: torch.device) -> None:
    """The large tiles on real hardware, in the dtype the interpreter cannot round."""
    ids, values = tensors(4096, 16, 2, 512, 384, activation, 0.05, bias=True)
    check(ids, values, activation, torch.bfloat16, device)


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True])
def test_cuda_graph(backward: bool, device: torch.device) -> None:
    """Captured once, replayed on other inputs and another routing: the bits of a plain call."""
    ids, values = tensors(1024, 16, 4, 256, 128, "swiglu", 0.05, bias=True)
    mine, ids = leaves(values, torch.bfloat16, device, torch.float32), ids.to(device)

    def step() -> list[Tensor]:
        y = layer(moe_layer, ids, mine)
        return [y, *torch.autograd.grad(y.float().square().sum(), mine)] if backward else [y.detach()]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        mine[0].normal_()
        ids.copy_(random_ids(1024, 16, 4, 0.4))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.gpu
def test_no_race_in_many_repetitions(device: torch.device) -> None:
    ids, values = tensors(2048, 8, 2, 384, 256, "swiglu", 0.05, bias=True)
    mine, first = leaves(values, torch.bfloat16, device, torch.float32), None
    for _ in range(50):
        y = layer(moe_layer, ids.to(device), mine)
        run = [y, *torch.autograd.grad(y.float().square().sum(), mine)]
        first = first or run
        assert all(torch.equal(a, b) for a, b in zip(first, run, strict=True))
