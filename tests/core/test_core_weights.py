"""Weights: large ones are drawn in parts, on as many threads as there are, and are the same on any number of them."""

from __future__ import annotations

import torch
from core_arms import layer_of

from moebench.weights import PART, make_weights

LARGE = layer_of(8, 2, hidden=1024, ffn=1024, activation="relu")  # w_gate_up and w_down have one shape


def test_large_weights_are_the_same_on_any_number_of_threads() -> None:
    one = make_weights(LARGE, "fp32", "cpu", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 2)
    try:
        other = make_weights(LARGE, "fp32", "cpu", 0)
    finally:
        torch.set_num_threads(before)
    assert one.w_down.numel() >= 2 * PART
    assert all(torch.equal(value, other.tensors()[name]) for name, value in one.tensors().items())


def test_no_part_repeats_another_nor_another_seed() -> None:
    weights, other = (make_weights(LARGE, "fp32", "cpu", seed) for seed in (0, 1))
    first, second = weights.w_down.flatten().split(PART)[:2]
    assert not torch.equal(first, second)
    assert weights.w_gate_up.shape == weights.w_down.shape
    assert not torch.equal(weights.w_gate_up, weights.w_down)
    assert not torch.equal(weights.w_down, other.w_down)
    assert abs(float(weights.w_down.std()) * 1024**0.5 - 1) < 0.01
    assert abs(float(weights.w_down.mean())) < 1e-4
