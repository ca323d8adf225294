"""moe_layer given quantised weights: the quantised layer's answer, its options kept, what it cannot take refused."""

from __future__ import annotations

import pytest
import torch

from moebench_kernels import moe_layer, quantise_weights, quantised_moe_layer, routing_plan


def inputs(device: torch.device) -> tuple:
    T, E, D, F = 9, 3, 64, 32
    ids = torch.stack([torch.randperm(E)[:2] for _ in range(T)])
    tensors = (torch.randn(T, D), ids, torch.rand(T, 2), torch.randn(E, 2 * F, D) * 0.1, torch.randn(E, D, F) * 0.1)
    return tuple(tensor.to(device) for tensor in tensors)


def test_quantised_weights_take_the_quantised_layer(device: torch.device) -> None:
    x, ids, weights, *matrices = inputs(device)
    up, down = (quantise_weights(matrix, "int8") for matrix in matrices)
    assert torch.equal(
        moe_layer(x, ids, weights, up, down, activation="geglu"),
        quantised_moe_layer(x, ids, weights, up, down, activation="geglu"),
    )


def test_capacity_is_kept(device: torch.device) -> None:
    x, ids, weights, *matrices = inputs(device)
    up, down = (quantise_weights(matrix, "int8") for matrix in matrices)
    capped = moe_layer(x, ids, weights, up, down, capacity=1)
    plan = routing_plan(ids, 3, capacity=1)
    assert torch.equal(capped, moe_layer(x, ids, weights, up, down, plan=plan))
    assert not torch.equal(capped, moe_layer(x, ids, weights, up, down))
    assert (capped[(plan.token2row < 0).all(1)] == 0).all()


def test_refusals(device: torch.device) -> None:
    x, ids, weights, *matrices = inputs(device)
    up, down = (quantise_weights(matrix, "int8") for matrix in matrices)
    with pytest.raises(TypeError, match="w_down is a Tensor; QuantisedWeights are needed"):
        moe_layer(x, ids, weights, up, matrices[1])
    with pytest.raises(TypeError, match="w_gate_up is a Tensor; QuantisedWeights are needed"):
        moe_layer(x, ids, weights, matrices[0], down)
    with pytest.raises(ValueError, match="b_down given beside quantised weights"):
        moe_layer(x, ids, weights, up, down, b_down=torch.zeros(3, 64, device=device))
    with pytest.raises(ValueError, match="capacity given beside a plan"):
        moe_layer(x, ids, weights, up, down, capacity=1, plan=routing_plan(ids, 3))
    with pytest.raises(ValueError, match="gradient"):
        moe_layer(x.requires_grad_(), ids, weights, up, down)
