"""permute and combine: forward and gradients against loops and float64, as operators, and what they compile to."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_loops import TOLERANCES, assert_close, cheap_cover, leaf
from kernel_plan_loops import ids_of, priorities
from torch import Tensor

import moebench_kernels
from moebench_kernels import (
    combine,
    combine_torch,
    down_projection,
    grouped_gemm,
    permute,
    permute_torch,
    quantise_weights,
    quantised_gemm,
    ragged_gemm,
    routing_plan,
    routing_plan_torch,
    up_projection,
)
from moebench_kernels.combine import launch_gather_sum

OPS = torch.ops.moebench
FACTORS = {
    "T": (0, 1, 3, 33, 65),
    "E": (1, 5, 60),
    "K": (1, 2, 3, 4, 6, 8, 11, 16),
    "D": (1, 17, 48, 520),
    "dropped": (0.0, 0.4, 1.0),
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
}
CASES = cheap_cover(FACTORS, lambda case: 0.05 + case["T"] * case["K"] * (case["D"] + 300) / 1e6)


def label(case: dict) -> str:
    return "-".join(map(str, case.values()))


def problem(case: dict) -> tuple[Tensor, Tensor]:
    """ids, and weights that are NaN where the assignment is dropped: those must not be read."""
    ids, weights = ids_of(case["T"], case["E"], case["K"], case["dropped"]), torch.randn(case["T"], case["K"])
    return ids, weights.masked_fill((ids < 0) | (ids >= case["E"]), float("nan"))


@pytest.mark.parametrize("case", CASES, ids=label)
def test_permute(case: dict, device: torch.device) -> None:
    T, E, K, D, dtype = (case[name] for name in ("T", "E", "K", "D", "dtype"))
    ids, _ = problem(case)
    x, upstream = torch.randn(T, D).to(dtype), torch.randn(T * K, D).to(dtype)
    mine, exact = leaf(x, dtype, device), leaf(x, torch.float64)
    rows, reference = permute(mine, routing_plan(ids.to(device), E)), routing_plan_torch(ids, E)
    wanted = permute_torch(exact, reference)
    assert rows.dtype == dtype
    assert torch.equal(rows.detach().cpu().double(), wanted.detach())
    for r, token in enumerate(reference.row2token.tolist()):
        assert torch.equal(wanted[r], exact[token] if token >= 0 else torch.zeros(D).double())
    rows.backward(upstream.to(device))
    wanted.backward(upstream.double())
    assert_close("dx", mine.grad, exact.grad, TOLERANCES[dtype])


@pytest.mark.parametrize("case", CASES, ids=label)
def test_combine(case: dict, device: torch.device) -> None:
    T, E, K, D, dtype = (case[name] for name in ("T", "E", "K", "D", "dtype"))
    ids, weights = problem(case)
    plan, reference = routing_plan(ids.to(device), E), routing_plan_torch(ids, E)
    rows, upstream = torch.randn(T * K, D).to(dtype), torch.randn(T, D).to(dtype)
    rows[int(reference.offsets[-1]) :] = float("nan")  # rows of no expert must not be read
    mine = [leaf(rows, dtype, device), leaf(weights, torch.float32, device)]
    exact = [leaf(rows, torch.float64), leaf(weights, torch.float64)]
    y, wanted = combine(*mine, plan), combine_torch(*exact, reference)
    assert y.dtype == dtype
    assert_close("y", y, wanted, TOLERANCES[dtype])
    for t in range(T):
        kept = [(k, r) for k, r in enumerate(reference.token2row[t].tolist()) if r >= 0]
        loop = sum((weights[t, k].double() * rows[r].double() for k, r in kept), torch.zeros(D).double())
        assert_close("reference", wanted[t], loop, 1e-12)
    y.backward(upstream.to(device))
    wanted.backward(upstream.double())
    for name, found, want in zip(("d_rows", "d_weights"), mine, exact, strict=True):
        assert_close(name, found.grad, want.grad, TOLERANCES[dtype])
    assert (mine[1].grad.cpu()[torch.isnan(weights)] == 0).all()
    assert (mine[0].grad.cpu()[int(reference.offsets[-1]) :] == 0).all()


def test_the_cover_is_pairwise() -> None:
    for a, b in itertools.combinations(FACTORS, 2):
        assert {(case[a], case[b]) for case in CASES} == set(itertools.product(FACTORS[a], FACTORS[b]))


@pytest.mark.full
@pytest.mark.parametrize("T", [0, 1, 3, 33, 127, 128, 129, 500])
@pytest.mark.parametrize("E", [1, 2, 8, 60, 64, 160, 257])
@pytest.mark.parametrize("K", [*range(1, 9), 16])
@pytest.mark.parametrize("dtype", FACTORS["dtype"])
def test_every_shape(T: int, E: int, K: int, dtype: torch.dtype, device: torch.device) -> None:
    for D in (17, 300):
        case = {"T": T, "E": E, "K": K, "D": D, "dropped": 0.2, "dtype": dtype}
        test_permute(case, device)
        test_combine(case, device)


def test_the_sum_rises_in_k_in_float32(device: torch.device) -> None:
    """1 + 2**-12 is no float16, yet neither is lost; and 2**24 + 1 - 2**24 is 0 in this order alone."""
    plan = routing_plan(torch.tensor([[0, 1, 2]], device=device), 3)
    rows, one = torch.ones(3, 4, dtype=torch.float16, device=device), torch.ones(1, 3, device=device)
    few = torch.tensor([[1.0, 2.0**-12, -1.0]], device=device)
    assert (combine(rows, few, plan) == 2.0**-12).all()
    many = torch.tensor([[2.0**24, 1.0, -(2.0**24)]], device=device)
    assert (combine(rows, many, plan) == 0).all()
    assert (combine(rows, many[:, [0, 2, 1]].contiguous(), plan) == 1).all()
    assert (launch_gather_sum(rows, None, plan) == combine(rows, one, plan)).all()


def test_capacity_reaches_them(device: torch.device) -> None:
    """What a full expert dropped is zero on the way there and on the way back."""
    ids, priority = ids_of(33, 4, 2), priorities(33, 2)
    plan = routing_plan(ids.to(device), 4, capacity=5, priority=priority.to(device))
    reference = routing_plan_torch(ids, 4, capacity=5, priority=priority)
    x, weights = leaf(torch.randn(33, 24), torch.float32, device), leaf(torch.rand(33, 2), torch.float32, device)
    y = combine(permute(x, plan), weights, plan)
    assert_close("y", y, combine_torch(permute_torch(x.cpu(), reference), weights.cpu(), reference), 1e-6)
    y.sum().backward()  # an expanded gradient
    lost = (plan.token2row < 0).cpu()
    assert lost.sum() == 66 - 20
    assert (weights.grad.cpu()[lost] == 0).all()
    assert (x.grad.cpu()[lost.all(1)] == 0).all()


def test_weights_may_have_any_strides(device: torch.device) -> None:
    plan = routing_plan(ids_of(9, 4, 2).to(device), 4)
    rows, weights = torch.randn(18, 20, device=device), torch.randn(2, 9, device=device)
    found = combine(rows, weights.T, plan)
    assert torch.equal(found, combine(rows, weights.T.contiguous(), plan))
    assert_close("y", found, combine_torch(rows, weights.T, plan), 1e-6)


def operands(device: torch.device, T: int = 9) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """x, rows, weights, and the parts of a plan with dropped assignments that the operators take."""
    plan = routing_plan(ids_of(T, 5, 3, 0.3).to(device), 5)
    leaves = (torch.randn(size, device=device) for size in ((T, 20), (3 * T, 20), (T, 3)))
    x, rows, weights = (value.requires_grad_() for value in leaves)
    return x, rows, weights, (plan.token2row, plan.offsets)


@pytest.mark.parametrize("T", [9, 0])
def test_operators(T: int, device: torch.device) -> None:
    x, rows, weights, plan = operands(device, T)
    torch.library.opcheck(OPS.permute.default, (x, *plan))
    torch.library.opcheck(OPS.gather_sum.default, (rows, weights, *plan))
    torch.library.opcheck(OPS.gather_sum.default, (rows, None, *plan))
    torch.library.opcheck(OPS.combine_backward.default, (x.detach(), rows.detach(), weights.detach(), *plan))


def test_second_derivatives(device: torch.device) -> None:
    """permute and the unweighted sum are linear, so they have them; combine's backward refuses."""
    x, rows, weights, plan = operands(device)
    for operator, value, upstream in ((OPS.permute, x, rows), (lambda r, *p: OPS.gather_sum(r, None, *p), rows, x)):
        (first,) = torch.autograd.grad(operator(value, *plan), value, upstream, create_graph=True)
        (second,) = torch.autograd.grad(first, upstream, torch.ones_like(first))
        assert torch.equal(second, operator(torch.ones_like(value), *plan))
    (d_rows,) = torch.autograd.grad(OPS.gather_sum(rows, weights, *plan).sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        d_rows.sum().backward()


def test_compiled_whole(device: torch.device) -> None:
    """plan, permute and combine in one graph, gradients included, for two numbers of tokens."""

    def step(ids: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        plan = routing_plan(ids, 5, capacity=7, priority=weights.detach())
        return combine(2 * permute(x, plan), weights, plan)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=False)
    for T in (9, 20):
        ids = ids_of(T, 5, 3, 0.2).to(device)
        x, weights = torch.randn(T, 20, device=device), torch.rand(T, 3, device=device)
        plain, traced = ([leaf(v, v.dtype, device) for v in (x, weights)] for _ in range(2))
        step(ids, *plain).square().sum().backward()
        compiled(ids, *traced).square().sum().backward()
        for mine, other in zip(plain, traced, strict=True):
            assert torch.equal(mine.grad, other.grad)


def test_what_is_dropped_stays_zero_whatever_comes_back(device: torch.device) -> None:
    plan = routing_plan(torch.tensor([[0, -1], [1, 0]], device=device), 2)
    weights = torch.ones(2, 2, device=device, requires_grad=True)
    y = combine(torch.ones(4, 3, device=device), weights, plan)
    for poison in (float("inf"), float("nan")):
        (gradient,) = torch.autograd.grad(y, weights, torch.full_like(y, poison), retain_graph=True)
        assert gradient[0, 1] == 0
        assert not torch.isfinite(gradient[0, 0])


@pytest.mark.parametrize("plan", [None, (), "plan"])
def test_a_plan_is_needed(plan: object) -> None:
    x, w = torch.zeros(2, 4), torch.zeros(2, 4, 4)
    quantised = quantise_weights(w, "int8")
    for call in (
        lambda: permute(x, plan),
        lambda: combine(x, x, plan),
        lambda: grouped_gemm(x, w, plan),
        lambda: ragged_gemm(x, x, plan),
        lambda: up_projection(x, w, plan),
        lambda: down_projection(x, w, plan),
        lambda: quantised_gemm(x.to(torch.int8), torch.ones(2), quantised, plan, dtype=torch.float32),
    ):
        with pytest.raises(TypeError, match=r"plan is a \w+; a Plan is needed \(see routing_plan\)"):
            call()


def test_they_refuse(device: torch.device) -> None:
    plan = routing_plan(ids_of(4, 8, 2).to(device), 8)
    with pytest.raises(ValueError, match=r"x has shape \[5, 16\]; needed: \[4, D\]"):
        permute(torch.zeros(5, 16, device=device), plan)
    with pytest.raises(ValueError, match=r"x has strides .* must be contiguous"):
        permute(torch.zeros(16, 4, device=device).T, plan)
    with pytest.raises(TypeError, match="x is float64; allowed: float32, float16, bfloat16"):
        permute(torch.zeros(4, 16, device=device).double(), plan)
    with pytest.raises(TypeError, match="weights is float16; allowed: float32"):
        combine(torch.zeros(8, 16, device=device), torch.zeros(4, 2, device=device).half(), plan)
    with pytest.raises(ValueError, match=r"rows has shape \[4, 16\]; needed: \[8, D\]"):
        combine(torch.zeros(4, 16, device=device), torch.zeros(4, 2, device=device), plan)
    with pytest.raises(ValueError, match="one device is needed for all, found: x on meta, plan on"):
        permute(torch.zeros(4, 16, device="meta"), plan)
    with pytest.raises(ValueError, match=r"one device is needed for all, found: rows on .*, weights on meta"):
        combine(torch.zeros(8, 16, device=device), torch.zeros(4, 2, device="meta"), plan)


COMPILE = """
import importlib, json, re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
files = [importlib.import_module(f"moebench_kernels.{name}") for name in ("permute", "combine", "plan_kernels")]
for b in [build for file in files for build in file.builds()]:
    if b.name not in WANTED: continue
    names = enumerate(b.kernel.arg_names)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in names if b.signature[name] != "constexpr"}
    source = ASTSource(b.kernel, dict(b.signature), dict(b.constants), aligned)
    asm = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": b.num_warps}).asm
    products = re.findall(r"arith.muli .* : tensor<[0-9x]+x(i[0-9]+)>", asm["ttir"])
    found = {name: len(re.findall(pattern, asm["ptx"])) for name, pattern in PATTERNS.items()}
    print(json.dumps({"name": b.name, "products": sorted(set(products)), "atomics": "atomic" in asm["ttir"], **found}))
"""
PATTERNS = {
    "wide_loads": r"ld\.global\.v4\.b32", "wide_stores": r"st\.global\.v4\.b32", "narrow": r"global\.b16",
    "divisions": r"\b(div|rem)\.[su]",
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict]:
    """Facts of the bfloat16 builds for sm_90, by name; in a process that does not interpret."""
    wanted = ["permute bf16 T32768", "gather_sum bf16 T32768 K8 weighted", "combine_backward bf16",
              "count E64 n32768", "scan E64 n32768", "rank E64 n32768", "small plan n128 E64"]  # fmt: skip
    code = f"WANTED, PATTERNS = {wanted!r}, {PATTERNS!r}\n{COMPILE}"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    folder = str(Path(moebench_kernels.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([folder, environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    assert {fact["name"] for fact in facts} == set(wanted)
    return {fact["name"]: fact for fact in facts}


def test_offsets_are_64_bit(compiled: dict[str, dict]) -> None:
    """Row times D, token times K, chunk times E: T*K*D may pass 2**31 where T*K may not. Columns are only added."""
    copies = ("permute bf16 T32768", "gather_sum bf16 T32768 K8 weighted", "combine_backward bf16")
    for name in (*copies, "scan E64 n32768"):
        assert compiled[name]["products"] == ["i64"], compiled[name]


def test_accesses_are_16_bytes_wide(compiled: dict[str, dict]) -> None:
    """A thread's accesses: of x, its 8 rows and one to clear; of 8 rows and y; of dy and 8 rows, and to 8 rows."""
    wide = {name: (fact["wide_loads"], fact["wide_stores"]) for name, fact in compiled.items()}
    assert wide["permute bf16 T32768"] == (4, 4 * (8 + 1))
    assert wide["gather_sum bf16 T32768 K8 weighted"] == (2 * 8, 2)
    loads, stores = wide["combine_backward bf16"]
    assert loads == 2 * (1 + 8)
    assert stores >= 2 * (8 + 1)
    for name in ("permute bf16 T32768", "gather_sum bf16 T32768 K8 weighted", "combine_backward bf16"):
        assert compiled[name]["narrow"] == 0
        assert compiled[name]["divisions"] <= 2  # of the program's number, once a program


def test_the_plan_has_no_atomics(compiled: dict[str, dict]) -> None:
    assert not [name for name, fact in compiled.items() if fact["atomics"]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FACTORS["dtype"])
@pytest.mark.parametrize(
    ("T", "E", "K", "D"), [(1, 64, 8, 7168), (128, 256, 8, 2048), (4096, 64, 6, 2880), (1000, 8, 2, 17)]
)
def test_on_a_gpu(T: int, E: int, K: int, D: int, dtype: torch.dtype, device: torch.device) -> None:
    """Against float64, and the same bits from twenty replays of a CUDA graph."""
    ids, weights = ids_of(T, E, K, 0.1).to(device), torch.rand(T, K, device=device)
    x, dy = torch.randn(T, D, device=device).to(dtype), torch.randn(T, D, device=device).to(dtype)
    plan = routing_plan(ids, E)
    parts = (plan.token2row, plan.offsets)

    def steps() -> list[Tensor]:
        rows = permute(x, plan)
        return [rows, combine(rows, weights, plan), *OPS.combine_backward(dy, rows, weights, *parts)]

    wanted, exact = steps(), leaf(x, torch.float64, device)
    rows = permute_torch(exact, plan).detach().requires_grad_()
    gates = leaf(weights, torch.float64, device)
    y = combine_torch(rows, gates, plan)
    y.backward(dy.double())
    for name, found, want in zip(
        ("rows", "y", "d_rows", "d_weights"), wanted, (rows, y, rows.grad, gates.grad), strict=True
    ):
        assert_close(name, found, want, TOLERANCES[dtype])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = steps()
    for _ in range(20):
        for value in found:
            value.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(mine, other) for mine, other in zip(found, wanted, strict=True))


@pytest.mark.gpu
def test_more_than_2_31_elements_on_a_gpu(device: torch.device) -> None:
    T, K, D = 2**15, 16, 4608  # 2.4e9 elements in rows
    plan = routing_plan(ids_of(T, 64, K).to(device), 64)
    x, weights = torch.randn(T, D, device=device).bfloat16(), torch.ones(T, K, device=device)
    rows = permute(x, plan)
    some = torch.randint(0, T * K, (100,), device=device)
    assert torch.equal(rows[some], x[plan.row2token[some].long()])
    assert torch.equal(rows[-1], x[plan.row2token[-1]])
    assert torch.equal(combine(rows, weights, plan), (16 * x.float()).bfloat16())
