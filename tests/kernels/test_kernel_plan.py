"""routing_plan: bit for bit its reference, which is checked against a loop, on a pairwise cover of shapes and modes."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_loops import cheap_cover, random_ids
from kernel_plan_loops import ALL, assert_is_plan, assert_same, ids_of, kept_by_expert, priorities
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

from moebench_kernels import permute, plan_kernels, routing_plan, routing_plan_torch
from moebench_kernels.plan import Plan
from moebench_kernels.plan_kernels import LargeConfig
from moebench_kernels.runtime import interpreting

FACTORS = {
    "T": (0, 1, 3, 33, 127, 128, 129, 500),
    "E": (1, 2, 8, 60, 64, 160, 257),
    "K": (1, 2, 3, 4, 5, 6, 7, 8, 16),
    "mode": ("all", "capacity", "priority"),
    "dropped": (0.0, 0.3),
    "dtype": (torch.int32, torch.int64),
}


def cost(case: dict) -> float:
    """Seconds in the interpreter, roughly: a program for 32 or 128 assignments, and one an expert for priorities."""
    return 0.05 + case["T"] * case["K"] / 4000 + (case["mode"] == "priority") * case["E"] / 20


CASES = cheap_cover(FACTORS, cost)


def options_of(ids: Tensor, E: int, mode: str) -> dict:
    """Capacity at the mean load, for priorities one deviation above it: some experts have more, some less."""
    if mode == "all":
        return {}
    mean = ids.numel() / E
    if mode == "capacity":
        return {"capacity": max(1, int(mean))}
    return {"capacity": max(1, int(mean + mean**0.5)), "priority": priorities(*ids.shape)}


def check(ids: Tensor, E: int, device: torch.device, **options: object) -> Plan:
    """Kernels against reference, reference against loop."""
    there = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    plan, reference = routing_plan(ids.to(device), E, **there), routing_plan_torch(ids, E, **options)
    assert_is_plan(reference, kept_by_expert(ids, E, **options), *ids.shape)
    assert_same(plan, reference)
    return plan


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_plan(case: dict, device: torch.device) -> None:
    T, E, K = case["T"], case["E"], case["K"]
    ids = ids_of(T, E, K, case["dropped"]).to(case["dtype"])
    plan = check(ids, E, device, **options_of(ids, E, case["mode"]))
    assert (plan.n_tokens, plan.n_experts, plan.top_k, plan.n_rows) == (T, E, K, T * K)


def test_the_cover_is_pairwise() -> None:
    for a, b in itertools.combinations(FACTORS, 2):
        assert {(case[a], case[b]) for case in CASES} == set(itertools.product(FACTORS[a], FACTORS[b]))


@pytest.mark.full
@pytest.mark.parametrize("T", FACTORS["T"])
@pytest.mark.parametrize("E", [*FACTORS["E"], 1024, 1100, 4096])
@pytest.mark.parametrize("K", FACTORS["K"])
@pytest.mark.parametrize("mode", FACTORS["mode"])
def test_plan_on_every_shape(T: int, E: int, K: int, mode: str, device: torch.device) -> None:
    ids = ids_of(T, E, K, 0.1)
    check(ids, E, device, **options_of(ids, E, mode))


# Chunks of several programs, experts counted and chunks scanned in several steps, groups that the experts fill or not.
SHORT = (LargeConfig(256, 16, 8, 2, block_a=64, block_r=32), LargeConfig(128, 4, 16, 1), LargeConfig(512, 64, 32, 4))


@pytest.mark.parametrize("mode", FACTORS["mode"])
@pytest.mark.parametrize(("config", "E"), list(zip(SHORT, (40, 15, 33), strict=True)))
def test_many_steps(
    config: LargeConfig, E: int, mode: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_kernels, "large_config", lambda n, E: config)
    ids = ids_of(261, E, 5, 0.2)
    check(ids, E, device, **options_of(ids, E, mode))


@pytest.mark.parametrize("capacity", [None, 2])
def test_most_experts(capacity: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """4096; on a GPU with the shipped tiles."""
    if interpreting():
        monkeypatch.setattr(plan_kernels, "large_config", lambda n, E: LargeConfig(1024, 1024, 2048, 2))
    check(random_ids(33, 4096, 8, 0.1), 4096, device, capacity=ALL if capacity is None else capacity)


@pytest.mark.parametrize("T", [0, 3, 129])
@pytest.mark.parametrize("mode", FACTORS["mode"])
def test_one_launch_or_three(T: int, mode: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems by the kernels of large ones."""
    ids = ids_of(T, 8, 2, 0.2)
    options = options_of(ids, 8, mode)
    small = check(ids, 8, device, **options)
    monkeypatch.setattr(plan_kernels, "SMALL", -1)
    assert_same(check(ids, 8, device, **options), small)


@pytest.mark.parametrize("T", [65, 1100])
def test_all_on_one_expert(T: int, device: torch.device) -> None:
    plan = check(torch.full((T, 1), 3), 8, device)
    assert plan.counts.tolist() == [0, 0, 0, T, 0, 0, 0, 0]


@pytest.mark.parametrize("T", [65, 1100])
def test_nothing_kept(T: int, device: torch.device) -> None:
    plan = check(torch.full((T, 1), -1), 8, device)
    assert plan.tile_offsets[8] == 0
    assert plan.tile2expert.max() == 8


