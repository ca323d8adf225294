"""The gate on what breaks gates: NaN and Inf, ties, masked groups, random options, wrong arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_gate_loops import label, pairwise
from kernel_loops import assert_close, leaf
from torch import Tensor

from moebench_kernels import topk_gate, topk_gate_torch

INF, NAN = math.inf, math.nan
SCORINGS = ("softmax", "sigmoid", "sqrt_softplus")
ORDERS = ("score_first", "topk_first")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BROKEN = pairwise({
    "scoring": SCORINGS, "order": ORDERS, "renormalise": (False, True), "bias": (False, True),
    "dtype": DTYPES, "K": (1, 4),
    "groups": ({}, {"n_groups": 3, "topk_groups": 2}, {"n_groups": 3, "topk_groups": 2, "group_score": "top2_sum"}),
})  # fmt: skip
HOSTILE = torch.tensor([
    [NAN] * 6, [INF] * 6, [-INF] * 6, [NAN, 1, INF, -INF, 2, 0], [INF, INF, 0, -INF, NAN, INF],
    [3e38, -3e38, 0, NAN, 1, 2], [-3.3895e38, -INF, NAN, -0.0, 0.0, -65504], [0, NAN, NAN, NAN, NAN, NAN],
])  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, of infinities that are meant
@pytest.mark.parametrize("case", BROKEN, ids=label)
def test_broken_rows_still_route(case: dict[str, Any], device: torch.device) -> None:
    K, logits = case["K"], leaf(HOSTILE, case["dtype"], device)
    options = {name: case[name] for name in ("scoring", "order", "renormalise")} | case["groups"]
    options["bias"] = torch.tensor([NAN, INF, -INF, 0, 1, -1], device=device) if case["bias"] else None
    ids, weights = topk_gate(logits, K, **options)
    assert all(len(set(row)) == K and set(row) <= set(range(6)) for row in ids.tolist())
    assert torch.isfinite(weights).all()
    wanted_ids, wanted = topk_gate_torch(logits.detach(), K, **options)
    assert torch.equal(ids, wanted_ids)
    assert torch.allclose(weights, wanted, rtol=3e-6, atol=1e-7)
    (grad,) = torch.autograd.grad(weights.sum(), logits)
    assert torch.isfinite(grad).all()
    assert (grad[~torch.isfinite(logits)] == 0).all()


def test_numbers_outrank_nan_and_minus_inf(device: torch.device) -> None:
    for dtype in DTYPES:
        logits = torch.tensor([[NAN, 1, INF, -INF, 2, torch.finfo(dtype).min]], dtype=dtype, device=device)
        ids = topk_gate(logits, 6)[0]
        # float32's lowest number is what -inf and NaN count as, so it ties with them there.
        assert ids.tolist() == [[2, 4, 1, 0, 3, 5] if dtype == torch.float32 else [2, 4, 1, 5, 0, 3]]


@pytest.mark.parametrize(("scoring", "order", "dtype"), zip(SCORINGS * 2, ORDERS * 3, DTYPES * 2, strict=True))
def test_ties_go_to_the_lower_id(scoring: str, order: str, dtype: torch.dtype, device: torch.device) -> None:
    for logits, ids in (
        (torch.zeros(3, 60), list(range(8))),
        (torch.tensor([[-0.0, 0.0] * 10]), list(range(8))),  # equal, whatever their bits
        (torch.tensor([[1.0, 2, 2, 1, 2, 1, 1, 1, 1, 1]]), [1, 2, 4, 0, 3, 5, 6, 7]),
    ):
        for bias in (None, torch.zeros(logits.shape[1], device=device)):
            found = topk_gate(logits.to(device, dtype), 8, bias=bias, scoring=scoring, order=order)[0]
            assert found.tolist() == [ids] * len(logits)


def test_without_a_bias_saturated_scores_are_told_apart(device: torch.device) -> None:
    """sigmoid(20) and sigmoid(40) are both 1.0 in float32: the logits decide, and with a bias the lower id."""
    logits = torch.tensor([[20.0, 40, 30, -200, -150, -170]], device=device)
    for order in ("score_first", "topk_first"):
        assert topk_gate(logits, 6, scoring="sigmoid", order=order)[0].tolist() == [[1, 2, 0, 4, 5, 3]]
    zero = torch.zeros(6, device=device)
    assert topk_gate(logits, 6, scoring="sigmoid", bias=zero)[0].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert topk_gate(logits, 6, scoring="sigmoid", bias=zero, order="topk_first")[0].tolist() == [[1, 2, 0, 4, 5, 3]]


def test_all_scores_zero_gives_zero_weights(device: torch.device) -> None:
    logits = torch.full((2, 8), -1000.0, device=device, requires_grad=True)
    for scoring in ("sigmoid", "sqrt_softplus"):
        weights = topk_gate(logits, 3, scoring=scoring, renormalise=True)[1]
        assert weights.tolist() == [[0.0] * 3] * 2
        assert torch.isfinite(torch.autograd.grad(weights.sum(), logits)[0]).all()


def test_equal_groups_go_to_the_lower_group(device: torch.device) -> None:
    for score in ("max", "top2_sum"):
        ids = topk_gate(torch.zeros(2, 12, device=device), 5, n_groups=4, topk_groups=2, group_score=score)[0]
        assert ids.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_a_group_left_out_is_never_chosen(device: torch.device) -> None:
    """Not even when all that is left is -inf, or is banned by the bias."""
    logits = torch.tensor([[5.0, -INF, -INF, 4, 3, 2, 1, 1, 1]], device=device)
    assert topk_gate(logits, 3, n_groups=3)[0].tolist() == [[0, 1, 2]]
    bias = torch.tensor([0.0, -INF, -INF, 0, 0, 0, 0, 0, 0], device=device)
    assert topk_gate(logits.nan_to_num(neginf=9.0), 3, n_groups=3, bias=bias, order="topk_first")[0].tolist() == [
        [0, 1, 2]
    ]


def test_top2_sum_differs_from_max(device: torch.device) -> None:
    logits = torch.tensor([[9.0, 0, 0, 0, 5, 5, 0, 0]], device=device)
    assert topk_gate(logits, 2, order="topk_first", n_groups=2)[0].tolist() == [[0, 1]]
    assert topk_gate(logits, 2, order="topk_first", n_groups=2, group_score="top2_sum")[0].tolist() == [[4, 5]]
    # By score the sums are of sigmoids, 1 + 0.5 against 0.993 twice, even where the choice itself is by logit.
    assert topk_gate(logits - 0.0, 2, scoring="sigmoid", n_groups=2, group_score="top2_sum")[0].tolist() == [[4, 5]]
    low = torch.tensor([[9.0, -2, 0, 0, 0.1, 0.1, 0, 0]], device=device)
    assert topk_gate(low, 2, scoring="sigmoid", n_groups=2, group_score="top2_sum")[0].tolist() == [[0, 2]]


@st.composite
def gates(draw: st.DrawFn) -> tuple[Tensor, int, dict]:
    """Small rows full of ties and broken numbers, under any options."""
    n_groups = draw(st.integers(1, 4))
    size = draw(st.integers(1, 7))
    E, kept = n_groups * size, draw(st.integers(1, n_groups))
    # No two opposite numbers: their sigmoids add up to those of two zeros, but for rounding.
    number = st.sampled_from([-8.0, -2.5, -1.0, -0.0, 0.0, 0.5, 3.0, 7.0, INF, -INF, NAN])
    rows = draw(st.lists(st.lists(number, min_size=E, max_size=E), min_size=1, max_size=4))
    shift = draw(st.none() | st.lists(st.sampled_from([-4.0, 0.0, 0.25, 4.0, INF, -INF, NAN]), min_size=E, max_size=E))
    options = {
        "scoring": draw(st.sampled_from(SCORINGS)),
        "order": draw(st.sampled_from(["score_first", "topk_first"])),
        "bias": None if shift is None else torch.tensor(shift),
        "renormalise": draw(st.booleans()),
        "n_groups": n_groups,
        "topk_groups": kept,
        "group_score": draw(st.sampled_from(["max", "top2_sum"] if size > 1 else ["max"])),
        "scale": draw(st.sampled_from([1.0, 2.5])),
    }
    dtype = draw(st.sampled_from(DTYPES))
    return torch.tensor(rows).to(dtype), draw(st.integers(1, kept * size)), options


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(gates())
def test_any_gate(problem: tuple[Tensor, int, dict]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits, K, options = problem
    logits = leaf(logits, logits.dtype, device)
    options["bias"] = None if options["bias"] is None else options["bias"].to(device)
    ids, weights = topk_gate(logits, K, **options)
    size = logits.shape[1] // options["n_groups"]
    for row in ids.tolist():
        assert len(set(row)) == K
        assert set(row) <= set(range(logits.shape[1]))
        assert len({e // size for e in row}) <= options["topk_groups"]
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()
    wanted_ids, wanted = topk_gate_torch(logits.detach(), K, **options)
    assert torch.equal(ids, wanted_ids)
    assert torch.allclose(weights, wanted, rtol=3e-6, atol=1e-7)
    (grad,) = torch.autograd.grad(weights.sum(), logits)
    assert torch.isfinite(grad).all()


def test_options_that_are_refused(device: torch.device) -> None:
    zeros = torch.zeros(4, 8, device=device)
    for change, message in (
        ({"top_k": 9}, r"top_k is 9; it must be between 1 and min\(E, 64\) = 8"),
        ({"top_k": 0}, "top_k is 0"),
        ({"logits": torch.zeros(1, 100), "top_k": 65}, r"top_k is 65; .* = 64"),
        ({"scoring": "softmx"}, "scoring is 'softmx'; allowed: softmax, sigmoid, sqrt_softplus"),
        ({"order": "first"}, "order is 'first'; allowed: score_first, topk_first"),
        ({"group_score": "sum"}, "group_score is 'sum'; allowed: max, top2_sum"),
        ({"n_groups": 3}, "n_groups is 3; it must divide the 8 experts"),
        ({"n_groups": 0}, "n_groups is 0"),
        ({"topk_groups": 2}, "topk_groups is 2; it must be between 1 and n_groups = 1"),
        ({"n_groups": 4, "topk_groups": 0}, "topk_groups is 0"),
        ({"n_groups": 4, "top_k": 3}, r"top_k is 3; .*min\(topk_groups \* E / n_groups, 64\) = 2"),
        ({"n_groups": 8, "topk_groups": 8, "group_score": "top2_sum"}, "needs two experts a group"),
        ({"logits": torch.zeros(4, 8, 2)}, r"logits has shape \[4, 8, 2\]; needed: \[T, E\]"),
        ({"logits": torch.zeros(4, 5000)}, "at most 4096"),
        ({"scale": float("inf")}, "scale is inf; it must be finite in float32"),
        ({"scale": 1e39}, "scale is 1e\\+39; it must be finite"),
        ({"bias": torch.zeros(7, device=device)}, r"bias has shape \[7\]; needed: \[8\]"),
        ({"bias": torch.zeros(8, device="meta")}, "one device is needed for all, found: logits on .*, bias on meta"),
    ):
        for function in (topk_gate, topk_gate_torch):
            with pytest.raises(ValueError, match=message):
                function(**{"logits": zeros, "top_k": 2} | change)
    with pytest.raises(ValueError, match="logits has strides"):
        topk_gate(zeros.T, 2)
    with pytest.raises(ValueError, match="bias has strides"):
        topk_gate(zeros, 2, bias=torch.zeros(16, device=device)[::2])


def test_types_that_are_refused(device: torch.device) -> None:
    zeros = torch.zeros(4, 8, device=device)
    with pytest.raises(TypeError, match="logits is float64; allowed: float32, float16, bfloat16"):
        topk_gate(zeros.double(), 2)
    with pytest.raises(TypeError, match="bias is float16; allowed: float32"):
        topk_gate(zeros, 2, bias=zeros[0].half())
    for function in (topk_gate, topk_gate_torch):
        with pytest.raises(TypeError, match=r"logits is a list; a torch\.Tensor is needed"):
            function([[0.0] * 8], 2)
        with pytest.raises(TypeError, match=r"bias is a list"):
            function(zeros, 2, bias=[0.0] * 8)
        for change, message in (
            ({"n_groups": 2.0}, "n_groups is a float; an int is needed"),
            ({"n_groups": True}, "n_groups is a bool; an int is needed"),
            ({"renormalise": "no"}, "renormalise is a str; a bool is needed"),
            ({"scale": torch.tensor(2.0, requires_grad=True)}, "scale is a Tensor; a number is needed"),
            ({"scale": None}, "scale is a NoneType; a number is needed"),
        ):
            with pytest.raises(TypeError, match=message):
                function(zeros, 2, **change)
    with pytest.raises(TypeError, match="logits is sparse or nested; a dense tensor is needed"):
        topk_gate(zeros.to_sparse(), 2)


def test_forward_mode_is_refused_rather_than_zero(device: torch.device) -> None:
    zeros = torch.zeros(4, 8, device=device)
    with pytest.raises(TypeError, match="logits carries a forward-mode tangent"):
        torch.func.jvp(lambda z: topk_gate(z, 2)[1], (zeros,), (zeros + 1,))


def test_the_reference_takes_any_strides() -> None:
    logits = torch.randn(8, 6)
    for dtype in (torch.float32, torch.float64):
        ids, weights = topk_gate_torch(logits.to(dtype).T, 3, n_groups=4, topk_groups=2, group_score="top2_sum")
        wanted_ids, wanted = topk_gate_torch(
            logits.to(dtype).T.contiguous(), 3, n_groups=4, topk_groups=2, group_score="top2_sum"
        )
        assert torch.equal(ids, wanted_ids)
        assert weights.dtype == dtype
        assert_close("weights", weights, wanted, 1e-7)
