"""topk_gate: against Python loops, its reference, the tiles that ship, and torch.compile."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from kernel_gate_loops import FACTORS, gate, label, pairwise, problem
from kernel_loops import assert_close
from torch import Tensor

from moebench_kernels import gate as gate_file
from moebench_kernels import topk_gate, topk_gate_torch

CASES = pairwise(FACTORS)


def check(logits: Tensor, K: int, options: dict[str, Any]) -> None:
    """Kernel and reference against the loop; ids exactly, but for choices that float32 cannot settle."""
    E, bias = logits.shape[1], options["bias"]
    found = topk_gate(logits, K, **options)
    reference = topk_gate_torch(logits, K, **options)
    plain = options | {"bias": None if bias is None else bias.tolist()}
    wanted = [gate(row, K, **plain) for row in logits.double().tolist()]
    settled = [t for t, (_, _, safe) in enumerate(wanted) if safe]
    assert len(settled) >= 0.9 * len(wanted) - 1
    for name, (ids, weights) in (("kernel", found), ("reference", reference)):
        assert ids.dtype == torch.int32
        assert weights.dtype == torch.float32
        assert ids.is_contiguous()
        assert weights.is_contiguous()
        assert ids.shape == weights.shape == (logits.shape[0], K)
        assert all(len(set(row)) == K and set(row) <= set(range(E)) for row in ids.tolist())
        assert ids[settled].tolist() == [wanted[t][0] for t in settled], name
        exact = torch.tensor([wanted[t][1] for t in settled], dtype=torch.float64).reshape(-1, K)
        assert_close(name, weights[settled], exact, 3e-6)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_gate_equals_loop(case: dict[str, Any], device: torch.device) -> None:
    check(*problem(case, device))


def test_the_cover_is_pairwise() -> None:
    for a, b in itertools.combinations(FACTORS, 2):
        assert {(case[a], case[b]) for case in CASES} == set(itertools.product(FACTORS[a], FACTORS[b]))
    assert len(CASES) < 100


@pytest.mark.full
@pytest.mark.parametrize("T", FACTORS["T"])
@pytest.mark.parametrize("E", FACTORS["E"])
def test_gate_equals_loop_on_the_whole_product(T: int, E: int, device: torch.device) -> None:
    rest = {name: values for name, values in FACTORS.items() if name not in ("T", "E", "dtype")}
    for values in itertools.product(*rest.values()):
        case = {"T": T, "E": E, "dtype": torch.float32} | dict(zip(rest, values, strict=True))
        check(*problem(case, device))


SHIPPED = [
    (5, 8, 2, {}), (65, 8, 2, {"order": "topk_first"}), (5, 60, 4, {}), (9, 128, 8, {"scoring": "sigmoid"}),
    (2, 300, 9, {}), (2, 1100, 3, {}), (3, 40, 34, {}), (3, 33, 33, {"scoring": "sigmoid"}),
    (2, 64, 64, {"renormalise": True}),
    (2, 160, 6, {"n_groups": 8, "topk_groups": 3}),
    (2, 96, 8, {"n_groups": 3, "topk_groups": 2, "group_score": "top2_sum", "scoring": "sigmoid", "renormalise": True}),
]  # fmt: skip


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("n", range(len(SHIPPED)))
def test_tiles_for_a_gpu(n: int, biased: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes larger tiles and never sorts; here it runs what a GPU runs, many picks sorted."""
    monkeypatch.setattr(gate_file, "interpreting", lambda: False)
    (T, E, K, more), dtype = SHIPPED[n], FACTORS["dtype"][n % 3]
    logits = (torch.randn(T, E) * 2).to(dtype).to(device)
    bias = torch.randn(E, device=device) if biased else None
    ids, weights = topk_gate(logits, K, bias=bias, **more)
    wanted_ids, wanted = topk_gate_torch(logits, K, bias=bias, **more)
    assert torch.equal(ids, wanted_ids)
    assert_close("weights", weights, wanted, 3e-6)


def test_4096_experts_64_picks(device: torch.device) -> None:
    check(torch.randn(2, 4096, device=device) * 2, 64, DEFAULTS)


DEFAULTS = {
    "scoring": "softmax", "order": "score_first", "bias": None, "renormalise": False,
    "n_groups": 1, "topk_groups": 1, "group_score": "max", "scale": 1.0,
}  # fmt: skip


def test_the_bias_chooses_and_never_weighs(device: torch.device) -> None:
    logits = torch.randn(9, 12, device=device)
    bias = torch.full((12,), -100.0, device=device)
    bias[[3, 7]] = 50.0
    for scoring in ("softmax", "sigmoid", "sqrt_softplus"):
        ids, weights = topk_gate(logits, 2, scoring=scoring, bias=bias)
        assert {frozenset(row) for row in ids.tolist()} == {frozenset({3, 7})}
        everyone, all_weights = topk_gate(logits, 12, scoring=scoring)
        plain = torch.zeros_like(all_weights).scatter_(1, everyone.long(), all_weights)
        assert_close("weights", weights, plain.gather(1, ids.long()), 1e-6)


def test_a_bias_that_wants_a_gradient_gets_none(device: torch.device) -> None:
    bias = torch.zeros(8, device=device, requires_grad=True)
    weights = topk_gate(torch.randn(3, 8, device=device), 2, bias=bias)[1]
    assert not weights.requires_grad
    assert not topk_gate_torch(torch.randn(3, 8, device=device), 2, bias=bias)[1].requires_grad


ARGUMENTS: list[tuple[Any, ...]] = [
    (None, 3, "softmax", "score_first", False, 1, 1, "max", 1.0),
    (torch.linspace(-1, 1, 16), 3, "sigmoid", "topk_first", True, 4, 2, "top2_sum", 2.5),
]


@pytest.mark.parametrize("rest", ARGUMENTS, ids=["softmax", "grouped"])
def test_operator(rest: tuple[Any, ...], device: torch.device) -> None:
    logits = torch.randn(7, 16, device=device)
    rest = tuple(value.to(device) if isinstance(value, Tensor) else value for value in rest)
    operator = torch.ops.moebench.topk_gate.default
    torch.library.opcheck(operator, (logits, *rest))
    # opcheck's fourth test adds up all outputs and cannot add a gradient's graph to int32 ids.
    three = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(operator, (logits.requires_grad_(), *rest), test_utils=three)


def test_compiles_whole(device: torch.device) -> None:
    def loss(logits: Tensor, bias: Tensor) -> Tensor:
        ids, weights = topk_gate(
            logits * 2, 3, scoring="sigmoid", bias=bias, n_groups=4, topk_groups=2, group_score="top2_sum"
        )
        return (weights * (ids + 1)).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    bias = torch.randn(16, device=device)
    for T in (5, 9):
        logits = torch.randn(T, 16, device=device, requires_grad=True)
        (grad,) = torch.autograd.grad(compiled(logits, bias), logits)
        (wanted,) = torch.autograd.grad(loss(logits, bias), logits)
        assert torch.equal(grad, wanted)


@pytest.mark.gpu
def test_on_a_gpu_bits_repeat_and_graphs_replay(device: torch.device) -> None:
    bias = torch.randn(256, device=device) / 10
    options = {"scoring": "sigmoid", "bias": bias, "n_groups": 8, "topk_groups": 4, "group_score": "top2_sum"}
    logits = torch.randn(5000, 256, device=device)
    first = topk_gate(logits, 8, **options)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, topk_gate(logits, 8, **options), strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = topk_gate(logits, 8, **options)
    logits.copy_(logits.flip(0))
    graph.replay()
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(held, first, strict=True))
