"""topk_gate: against its reference, against a loop, on hostile rows, and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_loops import assert_close, leaf
from torch import Tensor

from moebench_kernels import topk_gate, topk_gate_torch

SHAPES = [(0, 8, 2), (1, 1, 1), (3, 2, 2), (33, 5, 2), (65, 8, 4), (33, 60, 8), (65, 60, 1), (3, 257, 16), (2, 300, 64)]
RULES = [("score_first", False), ("score_first", True), ("topk_first", False)]


def gate_loop(z: list[float], top_k: int, order: str, renormalise: bool, scale: float) -> tuple[list[int], list[float]]:
    """One token, by sorting (value, id) pairs."""
    chosen = sorted(range(len(z)), key=lambda e: (-z[e], e))[:top_k]
    summed = chosen if renormalise or order == "topk_first" else range(len(z))
    total = math.fsum(math.exp(z[e] - max(z)) for e in summed)
    return chosen, [scale * math.exp(z[e] - max(z)) / total for e in chosen]


@pytest.mark.parametrize(("order", "renormalise"), RULES)
@pytest.mark.parametrize(("T", "E", "K"), SHAPES)
def test_gate_equals_reference_and_loop(
    T: int, E: int, K: int, order: str, renormalise: bool, device: torch.device
) -> None:
    logits = torch.randn(T, E) * 3
    ids, weights = topk_gate(logits.to(device), K, order=order, renormalise=renormalise, scale=2.5)
    assert ids.dtype == torch.int32
    assert weights.dtype == torch.float32
    want_ids, want = topk_gate_torch(logits, K, order=order, renormalise=renormalise, scale=2.5)
    assert torch.equal(ids.cpu(), want_ids)
    assert_close("weights", weights, want, 1e-6)
    for t, row in enumerate(logits.tolist()):
        loop_ids, loop_weights = gate_loop(row, K, order, renormalise, 2.5)
        assert want_ids[t].tolist() == loop_ids
        assert_close("reference", want[t], torch.tensor(loop_weights), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gate_takes_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    logits = (torch.randn(17, 60) * 3).to(dtype)
    ids, weights = topk_gate(logits.to(device), 8)
    want_ids, want = topk_gate_torch(logits.float(), 8)
    assert torch.equal(ids.cpu(), want_ids)
    assert_close("weights", weights, want, 1e-6)


def test_ties_go_to_the_lower_id(device: torch.device) -> None:
    ids, weights = topk_gate(torch.zeros(3, 60, device=device), 8)
    assert ids.tolist() == [list(range(8))] * 3
    assert_close("weights", weights, torch.full((3, 8), 1 / 60), 1e-6)


def hostile() -> Tensor:
    inf, nan = math.inf, math.nan
    rows = [
        [nan] * 5, [inf] * 5, [-inf] * 5, [nan, 1, inf, -inf, 2], [inf, inf, 0, -inf, nan], [3e38, -3e38, 0, nan, 1],
    ]  # fmt: skip
    return torch.tensor(rows)


@pytest.mark.parametrize(("order", "renormalise"), RULES)
@pytest.mark.parametrize("K", [1, 3, 5])
def test_nan_and_inf_rows_still_route(K: int, order: str, renormalise: bool, device: torch.device) -> None:
    logits = leaf(hostile(), torch.float32, device)
    ids, weights = topk_gate(logits, K, order=order, renormalise=renormalise)
    weights.square().sum().backward()
    assert all(len(set(row)) == K and set(row) <= set(range(5)) for row in ids.tolist())
    assert torch.isfinite(weights).all()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[~torch.isfinite(logits)] == 0).all()
    want_ids, want = topk_gate_torch(hostile(), K, order=order, renormalise=renormalise)
    assert torch.equal(ids.cpu(), want_ids)
    assert_close("weights", weights, want, 1e-6)


def test_finite_logits_outrank_nan_and_minus_inf(device: torch.device) -> None:
    ids, _ = topk_gate(hostile()[3:4].to(device), 3)
    assert ids.tolist() == [[2, 4, 1]]


@pytest.mark.parametrize(("order", "renormalise"), RULES)
@pytest.mark.parametrize(("T", "E", "K"), SHAPES)
def test_gate_gradient(T: int, E: int, K: int, order: str, renormalise: bool, device: torch.device) -> None:
    logits, upstream = torch.randn(T, E) * 2, torch.randn(T, K)
    mine, exact = leaf(logits, torch.float32, device), leaf(logits, torch.float64)
    weights = topk_gate(mine, K, order=order, renormalise=renormalise, scale=0.7)[1]
    weights.backward(upstream.to(device))
    topk_gate_torch(exact, K, order=order, renormalise=renormalise, scale=0.7)[1].backward(upstream.double())
    # With K = E = 1 the true gradient is zero: compare on the scale of the upstream gradient.
    assert_close("d_logits", mine.grad.cpu() + upstream.norm(), exact.grad + upstream.norm(), 1e-6)
    assert mine.grad.cpu().sub(exact.grad).abs().max() < 1e-6 if T else mine.grad.shape == (0, E)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 9}, r"top_k is 9; it must be between 1 and min\(E, 64\) = 8"),
        ({"top_k": 0}, "top_k is 0"),
        ({"scoring": "sigmoid"}, "scoring 'sigmoid' is not built yet; built: softmax"),
        ({"scoring": "softmx"}, "scoring is 'softmx'; allowed: softmax, sigmoid"),
        ({"order": "first"}, "order is 'first'; allowed: score_first, topk_first"),
        ({"logits": torch.zeros(4, 8, 2)}, r"logits has shape \[4, 8, 2\]; needed: \[T, E\]"),
        ({"logits": torch.zeros(4, 5000)}, "at most 4096"),
        ({"logits": torch.zeros(8, 4).T}, "logits has strides"),
    ],
)
def test_gate_refuses(change: dict, message: str, device: torch.device) -> None:
    arguments = {"logits": torch.zeros(4, 8, device=device), "top_k": 2} | change
    with pytest.raises(ValueError, match=message):
        topk_gate(**arguments)


def test_gate_refuses_dtype(device: torch.device) -> None:
    with pytest.raises(TypeError, match="logits is float64; allowed: float32, float16, bfloat16"):
        topk_gate(torch.zeros(4, 8, dtype=torch.float64, device=device), 2)
