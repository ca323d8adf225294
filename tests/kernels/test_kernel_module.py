"""MoEExperts and MoELayer: equal to the functions they wrap, and good modules."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_loops import TOLERANCES, assert_close, random_ids
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from moebench_kernels import GateOptions, MoEExperts, MoELayer, moe_layer_torch, topk_gate_torch

E, K, D, F = 5, 2, 16, 24
SIGMOID = GateOptions(scoring="sigmoid", renormalise=True, scale=2.5)
DEEPSEEK = replace(SIGMOID, n_groups=2, topk_groups=1, group_score="top2_sum")
GPT_OSS = {"activation": "clamped_swiglu", "bias": True, "router_bias": True, "gate": GateOptions(order="topk_first")}


def expected(layer: MoELayer, x: Tensor) -> Tensor:
    """The whole layer in float64 from its parameters; the choice is made on the float32 logits, as the layer's is."""
    flat, experts = x.reshape(-1, x.shape[-1]), layer.experts
    logits = functional.linear(flat, layer.router.weight, layer.router.bias)
    ids, weights = topk_gate_torch(logits, layer.top_k, bias=layer.selection_bias, **vars(layer.gate))
    biases = {"b_gate_up": experts.gate_up_bias, "b_down": experts.down_bias}
    y = moe_layer_torch(
        flat.double(), ids, weights.double(), experts.gate_up.double(), experts.down.double(),
        activation=experts.activation, **{k: v if v is None else v.double() for k, v in biases.items()},
    )  # fmt: skip
    if layer.shared is not None:
        doubles = {name: parameter.double() for name, parameter in layer.shared.named_parameters()}
        y = y + torch.func.functional_call(layer.shared, doubles, (flat.double(),))
    return y.view(x.shape)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (7, D)),
        (GPT_OSS, (2, 3, D)),
        ({"activation": "relu", "gate": GateOptions(renormalise=True), "shared_ffn_size": 8}, (1, 4, 2, D)),
        ({"n_experts": 6, "gate": DEEPSEEK, "selection_bias": True, "shared_ffn_size": 8, "shared_gate": True}, (9, D)),
        ({}, (D,)),
        ({"shared_ffn_size": 8}, (0, 3, D)),
    ],
)  # fmt: skip
def test_layer_forward_and_backward(options: dict[str, Any], shape: tuple[int, ...], device: torch.device) -> None:
    layer = MoELayer(**({"n_experts": E, "top_k": K, "hidden_size": D, "ffn_size": F} | options), device=device)
    if layer.selection_bias is not None:
        layer.selection_bias.normal_()
    x = torch.randn(shape, device=device).requires_grad_()
    y, wanted = layer(x), expected(layer, x)
    assert_close("y", y, wanted, TOLERANCES[torch.float32])
    wants = [x, *layer.parameters()]
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, wants, upstream)
    exact = torch.autograd.grad(wanted, wants, upstream.double())
    for name, one, other in zip(["x", *(n for n, _ in layer.named_parameters())], found, exact, strict=True):
        assert_close(name, one, other, 4e-6)
    with torch.no_grad():
        assert_close("without gradient", layer(x), wanted, TOLERANCES[torch.float32])


def test_names_are_stable() -> None:
    """They are what a checkpoint holds: changing one breaks it."""
    layer = MoELayer(
        E, K, D, F, bias=True, router_bias=True, selection_bias=True, shared_ffn_size=8, shared_gate=True, device="meta"
    )
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == {
        "router.weight": (E, D), "router.bias": (E,), "selection_bias": (E,),
        "experts.gate_up": (E, 2 * F, D), "experts.down": (E, D, F),
        "experts.gate_up_bias": (E, 2 * F), "experts.down_bias": (E, D),
        "shared.gate_up.weight": (16, D), "shared.down.weight": (D, 8), "shared.gate.weight": (1, D),
    }  # fmt: skip
    assert set(MoELayer(E, K, D, F, device="meta").state_dict()) == {"router.weight", "experts.gate_up", "experts.down"}
    assert MoEExperts(E, D, F, activation="gelu", device="meta").gate_up.shape == (E, F, D)


def test_state_dict_round_trip(device: torch.device) -> None:
    one, other = (MoELayer(E, K, D, F, selection_bias=True, device=device) for _ in range(2))
    one.selection_bias.normal_()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(3, D, device=device)
    assert torch.equal(one(x), other(x))
    assert torch.equal(one(x), copy.deepcopy(one)(x))


def test_safetensors_round_trip(tmp_path: Any, device: torch.device) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    layer = MoELayer(E, K, D, F, shared_ffn_size=8)
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = MoELayer(E, K, D, F, shared_ffn_size=8)
    other.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters(), strict=True))


