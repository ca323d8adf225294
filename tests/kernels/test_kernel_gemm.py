"""grouped_gemm, forward and backward, against its reference in float64; each form of the kernel against the others."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_loops import TOLERANCES, assert_close, cheap_cover, leaf, matvec, random_ids
from torch import Tensor

from moebench_kernels import Plan, grouped_gemm, grouped_gemm_torch, routing_plan, routing_plan_torch
from moebench_kernels.bias_gradient import bias_gradient, bias_gradient_torch
from moebench_kernels.grouped_gemm import launch_grouped_gemm
from moebench_kernels.plan import tile_map_torch
from moebench_kernels.tiles import BLOCK_MS, GemmConfig, tile_rows
from moebench_kernels.tuned_tiles import pick_config

HALF, BRAIN, WIDE = torch.float16, torch.bfloat16, torch.float32
# 40 and 48 columns (and 130 in float32 or 96 in all) can come by TMA, 17 and 130 not; `offset` elements into a buffer
# puts the tensor off its 16 bytes.
FACTORS: dict[str, tuple[Any, ...]] = {
    "T": (0, 1, 3, 33, 127, 128, 129, 500),
    "E": (1, 2, 8, 60, 64, 160, 257),
    "K": (1, 2, 3, 4, 5, 6, 7, 8, 16),
    "n_in": (17, 40, 48, 96, 130),
    "n_out": (17, 40, 48, 96, 130),
    "dtype": (WIDE, HALF, BRAIN),
    "transpose": (False, True),
    "bias": (None, "same", "float32"),
    "dropped": (0.0, 0.3, 1.0),
    "offset": (0, 1),
}
BUSY = 3  # experts with tokens in the cover, of however many: the interpreter takes its time over each tile


def row_tiles(case: dict[str, Any]) -> float:
    """What a case costs the interpreter."""
    rows = case["T"] * case["K"]
    return 32 + rows / tile_rows(rows / case["E"])


CASES = cheap_cover(FACTORS, row_tiles)
# T, E, K, n_in, n_out, dropped, dtype; the last three cross tiles in every direction, the very last also a band.
GRADIENTS = [
    (0, 5, 2, 17, 48, 0.0, WIDE),
    (1, 1, 1, 1, 1, 0.0, WIDE),
    (3, 2, 2, 17, 40, 1.0, WIDE),
    (33, 5, 4, 48, 17, 0.3, WIDE),
    (9, 12, 8, 40, 48, 0.1, HALF),
    (65, 8, 1, 17, 17, 0.0, HALF),
    (65, 2, 1, 48, 40, 0.3, BRAIN),
    (150, 2, 1, 70, 140, 0.1, WIDE),
    (140, 1, 1, 150, 300, 0.1, HALF),
]


def label(case: dict[str, Any]) -> str:
    """A case in a few letters."""
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


def any_ids(T: int, E: int, K: int, dropped: float) -> Tensor:
    """int32 [T, K] of BUSY of the E experts, drawn with repetition."""
    busy = torch.randperm(E)[:BUSY].int()
    ids = busy[torch.randint(len(busy), (T, K))]
    fate = torch.rand(T, K)
    return ids.masked_fill(fate < dropped, -1).masked_fill(fate < dropped / 2, E + 3)


def plan_on(ids: Tensor, E: int, device: torch.device) -> tuple[Plan, Plan]:
    """The plan there and here. The kernel's is the same bit for bit (test_kernel_plan.py) but takes its time."""
    here = routing_plan_torch(ids, E)
    return Plan(*(tensor.to(device) for tensor in here[:-1]), here.block_m), here


def away(tensor: Tensor, offset: int) -> Tensor:
    """The same values, contiguous, `offset` elements into a buffer."""
    buffer = tensor.new_empty(tensor.numel() + offset)
    buffer[offset:] = tensor.flatten()
    return buffer[offset:].view(tensor.shape)


