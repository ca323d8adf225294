"""moe_layer's operators: what they keep and compute, opcheck, compilation; and the fused step of backward alone."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from kernel_layers import NAMES, layer, leaves, tensors
from kernel_loops import assert_close

from moebench_kernels import Plan, moe_layer, moe_layer_torch, routing_plan, routing_plan_torch
from moebench_kernels.activation import GATED
from moebench_kernels.activation_gemm_backward import (
    TILES,
    activation_gemm_backward_torch,
    backward_config,
    builds,
    launch_activation_gemm_backward,
)
from moebench_kernels.plan import tile_map_torch


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
        c = backward_config(block_m, 17, 40, torch.float16, family, kind)
        assert (c.block_n, c.block_k) == (min(64, c.block_n), 32)
        assert c.block_n // c.parts >= 16
    assert {target for build in builds() for target in build.targets} == set(TILES) - {"interpreter"}
