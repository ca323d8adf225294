"""up_projection and down_projection, forward and backward, against their references in float64; the activations."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from kernel_loops import SCALARS, TOLERANCES, assert_close, cheap_cover, clamped, expert, leaf, matvec, random_ids
from torch import Tensor

from moebench_kernels import (
    ACTIVATIONS,
    Plan,
    down_projection,
    down_projection_torch,
    permute_torch,
    routing_plan,
    routing_plan_torch,
    up_projection,
    up_projection_torch,
)
from moebench_kernels.activation import activate_torch, input_maps
from moebench_kernels.tiles import tile_rows

HALF, BRAIN, WIDE = torch.float16, torch.bfloat16, torch.float32
FACTORS: dict[str, tuple[Any, ...]] = {
    "T": (0, 1, 3, 33, 127, 128, 129, 500),
    "E": (1, 2, 8, 60, 64, 160, 257),
    "K": (1, 2, 3, 4, 5, 6, 7, 8, 16),
    "D": (17, 40, 48, 96, 130),
    "F": (17, 40, 48, 96, 130),
    "activation": ACTIVATIONS,
    "dtype": (WIDE, HALF, BRAIN),
    "bias": (None, "same", "float32"),
    "permuted": (False, True),
    "dropped": (0.0, 0.3, 1.0),
}
BUSY = 3  # experts with tokens in the cover, of however many


def row_tiles(case: dict[str, Any]) -> float:
    """What a case costs the interpreter."""
    rows = case["T"] * case["K"]
    return 32 + rows / tile_rows(rows / case["E"])


CASES = cheap_cover(FACTORS, row_tiles)
# T, E, K, D, F, dropped, dtype; with every activation, and every other one with the other form of x and of the bias.
GRADIENTS = [
    (0, 5, 2, 17, 40, 0.0, WIDE),
    (33, 5, 4, 48, 17, 0.3, WIDE),
    (9, 8, 2, 17, 40, 0.2, HALF),
    (70, 2, 1, 40, 70, 0.0, BRAIN),
]
SWEEP = [(*case, kind, (i + j) % 2 == 0) for i, case in enumerate(GRADIENTS) for j, kind in enumerate(ACTIVATIONS)]


def label(case: dict[str, Any]) -> str:
    """A case in a few letters."""
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


def few_ids(T: int, E: int, K: int, dropped: float) -> Tensor:
    """int32 [T, K] of BUSY of the E experts, drawn with repetition."""
    busy = torch.randperm(E)[:BUSY].int()
    return busy[torch.randint(len(busy), (T, K))].masked_fill(torch.rand(T, K) < dropped, -1)


def plan_on(ids: Tensor, E: int, device: torch.device) -> tuple[Plan, Plan]:
    """The plan there and here."""
    here = routing_plan_torch(ids, E)
    return Plan(*(tensor.to(device) for tensor in here[:-1]), here.block_m), here


def up_operands(T: int, E: int, D: int, F: int, activation: str, size: float = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    """x, w_gate_up, bias; of a size at which the clamps of clamped_swiglu cut, unless a smaller one is asked for."""
    m = input_maps(activation)
    size = size if activation == "clamped_swiglu" else 1.0
    return size * torch.randn(T, D), torch.randn(E, m * F, D) * D**-0.5, torch.randn(E, m * F)


def check_forward(case: dict[str, Any], device: torch.device) -> None:
    """The up-projection on one case of FACTORS."""
    T, E, K, D, F, activation, dtype = (case[name] for name in ("T", "E", "K", "D", "F", "activation", "dtype"))
    plan, reference = plan_on(few_ids(T, E, K, case["dropped"]), E, device)
    x, w_gate_up, bias = up_operands(T, E, D, F, activation)
    x = permute_torch(x, reference) if case["permuted"] else x
    mine = [x.to(device, dtype), w_gate_up.to(device, dtype)]
    mine.append(None if case["bias"] is None else bias.to(device, dtype if case["bias"] == "same" else WIDE))
    exact = [None if tensor is None else tensor.cpu().double() for tensor in mine]
    options = {"activation": activation, "permuted": case["permuted"]}
    hidden = up_projection(*mine[:2], plan, bias=mine[2], **options)
    wanted = up_projection_torch(*exact[:2], reference, bias=exact[2], **options)
    assert hidden.dtype == dtype
    assert_close("hidden", hidden, wanted, TOLERANCES[dtype])


@pytest.mark.parametrize("case", CASES, ids=label)
def test_forward(case: dict[str, Any], device: torch.device) -> None:
    check_forward(case, device)


def test_the_cover_is_pairwise() -> None:
    for a, b in itertools.combinations(FACTORS, 2):
        assert {(case[a], case[b]) for case in CASES} == set(itertools.product(FACTORS[a], FACTORS[b]))


@pytest.mark.full
@pytest.mark.parametrize("T", FACTORS["T"])
@pytest.mark.parametrize("E", FACTORS["E"])
def test_forward_in_full(T: int, E: int, device: torch.device) -> None:
    """The product of T, E, K, activation and dtype; the other factors take turns. One test for each T and E."""
    inner = ("K", "activation", "dtype")
    turns = {name: itertools.cycle(FACTORS[name]) for name in ("D", "F", "bias", "permuted", "dropped")}
    for n, values in enumerate(itertools.product(*(FACTORS[name] for name in inner))):
        if n % 5 == 0:
            next(turns["F"])  # so that every two sizes meet
        others = {name: next(turn) for name, turn in turns.items()}
        check_forward({"T": T, "E": E, **dict(zip(inner, values, strict=True)), **others}, device)


@pytest.mark.parametrize(("T", "E", "K", "D", "F", "dropped", "dtype", "activation", "other"), SWEEP)
def test_up_projection_gradients(
    T: int, E: int, K: int, D: int, F: int, dropped: float, dtype: torch.dtype, activation: str, other: bool,
    device: torch.device,
) -> None:  # fmt: skip
    plan, reference = plan_on(random_ids(T, E, K, dropped), E, device)
    # Backward reads the pre-activation rounded, so in 16 bits some would lie on the other side of a clamp.
    x, w_gate_up, bias = up_operands(T, E, D, F, activation, 4.0 if dtype == WIDE else 0.5)
    upstream, bias_dtype = torch.randn(T * K, F), dtype if other else WIDE
    x = permute_torch(x, reference) if other else x
    mine = [leaf(x, dtype, device), leaf(w_gate_up, dtype, device), leaf(bias, bias_dtype, device)]
    exact = [leaf(tensor.detach().cpu(), torch.float64) for tensor in mine]
    options = {"activation": activation, "permuted": other}
    hidden = up_projection(*mine[:2], plan, bias=mine[2], **options)
    wanted = up_projection_torch(*exact[:2], reference, bias=exact[2], **options)
    assert_close("hidden", hidden, wanted, TOLERANCES[dtype])
    hidden.backward(upstream.to(device, dtype))
    wanted.backward(upstream.to(dtype).double())
    for name, found, want in zip(("dx", "d_w_gate_up", "d_bias"), mine, exact, strict=True):
        assert found.grad.dtype == found.dtype
        assert_close(name, found.grad, want.grad, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [WIDE, HALF, BRAIN])
def test_down_projection(dtype: torch.dtype, device: torch.device) -> None:
    plan, reference = plan_on(random_ids(33, 5, 2, 0.2), 5, device)
    mine = [leaf(torch.randn(shape), dtype, device) for shape in ((66, 40), (5, 17, 40), (5, 17))]
    exact = [leaf(tensor.detach().cpu(), torch.float64) for tensor in mine]
    found = down_projection(*mine[:2], plan, bias=mine[2])
    wanted = down_projection_torch(*exact[:2], reference, bias=exact[2])
    assert_close("rows", found, wanted, TOLERANCES[dtype])
    upstream = torch.randn(66, 17).to(dtype)
    found.backward(upstream.to(device))
    wanted.backward(upstream.double())
    for name, mine_one, exact_one in zip(("d_hidden", "d_w_down", "d_b_down"), mine, exact, strict=True):
        assert_close(name, mine_one.grad, exact_one.grad, TOLERANCES[dtype])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_references_equal_loops(activation: str) -> None:
    plan = routing_plan_torch(random_ids(5, 3, 2, 0.3), 3)
    x, w_gate_up, bias = (tensor.double() for tensor in up_operands(5, 3, 7, 4, activation))
    w_down, down_bias = torch.randn(3, 7, 4).double(), torch.randn(3, 7).double()
    hidden = up_projection_torch(x, w_gate_up, plan, activation=activation, bias=bias)
    rows = down_projection_torch(hidden, w_down, plan, bias=down_bias)
    for r, (e, t) in enumerate(zip(plan.row2expert.tolist(), plan.row2token.tolist(), strict=True)):
        loop, down = [0.0] * 4, [0.0] * 7
        if e >= 0:
            # The bias as one more column, of an input that is 1.
            widened = torch.cat([w_gate_up[e], bias[e][:, None]], dim=1).tolist()
            loop = expert([*x[t].tolist(), 1.0], widened, activation)
            down = [y + b for y, b in zip(matvec(w_down[e].tolist(), loop), down_bias[e].tolist(), strict=True)]
        assert_close("hidden", hidden[r], torch.tensor(loop, dtype=torch.float64), 1e-12)
        assert_close("rows", rows[r], torch.tensor(down, dtype=torch.float64), 1e-12)


def test_activation_at_far_inputs() -> None:
    """The loops' own scalars agree with the reference where exp and erf saturate and where clamps cut."""
    z = torch.tensor([-30.0, -7.5, -7.0, -1.0, 0.0, 1.0, 7.0, 7.5, 30.0], dtype=torch.float64)
    for kind, scalar in SCALARS.items():
        wanted = torch.tensor([scalar(value) for value in z.tolist()], dtype=torch.float64)
        assert torch.allclose(activate_torch(z, kind), wanted, atol=1e-14)
    gate, up = (part.flatten() for part in torch.meshgrid(z, z, indexing="ij"))
    wanted = torch.tensor([clamped(g, u) for g, u in zip(gate.tolist(), up.tolist(), strict=True)])
    assert torch.allclose(activate_torch(torch.cat([gate, up]), "clamped_swiglu"), wanted.double(), atol=1e-6)


