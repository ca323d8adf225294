"""moe_layer: forward and every gradient, by shape, activation, biases and dtype; its operators; repetition."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from kernel_gate_loops import pairwise
from kernel_loops import TOLERANCES, assert_close, leaf, moe, random_ids
from torch import Tensor

from moebench_kernels import (
    ACTIVATIONS,
    Plan,
    combine,
    down_projection,
    moe_layer,
    moe_layer_torch,
    permute,
    routing_plan,
    routing_plan_torch,
    up_projection,
)
from moebench_kernels.activation import GATED
from moebench_kernels.activation_gemm_backward import (
    TILES,
    activation_gemm_backward_torch,
    backward_config,
    builds,
    launch_activation_gemm_backward,
)
from moebench_kernels.plan import tile_map_torch

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
NAMES = ("dx", "d_weights", "d_w_gate_up", "d_w_down", "d_b_gate_up", "d_b_down")


def label(case: dict[str, Any]) -> str:
    """A case in a few letters."""
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


def tensors(
    T: int, E: int, K: int, D: int, F: int, activation: str, dropped: float, bias: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """ids, and [x, weights, w_gate_up, w_down, and with bias b_gate_up, b_down] in float32."""
    m = 2 if activation in GATED else 1
    ids = torch.cat([random_ids(T, E, min(E, K - first), dropped) for first in range(0, K, E)], dim=1)
    w_gate_up, w_down = torch.randn(E, m * F, D) * D**-0.5, torch.randn(E, D, F) * F**-0.5
    biases = [torch.randn(E, m * F), torch.randn(E, D)] if bias else []
    return ids, [torch.randn(T, D), torch.rand(T, K), w_gate_up, w_down, *biases]


def leaves(
    values: list[Tensor],
    dtype: torch.dtype,
    device: torch.device,
    weights: torch.dtype,
    bias: torch.dtype | None = None,
) -> list[Tensor]:
    """Fresh leaves of `dtype`, the router weights and the biases of their own."""
    return [leaf(v, weights if i == 1 else bias or dtype if i >= 4 else dtype, device) for i, v in enumerate(values)]


def layer(function: Any, ids: Tensor, values: list[Tensor], **options: Any) -> Tensor:
    """The layer, or its reference, on a list as `tensors` makes it."""
    x, weights, w_gate_up, w_down, *biases = values
    named = dict(zip(("b_gate_up", "b_down"), biases, strict=False))
    return function(x, ids, weights, w_gate_up, w_down, **named, **options)


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
    rest = {name: values for name, values in FACTORS.items() if name not in ("T", "E")}
    for choice in itertools.product(*rest.values()):
        run({"T": T, "E": E} | dict(zip(rest, choice, strict=True)), device)


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


def test_only_what_is_asked_for(device: torch.device) -> None:
    """Each gradient alone, the others' tensors frozen, gives the same bits; and nothing else is computed."""
    ids, values = tensors(9, 3, 2, 17, 8, "swiglu", 0.0, bias=True)
    every = leaves(values, torch.float32, device, torch.float32)
    layer(moe_layer, ids.to(device), every).sum().backward()
    for i, name in enumerate(NAMES):
        one = [v.detach().clone().requires_grad_(i == j) for j, v in enumerate(every)]
        layer(moe_layer, ids.to(device), one).sum().backward()
        assert torch.equal(one[i].grad, every[i].grad), name
        assert all(v.grad is None for j, v in enumerate(one) if j != i)


# What each gradient alone needs: of the fused step dz, w * a and d_weights, grouped GEMMs, ragged GEMMs.
NEEDS = [
    ((True, False, False), 1, 0), ((False, False, True), 1, 0), ((True, False, False), 0, 1),
    ((False, True, False), 0, 1), ((True, False, False), 0, 0), (None, 0, 1),
]  # fmt: skip


