"""The decode path: both forms against a float64 reference, which is itself held against Python loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_loops import TOLERANCES, assert_close, moe, random_ids
from torch import Tensor

from moebench_kernels import ACTIVATIONS
from moebench_kernels.decode import decode_form, decode_layer, decode_layer_torch
from moebench_kernels.decode_gemm import (
    CONFIGS,
    _decode_plan_kernel,
    rows_per_tile,
    splits_of,
    swap_config,
    tile_bound,
)
from moebench_kernels.decode_gemv import ENOUGH, gemv_config

HALF, WIDE, BRAIN = torch.float16, torch.float32, torch.bfloat16
# T, E, K, D, F, activation, share dropped, biases, dtype, form (None: as decode_form has it)
CASES = [
    (0, 8, 2, 17, 40, "swiglu", 0.0, False, WIDE, None),
    (1, 1, 1, 1, 1, "swiglu", 0.0, False, WIDE, "gemv"),
    (1, 1, 1, 1, 1, "geglu", 0.0, True, WIDE, "swap_ab"),
    (1, 8, 8, 48, 17, "geglu", 0.0, True, HALF, None),
    (3, 257, 3, 40, 24, "clamped_swiglu", 0.0, True, HALF, "gemv"),
    (3, 257, 2, 40, 24, "clamped_swiglu", 0.2, False, HALF, "swap_ab"),
    (4, 60, 16, 24, 17, "swiglu", 0.1, True, WIDE, None),
    (4, 2, 2, 64, 17, "relu", 0.0, True, BRAIN, "gemv"),
    (3, 160, 5, 32, 17, "swiglu", 0.0, False, HALF, "swap_ab"),
    (5, 64, 16, 17, 24, "gelu", 0.5, True, WIDE, "swap_ab"),
    (16, 8, 2, 64, 96, "swiglu", 0.0, True, BRAIN, None),
    (3, 2, 4, 40, 270, "silu", 0.3, True, WIDE, "gemv"),  # two steps through F
    (33, 60, 1, 24, 17, "clamped_swiglu", 0.1, True, WIDE, None),
    (33, 1, 1, 128, 300, "swiglu", 0.0, False, HALF, None),
    (16, 1, 1, 24, 304, "swiglu", 0.2, True, HALF, None),  # so few tiles that the sum is split
    (127, 8, 6, 48, 48, "gelu", 0.1, False, WIDE, None),
    (128, 2, 2, 80, 40, "swiglu", 0.0, True, HALF, None),
    (129, 8, 7, 33, 16, "geglu", 0.1, True, HALF, None),
]


def gated(activation: str) -> int:
    """Maps of an expert's first matrix."""
    return 2 if activation in ("swiglu", "geglu", "clamped_swiglu") else 1


def tensors(E: int, D: int, F: int, T: int, K: int, activation: str, biases: bool) -> dict[str, Tensor | None]:
    """Everything but the ids, in float32. Scaled up, so that gpt-oss's clamps at 7 cut here and there."""
    m = gated(activation)
    return {
        "x": 3 * torch.randn(T, D),
        "weights": torch.rand(T, K),
        "w_gate_up": torch.randn(E, m * F, D) * D**-0.5,
        "w_down": torch.randn(E, D, F) * F**-0.5,
        "b_gate_up": torch.randn(E, m * F) if biases else None,
        "b_down": torch.randn(E, D) if biases else None,
    }


def cast(values: dict[str, Tensor | None], dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor | None]:
    """All but the router weights and the biases in `dtype`; all of them in float64."""
    keep = {"weights", "b_gate_up", "b_down"} if dtype != torch.float64 else set()
    return {
        name: None if value is None else value.to(device, value.dtype if name in keep else dtype)
        for name, value in values.items()
    }


def check(
    ids: Tensor, values: dict[str, Tensor | None], activation: str, dtype: torch.dtype, device: torch.device,
    form: str | None = None,
) -> Tensor:  # fmt: skip
    rounded = cast(values, dtype, "cpu")
    y = decode_layer(ids=ids.to(device), **cast(rounded, dtype, device), activation=activation, form=form)
    wanted = decode_layer_torch(ids=ids, **cast(rounded, torch.float64, "cpu"), activation=activation)
    assert y.dtype == dtype
    assert_close("y", y, wanted, TOLERANCES[dtype])
    return y


@pytest.mark.parametrize(("T", "E", "K", "D", "F", "activation", "dropped", "biases", "dtype", "form"), CASES)
def test_decode(
    T: int, E: int, K: int, D: int, F: int, activation: str, dropped: float, biases: bool, dtype: torch.dtype,
    form: str | None, device: torch.device,
) -> None:  # fmt: skip
    ids = random_ids(T, E, min(K, E), dropped)
    check(ids, tensors(E, D, F, T, min(K, E), activation, biases), activation, dtype, device, form)