def one_expert(activation: str, z: list[list[float]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Hidden rows and d hidden / d z (both maps in a row) where x = 1 and the bias is z: the activation itself."""
    bias = torch.tensor(z, device=device).requires_grad_()
    hidden = []
    for row in bias:  # one token on one expert each
        plan = routing_plan(torch.zeros(1, 1, dtype=torch.int32, device=device), 1)
        x = torch.ones(1, 1, device=device)
        weights = torch.zeros(1, row.numel(), 1, device=device)
        hidden.append(up_projection(x, weights, plan, activation=activation, bias=row[None]))
    torch.cat(hidden).sum().backward()
    return torch.cat(hidden).detach().cpu(), bias.grad.cpu()


def test_the_clamps_edges_are_torchs(device: torch.device) -> None:
    """Zero gradient beyond a clamp, and at it torch's: of (gate, up), on and around the limits."""
    z = [[7.0, 1.0], [7.01, 1.0], [1.0, 7.0], [1.0, 7.01], [1.0, -7.0], [1.0, -7.01], [-9.0, 0.5]]
    found, slope = one_expert("clamped_swiglu", z, device)
    exact = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    wanted = activate_torch(exact, "clamped_swiglu")
    wanted.sum().backward()
    assert_close("hidden", found, wanted, 1e-6)
    assert_close("slope", slope, exact.grad, 1e-6)
    assert slope[1, 0] == 0
    assert slope[3, 1] == slope[5, 1] == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saturates_without_nan_and_keeps_one(activation: str, device: torch.device) -> None:
    m = input_maps(activation)
    far, slope = one_expert(activation, [[200.0] * m, [-200.0] * m], device)
    assert torch.isfinite(far).all()
    assert torch.isfinite(slope).all()
    broken, _ = one_expert(activation, [[float("nan")] * m], device)
    assert torch.isnan(broken).all(), "a NaN has vanished"


def test_no_gradient_keeps_nothing(device: torch.device) -> None:
    """Without a gradient the pre-activation is not even stored."""
    plan = routing_plan(random_ids(4, 2, 1).to(device), 2)
    x, w = torch.randn(4, 8, device=device), torch.randn(2, 8, 8, device=device).requires_grad_()
    with torch.no_grad():
        assert up_projection(x, w, plan).grad_fn is None
    assert up_projection(x, w, plan).grad_fn is not None
    arguments = (x, w.detach(), None, list(plan[:-1]), plan.block_m, "silu", False)
    assert [torch.ops.moebench.up_projection(*arguments, keep)[1].numel() for keep in (False, True)] == [0, 4 * 8]


def test_second_derivatives_are_refused(device: torch.device) -> None:
    plan = routing_plan(random_ids(4, 2, 1).to(device), 2)
    x, w = torch.randn(4, 8, device=device).requires_grad_(), torch.randn(2, 8, 8, device=device)
    (dx,) = torch.autograd.grad(up_projection(x, w, plan).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()


def example(device: torch.device) -> tuple[Plan, list[Tensor]]:
    """A plan and leaves: x, w_gate_up, bias."""
    plan = routing_plan(random_ids(5, 2, 2, 0.2).to(device), 2)
    return plan, [torch.randn(shape, device=device).requires_grad_() for shape in ((5, 12), (2, 16, 12), (2, 16))]


def test_operators(device: torch.device) -> None:
    plan, (x, w_gate_up, bias) = example(device)
    rest = (list(plan[:-1]), plan.block_m, "swiglu", False)
    torch.library.opcheck(torch.ops.moebench.up_projection.default, (x, w_gate_up, bias, *rest, True))
    d_hidden, z = torch.randn(10, 8, device=device), torch.randn(10, 16, device=device)
    arguments = (d_hidden, z, x.detach(), w_gate_up.detach(), *rest)
    for wanted in ((True, True, True), (False, False, False)):
        torch.library.opcheck(
            torch.ops.moebench.up_projection_backward.default, (*arguments, *wanted),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


def test_compiles_whole(device: torch.device) -> None:
    plan, tensors = example(device)
    w_down = torch.randn(2, 12, 8, device=device)

    def loss(x: Tensor, w_gate_up: Tensor, bias: Tensor) -> Tensor:
        hidden = up_projection(x, w_gate_up, plan, activation="clamped_swiglu", bias=bias)
        return down_projection(hidden, w_down, plan).square().sum()

    eager = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    for name, found, wanted in zip(("dx", "d_w_gate_up", "d_bias"), compiled, eager, strict=True):
        assert_close(name, found, wanted, 1e-6)


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "error", "message"),
    [
        ((8, 24, 15), WIDE, {}, ValueError, r"w_gate_up has shape \[8, 24, 15\]; needed: \[8, 2F, 16\]"),
        ((7, 24, 16), WIDE, {}, ValueError, r"needed: \[8, 2F, 16\]"),
        ((8, 23, 16), WIDE, {}, ValueError, "w_gate_up has 23 rows an expert; swiglu needs an even number"),
        ((8, 24, 16), HALF, {}, TypeError, "one dtype is needed for all, found: x float32, w_gate_up float16"),
        (
            (8, 24, 16),
            WIDE,
            {"activation": "tanh"},
            ValueError,
            "activation is 'tanh'; allowed: swiglu, geglu, clamped",
        ),
        ((8, 24, 16), WIDE, {"permuted": True}, ValueError, r"x has shape \[4, 16\]; needed: \[8, D\]"),
        ((8, 24, 16), torch.float64, {}, TypeError, "w_gate_up is float64"),
        ((8, 24, 16), WIDE, {"bias": torch.zeros(8, 12)}, ValueError, r"bias has shape \[8, 12\]; needed: \[8, 24\]"),
        ((8, 24, 16), WIDE, {"bias": torch.zeros(8, 24).half()}, TypeError, "bias is float16; allowed: float32"),
    ],
)
def test_up_projection_refuses(
    shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any], error: type, message: str, device: torch.device
) -> None:
    plan = routing_plan(random_ids(4, 8, 2).to(device), 8)
    with pytest.raises(error, match=message):
        up_projection(
            torch.zeros(4, 16, device=device), torch.zeros(shape, dtype=dtype, device=device), plan, **options
        )


def test_down_projection_refuses(device: torch.device) -> None:
    plan = routing_plan(random_ids(4, 8, 2).to(device), 8)
    with pytest.raises(ValueError, match=r"w_down has shape \[8, 16, 11\]; needed: \[8, D, 12\]"):
        down_projection(torch.zeros(8, 12, device=device), torch.zeros(8, 16, 11, device=device), plan)
    with pytest.raises(ValueError, match=r"bias has shape \[8, 12\]; needed: \[8, 16\]"):
        down_projection(
            torch.zeros(8, 12, device=device), torch.zeros(8, 16, 12, device=device), plan, bias=torch.zeros(8, 12)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("T", [64, 4096])
def test_large_on_a_gpu(T: int, activation: str, device: torch.device) -> None:
    E, K, D, F = 16, 4, 1024, 768
    plan = routing_plan(random_ids(T, E, K, 0.1).to(device), E)
    x, w_gate_up, bias = (t.to(device, BRAIN) for t in up_operands(T, E, D, F, activation, 0.5))
    mine = [leaf(t, BRAIN, device) for t in (x, w_gate_up, bias)]
    exact = [leaf(t, torch.float64, device) for t in (x, w_gate_up, bias)]
    hidden = up_projection(*mine[:2], plan, activation=activation, bias=mine[2])
    wanted = up_projection_torch(*exact[:2], plan, activation=activation, bias=exact[2])
    assert_close("hidden", hidden, wanted, TOLERANCES[BRAIN])
    upstream = torch.randn_like(hidden)
    hidden.backward(upstream)
    wanted.backward(upstream.double())
    for name, found, want in zip(("dx", "d_w_gate_up", "d_bias"), mine, exact, strict=True):
        assert_close(name, found.grad, want.grad, TOLERANCES[BRAIN])
