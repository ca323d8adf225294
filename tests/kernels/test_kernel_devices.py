"""Tensors of another device, meta among them: refused before any operator, whose fake would give raw memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moebench_kernels import (
    MoELayer,
    decode_layer,
    down_projection,
    grouped_gemm,
    moe_layer,
    quantise_weights,
    quantised_moe_layer,
    ragged_gemm,
    routing_plan,
    up_projection,
)

T, D, F, E, K = 5, 16, 16, 3, 2
ONE_DEVICE = "one device is needed for all, found: .* on meta"


@pytest.fixture
def given(device: torch.device) -> dict[str, Tensor]:
    """A layer's tensors."""
    made = {
        "x": torch.randn(T, D), "ids": torch.randint(0, E, (T, K)), "weights": torch.rand(T, K),
        "w_gate_up": torch.randn(E, 2 * F, D), "w_down": torch.randn(E, D, F),
        "b_gate_up": torch.randn(E, 2 * F), "b_down": torch.randn(E, D),
    }  # fmt: skip
    return {name: tensor.to(device) for name, tensor in made.items()}


@pytest.mark.parametrize("layer", [moe_layer, decode_layer])
def test_the_layers(layer: Any, given: dict[str, Tensor]) -> None:
    for name, tensor in given.items():
        with pytest.raises(ValueError, match=ONE_DEVICE):
            layer(**given | {name: tensor.to("meta")})


def test_the_products(given: dict[str, Tensor]) -> None:
    plan = routing_plan(given["ids"], E)
    rows, up, down = given["x"].repeat(K, 1), given["w_gate_up"], given["w_down"]
    for call in (
        lambda: grouped_gemm(rows, up.to("meta"), plan),
        lambda: grouped_gemm(rows, up, plan, bias=given["b_gate_up"].to("meta")),
        lambda: ragged_gemm(rows, rows.to("meta"), plan),
        lambda: up_projection(given["x"].to("meta"), up, plan),
        lambda: down_projection(rows, down.to("meta"), plan),
    ):
        with pytest.raises(ValueError, match=ONE_DEVICE):
            call()


def test_quantised_weights(given: dict[str, Tensor]) -> None:
    up, down = quantise_weights(given["w_gate_up"], "int8"), quantise_weights(given["w_down"], "int8")
    x, ids, weights = given["x"], given["ids"], given["weights"]
    with pytest.raises(ValueError, match=r"w_down\.scales on meta"):
        quantised_moe_layer(x, ids, weights, up, down._replace(scales=down.scales.to("meta")))
    with pytest.raises(ValueError, match=r"the plan is of ids \[3, 2\] and 3 experts; ids has shape \[5, 2\]"):
        quantised_moe_layer(x, ids, weights, up, down, plan=routing_plan(ids[:3], E))
    with pytest.raises(TypeError, match="ids is a list"):
        moe_layer(x, ids.tolist(), weights, up, down, plan=routing_plan(ids, E))
    with pytest.raises(ValueError, match="w is on the meta device"):
        quantise_weights(given["w_down"].to("meta"), "int8")


def test_a_module_on_meta(given: dict[str, Tensor]) -> None:
    layer = MoELayer(E, K, D, F, device="meta")
    assert layer(given["x"].to("meta")).shape == (T, D)
    with pytest.raises(ValueError, match=ONE_DEVICE):
        layer.experts(given["x"], given["ids"], given["weights"])


def test_sizes_of_1_may_have_any_stride(given: dict[str, Tensor]) -> None:
    """Such tensors are contiguous to torch; a descriptor must not take their strides."""
    ids, weights = torch.zeros_like(given["ids"][:, :1]), given["weights"][:, :1]
    up, down = given["w_gate_up"][:1], given["w_down"][:1]
    gradients = []
    for stride in (up.stride(0), 3):
        leaves = [w.clone().requires_grad_() for w in (up, down)]
        odd = [w.as_strided(w.shape, (stride, *w.stride()[1:])) for w in leaves]
        moe_layer(given["x"], ids, weights, *odd).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    one = torch.ones(9, device=ids.device).as_strided((1, 1), (4, 4))
    assert ragged_gemm(one, one, routing_plan(ids[:1], 1)).item() == 1