@pytest.mark.parametrize("needed", range(6))
def test_backward_computes_nothing_that_was_not_asked_for(
    needed: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, list[dict[str, Any]]] = {}
    names = ("launch_activation_gemm_backward", "launch_grouped_gemm", "launch_ragged_gemm")
    module = importlib.import_module("moebench_kernels.layer")
    for name in names:
        original = getattr(module, name)

        def counted(*given: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            calls.setdefault(name, []).append(options)
            return original(*given, **options)

        monkeypatch.setattr(module, name, counted)
    needs = [i == needed for i in range(6)]
    found = torch.ops.moebench.moe_layer_backward(*operator_arguments(device), needs)
    assert [tensor.numel() > 0 for tensor in found] == needs
    fused = [tuple(o[k] for k in ("need_dz", "need_wa", "need_d_weights")) for o in calls.get(names[0], [])]
    wanted, grouped, ragged = NEEDS[needed]
    assert fused == ([] if wanted is None else [wanted])
    assert [len(calls.get(name, [])) for name in names[1:]] == [grouped, ragged]


@pytest.mark.parametrize("T", [9, 129])
def test_inference_stores_no_pre_activation(T: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under no_grad, parameters or not; up to 128 tokens not even the layer's operator is called, but decode's."""
    ids, values = tensors(T, 3, 2, 17, 8, "swiglu", 0.0)
    mine, kept = leaves(values, torch.float32, device, torch.float32), []
    module = importlib.import_module("moebench_kernels.layer")
    original = module._moe_layer

    def recorded(*given: Any) -> Any:
        kept.append(given[-1])
        return original(*given)

    monkeypatch.setattr(module, "_moe_layer", recorded)
    with torch.no_grad():
        without = layer(moe_layer, ids.to(device), mine)
    assert kept == ([False] if T > 128 else [])
    assert_close("y", without, layer(moe_layer, ids.to(device), mine), 2e-6)
    assert kept[-1] is True


def test_without_gradient_nothing_is_kept(device: torch.device) -> None:
    """z is not even stored; with a gradient wanted it is."""
    _, x, weights, w_gate_up, w_down, b_down, z, plan, block_m, activation = operator_arguments(device)
    for keep in (False, True):
        y, kept = torch.ops.moebench.moe_layer(
            x, weights, w_gate_up, w_down, None, b_down, plan, block_m, activation, keep
        )
        assert y.shape == x.shape
        assert kept.shape == (z.shape if keep else (0,))


def operator_arguments(device: torch.device) -> tuple[Any, ...]:
    """What the backward operator takes, but for `needs`."""
    ids, values = tensors(4, 2, 2, 17, 8, "swiglu", 0.2, bias=True)
    x, weights, w_gate_up, w_down, _, b_down = (value.to(device) for value in values)
    *plan, block_m = routing_plan(ids.to(device), 2)
    z = torch.randn(8, 16, device=device)
    return torch.randn_like(x), x, weights, w_gate_up, w_down, b_down, z, plan, block_m, "swiglu"


def test_operators(device: torch.device) -> None:
    dy, x, weights, w_gate_up, w_down, b_down, z, plan, block_m, activation = operator_arguments(device)
    inputs = [tensor.requires_grad_() for tensor in (x, weights, w_gate_up, w_down)]
    torch.library.opcheck(
        torch.ops.moebench.moe_layer.default, (*inputs, None, b_down, plan, block_m, activation, True)
    )
    frozen = [tensor.detach() for tensor in inputs]
    torch.library.opcheck(
        torch.ops.moebench.moe_layer_backward.default,
        (dy, *frozen, b_down, z, plan, block_m, activation, [True, False, True, True, False, True]),
    )


def test_compiles_whole(device: torch.device) -> None:
    ids, values = tensors(33, 5, 2, 16, 24, "swiglu", 0.1, bias=True)
    plan, runs = routing_plan(ids.to(device), 5), []
    for function in (moe_layer, torch.compile(moe_layer, fullgraph=True, backend="aot_eager")):
        mine = leaves(values, torch.float32, device, torch.float32)
        y = layer(function, ids.to(device), mine, plan=plan)
        runs.append([y, *torch.autograd.grad(y.square().sum(), mine)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_callers_plan_is_the_layers_own(device: torch.device) -> None:
    ids, values = tensors(33, 5, 2, 17, 24, "gelu", 0.1)
    mine = leaves(values, torch.float32, device, torch.float32)
    plan = routing_plan(ids.to(device), 5)
    own = layer(moe_layer, ids.to(device), mine, activation="gelu")
    assert torch.equal(own, layer(moe_layer, ids.to(device), mine, activation="gelu", plan=plan))
    with pytest.raises(ValueError, match=r"the plan is of ids \[33, 2\] and 5 experts; ids has shape \[32, 2\]"):
        moe_layer(mine[0][:32], ids[:32].to(device), mine[1][:32], *mine[2:], activation="gelu", plan=plan)
    with pytest.raises(ValueError, match="capacity given beside a plan; give them to routing_plan"):
        layer(moe_layer, ids.to(device), mine, activation="gelu", plan=plan, capacity=3)


@pytest.mark.parametrize("by_priority", [False, True])
def test_capacity(by_priority: bool, device: torch.device) -> None:
    """Passed on to the plan, in the layer and in its reference; dropped assignments get no gradient."""
    ids, values = tensors(33, 3, 2, 16, 8, "swiglu", 0.0)
    options: dict[str, Any] = {"capacity": 7} | ({"priority": torch.rand(33, 2, device=device)} if by_priority else {})
    mine, exact = (leaves(values, dtype, device, dtype) for dtype in (torch.float32, torch.float64))
    y = layer(moe_layer, ids.to(device), mine, **options)
    wanted = layer(moe_layer_torch, ids.to(device), exact, **options)
    assert_close("y", y, wanted, 2e-6)
    for name, found, want in zip(
        NAMES, torch.autograd.grad(y.sum(), mine), torch.autograd.grad(wanted.sum(), exact), strict=False
    ):
        assert_close(name, found, want, 4e-6)
        if name == "d_weights":
            assert (found != 0).sum() == 21


def test_second_derivatives_are_refused(device: torch.device) -> None:
    ids, values = tensors(5, 3, 2, 16, 8, "swiglu", 0.0)
    mine = leaves(values, torch.float32, device, torch.float32)
    (dx,) = torch.autograd.grad(layer(moe_layer, ids.to(device), mine).square().sum(), mine[0], create_graph=True)
    with pytest.raises(RuntimeError, match="moe_layer has no second derivatives"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("activation", "block_m", "D", "F"),
    [("swiglu", 16, 70, 136), ("clamped_swiglu", 32, 16, 40), ("relu", 64, 17, 130)],
)
def test_activation_gemm_backward(activation: str, block_m: int, D: int, F: int, device: torch.device) -> None:
    """The fused step alone, over several tiles in each direction, with and without descriptors."""
    ids, (dy, weights, _, w_down) = tensors(40, 3, 2, D, F, activation, 0.3)
    plan = routing_plan_torch(ids, 3)
    tile_offsets, tile2expert = tile_map_torch(plan.offsets, plan.n_rows, block_m)
    plan = plan._replace(tile_offsets=tile_offsets, tile2expert=tile2expert, block_m=block_m)
    z = 5 * torch.randn(80, F * (2 if activation in GATED else 1))
    exact = [tensor.double() for tensor in (dy, w_down, z, weights)]
    wanted = activation_gemm_backward_torch(*exact, plan, activation)
    on_device = Plan(*(tensor.to(device) for tensor in plan[:-1]), block_m)
    given = [tensor.to(device) for tensor in (dy, w_down, z, weights)]
    found = launch_activation_gemm_backward(*given, on_device, activation)
    kept = int(plan.offsets[-1])
    for name, one, other in zip(("dz", "wa"), found[:2], wanted[:2], strict=True):
        assert_close(name, one[:kept], other[:kept], 4e-6)
    assert_close("d_weights", found[2], wanted[2], 4e-6)


def test_backward_tiles_are_never_wider_than_the_matrix() -> None:
    for family, block_m, kind in itertools.product(TILES, (16, 32, 64, 128), ("silu", "gelu")):
        c = backward_config(block_m, 17, 40, HALF, family, kind)
        assert (c.block_n, c.block_k) == (min(64, c.block_n), 32)
        assert c.block_n // c.parts >= 16
    assert {target for build in builds() for target in build.targets} == set(TILES) - {"interpreter"}


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