def test_ids_that_would_wrap_in_32_bits_are_dropped(device: torch.device) -> None:
    check(torch.tensor([[2**32 + 1, 1], [-(2**32) + 1, 0], [2**31 - 1, -(2**31)]]), 2, device)


def test_any_strides(device: torch.device) -> None:
    ids, priority = ids_of(12, 5, 7).to(device), priorities(7, 12).to(device).T
    views = (ids[:, ::2], ids.T.contiguous().T[:, :3], ids[:, 1:].flip(0), ids[:1].expand(12, 7))
    for view in views:
        assert_same(routing_plan(view, 5), routing_plan_torch(view.cpu().clone(), 5))
    found = routing_plan(ids, 5, capacity=9, priority=priority)
    assert_same(found, routing_plan_torch(ids.cpu(), 5, capacity=9, priority=priority.cpu().clone()))


def test_row_maps(device: torch.device) -> None:
    ids = random_ids(33, 5, 4, 0.3)
    plan = routing_plan(ids.to(device), 5)
    flat, kept = ids.flatten().tolist(), int(plan.offsets[-1])
    assignments = plan.row2assignment.tolist()
    assert plan.row2token.tolist() == [a // 4 for a in assignments[:kept]] + [-1] * (132 - kept)
    assert plan.row2expert.tolist() == [flat[a] for a in assignments[:kept]] + [-1] * (132 - kept)


@pytest.mark.parametrize("capacity", [None, 3])
@pytest.mark.parametrize("T", [5, 0])
def test_operator(T: int, capacity: int | None, device: torch.device) -> None:
    priority = None if capacity is None else torch.rand(T, 2, device=device)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (ids_of(T, 4, 2, 0.2).to(device), 4, 16, capacity, priority)
    torch.library.opcheck(torch.ops.moebench.routing_plan.default, arguments, test_utils=tests)


@pytest.mark.parametrize(
    ("ids", "E", "error", "message"),
    [
        (torch.zeros(4, 2), 8, TypeError, "ids is float32; allowed: int32, int64"),
        (torch.zeros(4, dtype=torch.int64), 8, ValueError, r"ids has shape \[4\]; needed: \[T, K\]"),
        (torch.zeros(4, 0, dtype=torch.int64), 8, ValueError, r"ids has shape \[4, 0\]"),
        (torch.zeros(4, 2, dtype=torch.int64), 0, ValueError, "n_experts is 0"),
        (torch.zeros(4, 2, dtype=torch.int64), 2**20 + 1, ValueError, "n_experts is 1048577; it must be between 1 and"),
        (torch.zeros(4, 2, dtype=torch.int64), 8.0, TypeError, "n_experts is a float; an int is needed"),
        (torch.zeros(4, 2, dtype=torch.int64), True, TypeError, "n_experts is a bool"),
        (torch.zeros(4, 2, dtype=torch.int64).to_sparse(), 8, TypeError, "ids is sparse or nested"),
        ([[0, 1]], 8, TypeError, r"ids is a list; a torch.Tensor is needed"),
        (torch.zeros(1, 1).int().expand(2**30, 2), 8, ValueError, "ids has 2147483648 assignments; fewer than"),
        (torch.zeros(1, 1).int().expand(2**31 - 2048, 1), 8, ValueError, "ids has 2147481600 assignments; fewer than"),
    ],
)
def test_plan_refuses(ids: Tensor, E: int, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        routing_plan(ids, E)


def test_a_plan_of_any_number_of_tokens_compiles_few_times(device: torch.device) -> None:
    """The rows of a tile are one of four; nothing else may tie a graph to the number of tokens it was traced with."""
    graphs = CompileCounter()
    compiled = torch.compile(lambda ids: routing_plan(ids, 8).counts, fullgraph=True, dynamic=True, backend=graphs)
    for T in range(4, 160, 4):
        ids = random_ids(T, 8, 2).to(device)
        assert torch.equal(compiled(ids), routing_plan(ids, 8).counts)
    assert graphs.frame_count <= 6


def test_symbolic_sizes_are_compared() -> None:
    traced = make_fx(lambda x, ids: permute(x, routing_plan(ids, 8)), tracing_mode="symbolic")
    with pytest.raises(ValueError, match="x has shape"):
        traced(torch.randn(3, 6), torch.zeros(6, 2, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "E", "K"), [(128, 256, 8), (33, 1024, 31), (4096, 64, 8), (131072, 128, 8)])
@pytest.mark.parametrize("mode", FACTORS["mode"])
def test_on_a_gpu(T: int, E: int, K: int, mode: str, device: torch.device) -> None:
    """Captured in a CUDA graph, which refuses whatever waits for the host; the same bits every time."""
    ids = random_ids(T, E, K, 0.05).to(device)
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options_of(ids, E, mode).items()}
    wanted = routing_plan_torch(ids, E, **options)
    assert_same(routing_plan(ids, E, **options), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = routing_plan(ids, E, **options)
    for _ in range(20):
        for tensor in plan[:-1]:
            tensor.fill_(-7)
        graph.replay()
        assert_same(plan, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("one", [False, True])
def test_most_of_everything_on_a_gpu(one: bool, device: torch.device) -> None:
    ids = torch.full((131072, 8), 4095) if one else random_ids(131072, 4096, 8)
    ids = ids.to(device)
    assert_same(routing_plan(ids, 4096), routing_plan_torch(ids, 4096))
    options = {"capacity": 200, "priority": torch.rand(131072, 8, device=device)}
    assert_same(routing_plan(ids, 4096, **options), routing_plan_torch(ids, 4096, **options))