def test_changing_dtype_keeps_the_selection_bias(device: torch.device) -> None:
    layer = MoELayer(E, K, D, F, selection_bias=True, device=device)
    layer.selection_bias.fill_(1e-4 + 1)
    kept = layer.selection_bias.clone()
    layer.to(torch.float16)
    assert {p.dtype for p in layer.parameters()} == {torch.float16}
    assert torch.equal(layer.selection_bias, kept)
    assert layer(torch.randn(3, D, device=device).half()).dtype == torch.float16
    assert layer.to("meta").selection_bias.device.type == "meta"


def test_reset_parameters_repeats_from_the_seed() -> None:
    layer = MoELayer(E, K, D, F, bias=True, selection_bias=True, shared_ffn_size=8, shared_gate=True)
    layer.selection_bias.fill_(1.0)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        layer.reset_parameters()
        runs.append([p.detach().clone() for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert (layer.selection_bias == 0).all()
    assert layer.experts.down.abs().max() <= F**-0.5
    assert 0.9 * D**-0.5 < layer.experts.gate_up.abs().max() <= D**-0.5


def test_repr_tells_the_sizes() -> None:
    text = repr(MoELayer(E, K, D, F, bias=True, gate=GateOptions(scoring="sigmoid"), device="meta"))
    assert "MoEExperts(5, 16, 24, activation='swiglu', bias=True)" in text
    assert "(top_k)" not in text
    assert "top_k=2, gate=GateOptions(scoring='sigmoid'" in text


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_is_the_layer_in_that_dtype(dtype: torch.dtype, bias: bool, device: torch.device) -> None:
    """x, matrices and biases are cast; gradients come back in the parameters' float32."""
    layer = MoELayer(E, K, D, F, shared_ffn_size=8, bias=bias, device=device)
    x = torch.randn(7, D, device=device)
    with torch.autocast(device.type, dtype=dtype):
        y = layer(x)
    cast = copy.deepcopy(layer).to(dtype)
    wanted = cast(x.to(dtype))
    assert y.dtype == dtype
    assert torch.equal(y, wanted)
    y.float().sum().backward()
    wanted.float().sum().backward()
    for one, other in zip(layer.parameters(), cast.parameters(), strict=True):
        assert one.grad.dtype == torch.float32
        assert torch.equal(one.grad, other.grad.float())


def test_checkpointing_is_bit_identical(device: torch.device) -> None:
    layer, x = MoELayer(E, K, D, F, device=device), torch.randn(33, D, device=device)
    runs = []
    for again in (False, True):
        leaf = x.clone().requires_grad_()
        y = checkpoint(layer, leaf, use_reentrant=False) if again else layer(leaf)
        runs.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_compiles_whole(device: torch.device) -> None:
    """One graph, forward and backward, the same bits."""
    layer = MoELayer(E, K, D, F, bias=True, selection_bias=True, gate=SIGMOID, shared_ffn_size=8, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 17, D, device=device)
    runs = []
    for function in (layer, compiled):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        runs.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    with torch.no_grad():
        assert torch.equal(layer(x), compiled(x))


def test_trains(device: torch.device) -> None:
    """A few steps of SGD lower the loss: gradients reach the router, the experts and the shared expert."""
    layer = nn.Sequential(MoELayer(E, K, D, F, shared_ffn_size=8, device=device), nn.Linear(D, 1, device=device))
    x = torch.randn(8, D, device=device)
    target = x.sum(1, keepdim=True)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.03)
    losses = []
    for _ in range(6):
        optimiser.zero_grad()
        loss = functional.mse_loss(layer(x), target)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MoEExperts(0, D, F), "n_experts is 0; it must be at least 1"),
        (lambda: MoEExperts(E, D, F, activation="tanh"), "activation is 'tanh'; allowed: swiglu"),
        (lambda: GateOptions(scoring="sig"), "scoring is 'sig'; allowed: softmax"),
        (lambda: MoELayer(E, 6, D, F), r"top_k is 6; it must be 1 to n_experts \(5\)"),
    ],
)
def test_refuses_to_be_built(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_experts_refuse(device: torch.device) -> None:
    experts, ids = MoEExperts(E, D, F, device=device), random_ids(4, E, K).to(device)
    with pytest.raises(ValueError, match=r"x is \[2, 2, 16\], ids \[4, 2\].*; needed: \[\.\.\., D\]"):
        experts(torch.zeros(2, 2, D, device=device), ids, torch.ones(4, K, device=device))
    for few in (ids[:, :1], ids[:, :0]):
        with pytest.raises(ValueError, match=r"ids \[4, \d\] and weights \[4, 2\]; needed"):
            experts(torch.zeros(4, D, device=device), few, torch.ones(4, K, device=device))
    with pytest.raises(ValueError, match=r"needed: \[E, 2F, 15\]"):
        experts(torch.zeros(4, 15, device=device), ids, torch.ones(4, K, device=device))