SHAPES = itertools.product(
    (0, 1, 3, 4, 5, 16, 33, 127, 128, 129), (1, 2, 8, 60, 64, 160, 257), (*range(1, 9), 16), ("gemv", "swap_ab")
)


@pytest.mark.full
@pytest.mark.parametrize(("T", "E", "K", "form"), [shape for shape in SHAPES if shape[2] <= shape[1]])
def test_every_shape(T: int, E: int, K: int, form: str, device: torch.device) -> None:
    activation = ACTIVATIONS[(T + E + K) % len(ACTIVATIONS)]
    dtype = (WIDE, HALF, BRAIN)[(T + K) % 3]
    values = tensors(E, 40, 33, T, K, activation, E % 2 == 0)
    check(random_ids(T, E, K, 0.1 * (K % 2)), values, activation, dtype, device, form)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_equals_loop(activation: str) -> None:
    ids, values = random_ids(9, 5, 3, 0.3), cast(tensors(5, 7, 6, 9, 3, activation, False), torch.float64, "cpu")
    found = decode_layer_torch(ids=ids, **values, activation=activation)
    inputs = [values[name] for name in ("x", "weights", "w_gate_up", "w_down")]
    assert_close("reference", found, moe(inputs[0], ids, *inputs[1:], activation), 1e-12)


@pytest.mark.parametrize("activation", ["clamped_swiglu", "gelu"])
def test_reference_adds_biases_where_the_equation_has_them(activation: str) -> None:
    """A constant input of 1 with its own column of weights is a bias."""
    ids, values = random_ids(9, 5, 3, 0.3), cast(tensors(5, 7, 6, 9, 3, activation, True), torch.float64, "cpu")
    x = torch.cat([values["x"], torch.ones(9, 1, dtype=torch.float64)], dim=1)
    w_gate_up = torch.cat([values["w_gate_up"], values["b_gate_up"][:, :, None]], dim=2)
    w_down = torch.cat([values["w_down"], torch.zeros(5, 1, 6, dtype=torch.float64)], dim=1)
    plain = moe(x, ids, values["weights"], w_gate_up, w_down, activation)[:, :7]
    for t, k in itertools.product(range(9), range(3)):
        if 0 <= ids[t, k] < 5:
            plain[t] += values["weights"][t, k] * values["b_down"][ids[t, k]]
    assert_close("y", decode_layer_torch(ids=ids, **values, activation=activation), plain, 1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_both_forms_agree(activation: str, device: torch.device) -> None:
    ids, values = random_ids(5, 6, 3, 0.2).to(device), cast(tensors(6, 40, 24, 5, 3, activation, True), WIDE, device)
    one, other = (decode_layer(ids=ids, **values, activation=activation, form=form) for form in ("gemv", "swap_ab"))
    assert_close("y", one, other, 2e-6)


@pytest.mark.parametrize("form", ["gemv", "swap_ab"])
def test_all_dropped_and_all_on_one_expert(form: str, device: torch.device) -> None:
    values = tensors(3, 24, 40, 33, 2, "swiglu", True)
    none = torch.tensor([-1, 3]).repeat(33, 1)
    assert (check(none, values, "swiglu", WIDE, device, form) == 0).all()
    check(torch.full((33, 2), 2), values, "swiglu", WIDE, device, form)  # 66 assignments, two tiles of one expert


@pytest.mark.parametrize("form", ["gemv", "swap_ab"])
def test_int64_ids_that_would_wrap_are_dropped(form: str, device: torch.device) -> None:
    values = cast(tensors(3, 16, 16, 5, 1, "silu", False), WIDE, device)
    y = decode_layer(
        ids=torch.tensor([[2**32], [1], [-(2**32)], [2**31], [2**40 + 1]], device=device), **values,
        activation="silu", form=form,
    )  # fmt: skip
    assert (y[[0, 2, 3, 4]] == 0).all()
    assert (y[1] != 0).all()


@pytest.mark.parametrize("form", ["gemv", "swap_ab"])
def test_weights_of_dropped_assignments_are_not_read(form: str, device: torch.device) -> None:
    values = cast(tensors(3, 16, 16, 5, 2, "silu", False), WIDE, device)
    ids = torch.tensor([[0, -1], [1, 2], [-1, -1], [7, 0], [2, 0]], device=device)
    values["weights"][(ids < 0) | (ids > 2)] = float("nan")
    y = decode_layer(ids=ids, **values, activation="silu", form=form)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("form", ["gemv", "swap_ab"])
@pytest.mark.parametrize("dtype", [WIDE, HALF])
def test_idle_experts_do_not_leak(form: str, dtype: torch.dtype, device: torch.device) -> None:
    """NaN in experts that nobody chose, the first and a neighbour among them: read by no product, or not stored."""
    values = cast(tensors(5, 40, 48, 5, 2, "swiglu", True), dtype, device)
    ids = torch.tensor([[1, -1], [3, 1], [-1, -1], [9, 3], [3, 1]], device=device)
    for name in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
        values[name][[0, 2, 4]] = float("nan")
    assert torch.isfinite(decode_layer(ids=ids, **values, form=form)).all()


@pytest.mark.parametrize("form", ["gemv", "swap_ab"])
@pytest.mark.parametrize("dtype", [WIDE, HALF])
def test_views_strides_and_repetition(form: str, dtype: torch.dtype, device: torch.device) -> None:
    """Unaligned contiguous views and strided ids give the answer of their copies, and the same bits again."""
    ids = random_ids(6, 4, 4).to(device)
    values = cast(tensors(4, 33, 40, 6, 2, "swiglu", False), dtype, device)
    copies = {name: value for name, value in values.items() if value is not None}
    first = decode_layer(ids=ids[:, ::2].contiguous(), **copies, form=form)
    again = decode_layer(ids=ids[:, ::2].contiguous(), **copies, form=form)
    assert torch.equal(first, again)
    for name in ("x", "w_gate_up", "w_down"):
        value = copies[name]
        copies[name] = torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape)
    copies["weights"] = torch.stack([copies["weights"]] * 2, dim=2)[:, :, 1]
    viewed = decode_layer(ids=ids[:, ::2], **copies, form=form)
    assert torch.equal(first, viewed)