def operands(
    T: int, E: int, K: int, n_in: int, n_out: int, dropped: float, *, busy: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids (on all experts where `busy`), rows (poisoned where they belong to no expert), weights, bias."""
    ids = random_ids(T, E, K, dropped) if busy else any_ids(T, E, K, dropped)
    rows = torch.randn(T * K, n_in)
    rows[int(routing_plan_torch(ids, E).offsets[-1]) :] = float("nan")
    return ids, rows, torch.randn(E, n_out, n_in) * n_in**-0.5, torch.randn(E, n_out)


def check_forward(case: dict[str, Any], device: torch.device, *, busy: bool = False) -> None:
    """One case of FACTORS."""
    names = ("T", "E", "K", "n_in", "n_out", "dropped")
    ids, rows, weights, bias = operands(*(case[name] for name in names), busy=busy)
    dtype, transpose, E = case["dtype"], case["transpose"], case["E"]
    weights = weights.mT.contiguous() if transpose else weights
    mine = [away(tensor.to(device, dtype), case["offset"]) for tensor in (rows, weights)]
    exact = [tensor.to(dtype).double() for tensor in (rows, weights)]
    plan, reference = plan_on(ids, E, device)
    biases = [None, None]
    if case["bias"]:
        own = bias.to(dtype if case["bias"] == "same" else WIDE)
        biases = [own.to(device), own.double()]
    found = grouped_gemm(*mine, plan, transpose=transpose, bias=biases[0])
    wanted = grouped_gemm_torch(*exact, reference, transpose=transpose, bias=biases[1])
    assert found.dtype == dtype
    assert_close("out", found, wanted, TOLERANCES[dtype])


@pytest.mark.parametrize("case", CASES, ids=label)
def test_forward(case: dict[str, Any], device: torch.device) -> None:
    check_forward(case, device)


@pytest.mark.parametrize(("T", "E", "K"), [(33, 60, 2), (129, 257, 1)])
def test_forward_on_many_experts(T: int, E: int, K: int, device: torch.device) -> None:
    case = {"T": T, "E": E, "K": K, "n_in": 40, "n_out": 48, "dropped": 0.1}
    check_forward({**case, "dtype": HALF, "transpose": False, "bias": None, "offset": 0}, device, busy=True)


@pytest.mark.full
@pytest.mark.parametrize("T", FACTORS["T"])
@pytest.mark.parametrize("E", FACTORS["E"])
def test_forward_in_full(T: int, E: int, device: torch.device) -> None:
    """The product of T, E, K, dtype, transpose and bias; the other factors take turns. One test for each T and E."""
    inner = ("K", "dtype", "transpose", "bias")
    turns = {name: itertools.cycle(FACTORS[name]) for name in ("n_in", "n_out", "dropped", "offset")}
    for n, values in enumerate(itertools.product(*(FACTORS[name] for name in inner))):
        if n % 5 == 0:
            next(turns["n_out"])  # so that every two sizes meet
        others = {name: next(turn) for name, turn in turns.items()}
        check_forward({"T": T, "E": E, **dict(zip(inner, values, strict=True)), **others}, device)  # BUSY experts


@pytest.mark.parametrize(
    ("T", "E", "K", "n_in", "n_out", "dropped", "dtype", "transpose"),
    [(*case, transpose) for i, case in enumerate(GRADIENTS) for transpose in {i % 2 == 0, case[3] == 48}],
)
def test_gradients(
    T: int, E: int, K: int, n_in: int, n_out: int, dropped: float, dtype: torch.dtype, transpose: bool,
    device: torch.device,
) -> None:  # fmt: skip
    ids, rows, weights, bias = operands(T, E, K, n_in, n_out, dropped, busy=True)
    weights, upstream = weights.mT.contiguous() if transpose else weights, torch.randn(T * K, n_out)
    plan, reference = plan_on(ids, E, device)
    mine = [leaf(tensor, dtype, device) for tensor in (rows, weights)] + [leaf(bias, WIDE, device)]
    exact = [leaf(tensor.to(dtype), torch.float64) for tensor in (rows, weights)] + [leaf(bias, torch.float64)]
    out = grouped_gemm(*mine[:2], plan, transpose=transpose, bias=mine[2])
    wanted = grouped_gemm_torch(*exact[:2], reference, transpose=transpose, bias=exact[2])
    assert_close("out", out, wanted, TOLERANCES[dtype])
    out.backward(upstream.to(device, dtype))
    wanted.backward(upstream.to(dtype).double())
    for name, found, want in zip(("d_rows", "d_weights", "d_bias"), mine, exact, strict=True):
        assert_close(name, found.grad, want.grad, TOLERANCES[dtype])
        assert found.grad.dtype == found.dtype
    idle = (reference.counts == 0).tolist()
    assert (mine[1].grad.cpu()[idle] == 0).all(), "an idle expert's weights have a gradient"
    assert (mine[2].grad.cpu()[idle] == 0).all(), "an idle expert's bias has a gradient"


def test_reference_equals_loop() -> None:
    ids, rows, weights, bias = operands(9, 3, 2, 7, 5, 0.3)
    plan = routing_plan_torch(ids, 3)
    found = grouped_gemm_torch(rows.double(), weights.double(), plan, bias=bias.double())
    matrices, biases = weights.double().tolist(), bias.double().tolist()
    for r, e in enumerate(plan.row2expert.tolist()):
        loop = [0.0] * 5
        if e >= 0:
            product = matvec(matrices[e], rows[r].double().tolist())
            loop = [value + b for value, b in zip(product, biases[e], strict=True)]
        assert_close("row", found[r], torch.tensor(loop, dtype=torch.float64), 1e-12)


def test_every_tile_is_used() -> None:
    """The sweeps above reach each row-count class of the tile table."""
    assert {tile_rows(T * K / E) for T, E, K, *_ in GRADIENTS} == set(BLOCK_MS)
    assert {tile_rows(case["T"] * case["K"] / case["E"]) for case in CASES} == set(BLOCK_MS)


def test_the_cover_is_pairwise() -> None:
    for a, b in itertools.combinations(FACTORS, 2):
        assert {(case[a], case[b]) for case in CASES} == set(itertools.product(FACTORS[a], FACTORS[b]))


BASE = GemmConfig(32, 32, 4, 3)
FORMS = {
    "plain": BASE,
    "swap": replace(BASE, swap=True),
    "halves": replace(BASE, block_n=64, halves=True),
    "tma": replace(BASE, tma=True),
    "tma swap halves": replace(BASE, block_n=64, tma=True, swap=True, halves=True),
    "no bands": replace(BASE, group_m=1, flatten=False),
    "bands of three": replace(BASE, group_m=3, tma=True, ctas_per_sm=2),
}


@pytest.mark.parametrize(
    ("form", "transpose"),
    [(form, i % 2 == 0) for i, form in enumerate(FORMS)]
    + [("tma swap halves", True), ("tma", False), ("plain", False)],
)
def test_every_form_of_the_kernel(form: str, transpose: bool, device: torch.device) -> None:
    """Several row tiles an expert, several columns, several steps: each tile is visited, in whichever order."""
    ids, rows, weights, bias = operands(110, 2, 1, 72, 104, 0.1, busy=True)
    weights = (weights.mT.contiguous() if transpose else weights).to(device, HALF)
    plan, reference = small_tiles(ids, 2, device), routing_plan_torch(ids, 2)
    rows, bias = rows.to(device, HALF), bias.to(device)
    found, _ = launch_grouped_gemm(rows, weights, plan, transpose=transpose, bias=bias, config=FORMS[form])
    wanted = grouped_gemm_torch(rows.cpu(), weights.cpu(), reference, transpose=transpose, bias=bias.cpu())
    assert_close("out", found, wanted, TOLERANCES[HALF])


def small_tiles(ids: Tensor, E: int, device: torch.device) -> Plan:
    """A plan in tiles of 16 rows, whatever the load."""
    plan = routing_plan_torch(ids.to(device), E)
    tile_offsets, tile2expert = tile_map_torch(plan.offsets, plan.n_rows, 16)
    return plan._replace(tile_offsets=tile_offsets, tile2expert=tile2expert, block_m=16)


def test_tma_and_pointers_agree_to_the_bit(device: torch.device) -> None:
    ids, rows, weights, _ = operands(33, 3, 2, 48, 40, 0.3)
    plan, rows, weights = routing_plan(ids.to(device), 3), rows.to(device), weights.to(device)
    c = pick_config("rows", plan.block_m, 40, 48, WIDE, rows.device)
    first, second = (
        launch_grouped_gemm(rows, weights, plan, config=replace(c, tma=tma, swap=False, block_n=32))[0]
        for tma in (True, False)
    )
    assert torch.equal(first, second)


def test_all_on_one_expert(device: torch.device) -> None:
    """The others are idle, on either side of it."""
    ids = torch.full((130, 2), 4, dtype=torch.int32)
    _, rows, weights, _ = operands(130, 9, 2, 40, 48, 0.0)
    rows = torch.randn(260, 40)
    found = grouped_gemm(rows.to(device), weights.to(device), routing_plan(ids.to(device), 9))
    assert_close("out", found, rows.double() @ weights[4].double().T, TOLERANCES[WIDE])


def test_no_row_is_read_past_the_experts(device: torch.device) -> None:
    """Rows of no expert may hold anything: NaN in them reaches neither the output nor a gradient."""
    ids = torch.tensor([[0], [-1], [1], [7]], dtype=torch.int32)
    plan = routing_plan(ids.to(device), 2)
    rows = torch.full((4, 16), float("nan"))
    rows[:2] = 1.0
    rows = leaf(rows, WIDE, device)
    weights = torch.ones(2, 8, 16, device=device, requires_grad=True)
    out = grouped_gemm(rows, weights, plan)
    assert out.tolist() == [[16.0] * 8] * 2 + [[0.0] * 8] * 2
    out.backward(torch.where(torch.arange(4, device=device)[:, None] < 2, 1.0, float("nan")).expand(4, 8))
    assert torch.isfinite(weights.grad).all()
    assert (rows.grad[2:] == 0).all()


@pytest.mark.parametrize("dtype", [WIDE, HALF])
def test_bias_gradient(dtype: torch.dtype, device: torch.device) -> None:
    offsets = torch.tensor([0, 0, 70, 71, 71, 200], dtype=torch.int32)
    d_rows = torch.randn(230, 150).to(dtype)
    found = bias_gradient(d_rows.to(device), offsets.to(device))
    assert_close("d_bias", found, bias_gradient_torch(d_rows.double(), offsets), 1e-6)
    loop = [sum(d_rows[r, 3].item() for r in range(70, 71)), sum(d_rows[r, 3].item() for r in range(71, 200))]
    assert_close("a column", found[[2, 4], 3], torch.tensor(loop), 1e-5)


def example(device: torch.device, dtype: torch.dtype = WIDE) -> tuple[Plan, list[Tensor]]:
    """A plan and leaves: rows, weights, bias."""
    plan = routing_plan(random_ids(9, 2, 2, 0.2).to(device), 2)
    shapes = ((18, 24), (2, 16, 24), (2, 16))
    return plan, [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]


def test_operator(device: torch.device) -> None:
    plan, (rows, weights, bias) = example(device)
    for transpose, one in ((False, bias), (True, None)):
        matrices = weights.detach().mT.contiguous().requires_grad_() if transpose else weights
        arguments = (rows, matrices, one, list(plan[:-1]), plan.block_m, transpose)
        torch.library.opcheck(torch.ops.moebench.grouped_gemm.default, arguments)
    torch.library.opcheck(torch.ops.moebench.bias_gradient.default, (rows.detach(), plan.offsets))


def test_compiles_whole(device: torch.device) -> None:
    plan, tensors = example(device)

    def loss(rows: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
        return grouped_gemm(rows, weights, plan, bias=bias).square().sum()

    eager = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    for name, found, wanted in zip(("d_rows", "d_weights", "d_bias"), compiled, eager, strict=True):
        assert_close(name, found, wanted, 1e-6)


def test_second_derivatives(device: torch.device) -> None:
    """d_rows is a grouped GEMM itself, so differentiable; d_weights is refused, never wrong."""
    plan, (rows, weights, _) = example(device)
    upstream = torch.randn(18, 16, device=device).requires_grad_()
    (d_rows,) = torch.autograd.grad(grouped_gemm(rows, weights, plan), rows, upstream, create_graph=True)
    (back,) = torch.autograd.grad(d_rows.sum(), upstream)
    wanted = grouped_gemm_torch(torch.ones(18, 24), weights.detach().cpu(), plan._replace(offsets=plan.offsets.cpu()))
    assert_close("d_upstream", back, wanted, TOLERANCES[WIDE])
    (d_weights,) = torch.autograd.grad(grouped_gemm(rows, weights, plan), weights, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        d_weights.sum().backward()


@pytest.mark.parametrize(
    ("rows", "weights", "options", "error", "message"),
    [
        ((8, 12), (9, 16, 12), {}, ValueError, r"weights has shape \[9, 16, 12\]; needed: \[8, D_out, D_in\]"),
        ((8, 12), (8, 16, 12), {"transpose": True}, ValueError, r"rows has shape \[8, 12\]; needed: \[8, 16\]"),
        ((7, 12), (8, 16, 12), {}, ValueError, r"rows has shape \[7, 12\]; needed: \[8, 12\]"),
        ((8, 12), (8, 0, 12), {}, ValueError, r"weights has shape \[8, 0, 12\]"),
        (
            (8, 12),
            (8, 16, 12),
            {"bias": torch.zeros(8, 12)},
            ValueError,
            r"bias has shape \[8, 12\]; needed: \[8, 16\]",
        ),
        ((8, 12), (8, 16, 12), {"bias": torch.zeros(8, 16).half()}, TypeError, "bias is float16; allowed: float32"),
        ((8, 12), (8, 16, 12), {"bias": [1.0]}, TypeError, "bias is a list"),
    ],
)
def test_refuses(
    rows: tuple[int, ...], weights: tuple[int, ...], options: dict[str, Any], error: type, message: str,
    device: torch.device,
) -> None:  # fmt: skip
    plan = routing_plan(random_ids(4, 8, 2).to(device), 8)
    with pytest.raises(error, match=message):
        grouped_gemm(torch.zeros(rows, device=device), torch.zeros(weights, device=device), plan, **options)


def test_refuses_strides_dtypes_and_tiles(device: torch.device) -> None:
    plan = routing_plan(random_ids(4, 8, 2).to(device), 8)
    rows, weights = torch.zeros(8, 12, device=device), torch.zeros(8, 16, 12, device=device)
    with pytest.raises(ValueError, match=r"weights has strides .*; it must be contiguous"):
        grouped_gemm(rows, torch.zeros(8, 12, 16, device=device).mT, plan)
    with pytest.raises(TypeError, match="one dtype is needed for all, found: rows float32, weights float16"):
        grouped_gemm(rows, weights.half(), plan)
    with pytest.raises(TypeError, match="weights is float64"):
        grouped_gemm(rows, weights.double(), plan)
    with pytest.raises(
        ValueError, match=r"the plan's block_m is 48; the grouped GEMM has tiles for \(16, 32, 64, 128\)"
    ):
        grouped_gemm(rows, weights, plan._replace(block_m=48))


LARGE = (4096, 8, 2, 1024, 1536)


def large(device: torch.device, dtype: torch.dtype = BRAIN) -> tuple[Plan, Tensor, Tensor]:
    """A plan, rows and weights of a size at which races would show."""
    T, E, K, n_in, n_out = LARGE
    plan = routing_plan(random_ids(T, E, K, 0.1).to(device), E)
    rows = torch.randn(T * K, n_in, device=device, dtype=dtype)
    return plan, rows, torch.randn(E, n_out, n_in, device=device, dtype=dtype) * n_in**-0.5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BRAIN, HALF, WIDE])
def test_large_on_a_gpu(dtype: torch.dtype, device: torch.device) -> None:
    plan, rows, weights = large(device, dtype)
    wanted = grouped_gemm_torch(rows.double(), weights.double(), plan)
    assert_close("out", grouped_gemm(rows, weights, plan), wanted, TOLERANCES[dtype])
    turned = grouped_gemm(rows, weights.mT.contiguous(), plan, transpose=True)
    assert_close("transposed", turned, wanted, TOLERANCES[dtype])


@pytest.mark.gpu
def test_the_same_bits_every_time(device: torch.device) -> None:
    plan, rows, weights = large(device)
    first = grouped_gemm(rows, weights, plan)
    assert all(torch.equal(first, grouped_gemm(rows, weights, plan)) for _ in range(20))


@pytest.mark.gpu
def test_captured_in_a_graph(device: torch.device) -> None:
    """A replay takes new rows and a new routing: nothing was asked of the device while capturing."""
    plan, rows, weights = large(device)
    grouped_gemm(rows, weights, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = grouped_gemm(rows, weights, plan)
    T, E, K, *_ = LARGE
    other = routing_plan(random_ids(T, E, K, 0.5).to(device), E)
    for mine, new in zip(plan[:-1], other[:-1], strict=True):
        mine.copy_(new)
    rows.normal_()
    graph.replay()
    assert torch.equal(out, grouped_gemm(rows, weights, other))
