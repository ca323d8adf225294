"""The gate's gradient: against float64 autograd, itself against finite differences."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from kernel_gate_loops import FACTORS, label, pairwise, problem, reference64
from kernel_loops import assert_close, leaf

from moebench_kernels import gate_backward, topk_gate, topk_gate_torch

CASES = [case for case in pairwise(FACTORS, seed=1) if case["T"] <= 33]
# The gradient's own rounding to the logits' dtype; the interpreter truncates to bfloat16.
TOLERANCES = {torch.float32: 4e-6, torch.float16: 6e-4, torch.bfloat16: 8e-3}


def check(case: dict[str, Any], device: torch.device) -> None:
    """d logits on the rows where float64 chooses the same experts, which must be nearly all."""
    values, K, options = problem(case, device)
    logits, exact = leaf(values, case["dtype"], device), leaf(values, torch.float64)
    ids, weights = topk_gate(logits, K, **options)
    wanted_ids, wanted = reference64(exact, K, options)
    upstream = torch.randn(weights.shape, device=device)
    weights.backward(upstream)
    wanted.backward(upstream.double().cpu())
    same = (ids.cpu() == wanted_ids).all(dim=1)
    assert (~same).sum() <= 0.05 * len(same) + 1
    assert logits.grad.dtype == case["dtype"]
    found = logits.grad.double().cpu()[same]
    # One expert's softmax has no gradient at all: errors are seen on the scale of what came from above.
    scale = upstream.double().cpu()[same].norm() / max(1, found.numel()) ** 0.5
    tolerance = TOLERANCES[case["dtype"]]
    error = (found - exact.grad[same]).abs().max().item() if found.numel() else 0.0
    assert error <= tolerance * (scale + exact.grad[same].abs().max().item() if found.numel() else 1.0), error


@pytest.mark.parametrize("case", CASES, ids=label)
def test_gradient(case: dict[str, Any], device: torch.device) -> None:
    check(case, device)


@pytest.mark.full
@pytest.mark.parametrize("T", [1, 3, 33])
@pytest.mark.parametrize("E", FACTORS["E"])
def test_gradient_on_the_whole_product(T: int, E: int, device: torch.device) -> None:
    rest = {name: values for name, values in FACTORS.items() if name not in ("T", "E")}
    for values in itertools.product(*rest.values()):
        check({"T": T, "E": E} | dict(zip(rest, values, strict=True)), device)


RULES = list(itertools.product(("softmax", "sigmoid", "sqrt_softplus"), ("score_first", "topk_first"), (False, True)))


@pytest.mark.parametrize(("scoring", "order", "renormalise"), RULES)
@pytest.mark.parametrize("biased", [False, True])
def test_the_reference_by_finite_differences(scoring: str, order: str, renormalise: bool, biased: bool) -> None:
    logits = (torch.randperm(10).double().reshape(2, 5) - 5).requires_grad_()
    bias = torch.tensor([2.5, 0, 0, 0, -2.5]).double() if biased else None
    options = {"scoring": scoring, "order": order, "renormalise": renormalise, "bias": bias, "scale": 2.5}
    assert torch.autograd.gradcheck(lambda z: topk_gate_torch(z, 3, **options)[1], logits)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("renormalise", [False, True])
def test_gradient_far_out(scoring: str, renormalise: bool, device: torch.device) -> None:
    """Where scores underflow, saturate or grow: no NaN, and the right numbers."""
    rows = [[-200.0, -100, -60, -41], [-39, -30, -17, -15], [15, 17, 30, 90], [-90, 0, 90, 200], [1e4, -1e4, 3e38, 0]]
    logits = leaf(torch.tensor(rows), torch.float32, device)
    exact = leaf(torch.tensor(rows), torch.float64)
    options = {"scoring": scoring, "renormalise": renormalise}
    upstream = torch.linspace(-1, 1, 15).reshape(5, 3)
    found, wanted = topk_gate(logits, 3, **options)[1], topk_gate_torch(exact, 3, **options)[1]
    for t in range(5):
        assert_close("weights", found[t], wanted[t], 3e-6)
    found.backward(upstream.to(device))
    wanted.backward(upstream.double())
    assert torch.isfinite(exact.grad).all()
    assert (logits.grad.cpu() - exact.grad).abs().max() <= 1e-7  # of an upstream of 1


@pytest.mark.parametrize(("T", "E", "K"), [(5, 8, 2), (9, 200, 8), (2, 2100, 3)])
def test_tiles_for_a_gpu(T: int, E: int, K: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_backward, "interpreting", lambda: False)
    check(
        {"T": T, "E": E, "K": K, "scoring": "softmax", "dtype": torch.float32, "groups": "none"}
        | {"order": "score_first", "bias": True, "renormalise": True},
        device,
    )


def test_gradient_that_is_expanded(device: torch.device) -> None:
    """sum() hands down one number with strides of 0."""
    logits = torch.randn(6, 12, device=device, requires_grad=True)
    (summed,) = torch.autograd.grad(topk_gate(logits, 3, scoring="sigmoid")[1].sum(), logits)
    (plain,) = torch.autograd.grad(topk_gate(logits, 3, scoring="sigmoid")[1], logits, torch.ones(6, 3, device=device))
    assert torch.equal(summed, plain)
    assert summed.count_nonzero() == 18


def test_second_derivatives_are_refused(device: torch.device) -> None:
    logits = torch.randn(3, 8, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(topk_gate(logits, 2)[1].sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="topk_gate_backward"):
        grad.sum().backward()


def test_operator(device: torch.device) -> None:
    logits = torch.randn(5, 12, device=device)
    ids, weights = topk_gate(logits, 3)
    for rule in (("softmax", True, False), ("sqrt_softplus", False, True)):
        torch.library.opcheck(torch.ops.moebench.topk_gate_backward.default, (logits, ids, weights, *rule, 2.0))