@pytest.mark.parametrize(("T", "E", "K"), [(1, 1, 1), (3, 5, 2), (33, 8, 4), (128, 3, 1), (100, 40, 16), (129, 257, 8)])
def test_plan(T: int, E: int, K: int, device: torch.device) -> None:
    """Each kept assignment stands in one tile of its expert, in rising order; tiles are no more than needed."""
    ids = random_ids(T, max(E, K), K, 0.3).to(device)
    n, block_m = T * K, rows_per_tile(T * K, E, HALF)
    bound = tile_bound(n, E, block_m)
    plan = torch.full((bound * (block_m + 1) + 1,), -7, dtype=torch.int32, device=device)
    block_a = max(16, 1 << (n - 1).bit_length())
    _decode_plan_kernel[(E,)](
        ids, plan, n, *ids.stride(), E, bound, TOP_K=K, BLOCK_M=block_m, BLOCK_A=block_a,
        BLOCK_E=512, BLOCK_T=max(1, block_a // block_m),
    )  # fmt: skip
    plan, flat = plan.cpu(), ids.flatten().cpu()
    rows, experts, n_tiles = plan[: bound * block_m].view(bound, block_m), plan[bound * block_m : -1], int(plan[-1])
    found = {e: rows[:n_tiles][experts[:n_tiles] == e].flatten().tolist() for e in range(E)}
    for e in range(E):
        wanted = (flat == e).nonzero().flatten().tolist()
        assert found[e] == wanted + [-1] * (-len(wanted) % block_m)
    assert experts[:n_tiles].tolist() == sorted(experts[:n_tiles].tolist())
    assert sum(len(row) for row in found.values()) == n_tiles * block_m


def test_decode_form() -> None:
    assert decode_form(1, 2, 8) == decode_form(1, 8, 64) == decode_form(1, 1, 1) == "gemv"
    assert decode_form(2, 2, 8) == decode_form(4, 8, 64) == decode_form(4, 8, 256) == "gemv"
    assert decode_form(3, 2, 8) == decode_form(2, 1, 1) == decode_form(5, 8, 256) == "swap_ab"
    assert decode_form(128, 8, 64) == "swap_ab"
    assert decode_form(129, 8, 64) is None


def test_tiles_are_chosen_by_load() -> None:
    assert [rows_per_tile(T * 8, 64, BRAIN) for T in (5, 64, 128)] == [16, 16, 32]
    assert [rows_per_tile(T * 2, 8, BRAIN) for T in (16, 64, 128)] == [16, 32, 64]
    assert rows_per_tile(128, 1, BRAIN) == 128
    assert rows_per_tile(128, 1, WIDE) == 64
    assert tile_bound(128, 1, 128) == 1
    assert tile_bound(16, 8, 16) == 8
    assert tile_bound(1024, 64, 32) == 64 + 30
    assert splits_of(1, 64, 264) == 8
    assert splits_of(100, 64, 264) == 2
    assert splits_of(264, 64, 264) == splits_of(1000, 64, 264) == splits_of(1, 3, 264) == 1


def test_the_vector_form_has_enough_programs() -> None:
    """For one token of every shape that fits its weights' rows into at least as many programs."""
    for family, enough in ENOUGH.items():
        for outputs, copies, K in ((2048, 1, 1024), (4096, 1, 14336), (768, 8, 2048), (2880, 4, 2880)):
            c = gemv_config(outputs, copies, K, 2, False, family)
            assert -(-outputs // c.block_n) * copies >= min(enough, outputs * copies)
            assert c.block_n * c.block_k * 2 <= 8192
            assert c.num_stages >= 3


def test_every_family_has_every_tile() -> None:
    assert {"sm_80", "sm_90", "sm_100", "gfx942", "gfx950"} <= set(CONFIGS)
    for family, down, block_m in itertools.product(CONFIGS, (False, True), (16, 32, 64)):
        for dtype in (BRAIN, WIDE):
            assert swap_config(family, down, block_m, dtype).block_n % 32 == 0
    # WGMMA takes 64 rows for each group of four warps
    for c in (*CONFIGS["sm_90"][0].values(), *CONFIGS["sm_90"][1].values()):
        assert c.block_n % (16 * c.num_warps) == 0


@pytest.mark.parametrize("form", ["gemv", "swap_ab"])
def test_operator(form: str, device: torch.device) -> None:
    values = cast(tensors(3, 16, 16, 5, 2, "swiglu", True), WIDE, device)
    order = ("weights", "w_gate_up", "w_down", "b_gate_up", "b_down")
    arguments = (values["x"], random_ids(5, 3, 2).to(device), *(values[name] for name in order), "swiglu", form)
    torch.library.opcheck(torch.ops.moebench.decode_layer.default, arguments)


def test_compiles_whole(device: torch.device) -> None:
    values = cast(tensors(4, 16, 24, 3, 2, "swiglu", True), WIDE, device)
    compiled = torch.compile(decode_layer, fullgraph=True, backend="aot_eager")
    for T in (3, 7):  # both forms, and a shape that was not there while compiling
        ids = random_ids(T, 4, 2).to(device)
        inputs = values | {"x": torch.randn(T, 16, device=device), "weights": torch.rand(T, 2, device=device)}
        assert torch.equal(compiled(ids=ids, **inputs), decode_layer(ids=ids, **inputs))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("x", torch.zeros(4, 15), ValueError, r"w_gate_up has shape \[8, 24, 16\]; needed: \[E, 2F, 15\]"),
        ("x", torch.zeros(4, 16).half(), TypeError, "one dtype is needed for all, found: x float16, w_gate_up float32"),
        ("x", torch.zeros(4, 16).requires_grad_(), ValueError, "decode_layer has no backward"),
        ("ids", torch.zeros(4, 2), TypeError, "ids is float32; allowed: int32, int64"),
        ("ids", torch.zeros(4, 2049).int(), ValueError, "ids has 2049 experts a token; at most 2048"),
        ("weights", torch.zeros(4, 3), ValueError, r"weights has shape \[4, 3\]; needed: \[4, 2\]"),
        ("w_gate_up", torch.zeros(8, 25, 16), ValueError, "w_gate_up has 25 rows an expert; swiglu needs an even"),
        ("w_down", torch.zeros(8, 12, 16).mT, ValueError, "w_down has strides"),
        ("b_gate_up", torch.zeros(8, 12), ValueError, r"b_gate_up has shape \[8, 12\]; needed: \[8, 24\]"),
        ("b_down", torch.zeros(8, 16).half(), TypeError, "b_down is float16; allowed: float32, float32"),
        ("activation", "tanh", ValueError, "activation is 'tanh'; allowed: swiglu"),
        ("form", "gemm", ValueError, "form is 'gemm'; allowed: gemv, swap_ab"),
    ],
)  # fmt: skip
def test_decode_refuses(name: str, value: object, error: type, message: str, device: torch.device) -> None:
    good = {
        "x": torch.zeros(4, 16), "ids": torch.zeros(4, 2, dtype=torch.int64), "weights": torch.zeros(4, 2),
        "w_gate_up": torch.zeros(8, 24, 16), "w_down": torch.zeros(8, 16, 12),
    }  # fmt: skip
    arguments = {
        key: given.to(device) if isinstance(given, Tensor) else given for key, given in (good | {name: value}).items()
    }
    with pytest.raises(error, match=message):
        decode_layer(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 4, 16, 128])
def test_decode_bf16_and_cuda_graph(T: int, device: torch.device) -> None:
    """Shipped tiles in the dtype the interpreter cannot round; a captured graph takes new routing as it comes."""
    values = tensors(64, 1024, 768, T, 8, "swiglu", True)
    given, ids = cast(values, BRAIN, device), random_ids(T, 64, 8).to(device)
    first = check(ids.cpu(), values, "swiglu", BRAIN, device)
    runs = [decode_layer(ids=ids, **given) for _ in range(20)]
    assert all(torch.equal(first, run) for run in runs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode_layer(ids=ids, **given)
    ids.copy_(random_ids(T, 64, 8, 0.3))
    graph.replay()
    assert torch.equal(captured, decode_layer(ids=ids, **given))
