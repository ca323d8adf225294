"""ragged_gemm, the weight gradient: every operand's form, edge of a tile and load, against float64."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_loops import TOLERANCES, assert_close, random_ids
from torch import Tensor

from moebench_kernels import Plan, ragged_gemm, ragged_gemm_torch, routing_plan, routing_plan_torch, runtime
from moebench_kernels.ragged_gemm import builds, heaviest_first
from moebench_kernels.ragged_tiles import (
    RAGGED_KINDS,
    TILES,
    RaggedConfig,
    ragged_candidates,
    ragged_config,
    ragged_shared_bytes,
)
from moebench_kernels.tiles import SHARED_KB
from moebench_kernels.tuned_tiles import load_tuned, pick_ragged_config, use_tuned

HALF, WIDE, BRAIN = torch.float16, torch.float32, torch.bfloat16
# T, E, K, M, N, dropped, dtype, gathered operand. The interpreter's tile is 32 x 64 of dW, 16 rows at a time.
CASES = [
    (0, 5, 2, 17, 40, 0.0, WIDE, "left"),
    (1, 1, 1, 1, 1, 0.0, WIDE, "right"),
    (3, 2, 2, 17, 40, 1.0, HALF, "none"),
    (33, 5, 4, 70, 140, 0.3, WIDE, "left"),
    (33, 5, 4, 140, 70, 0.3, WIDE, "right"),
    (40, 2, 1, 33, 65, 0.1, HALF, "none"),
    (9, 60, 8, 40, 48, 0.1, HALF, "right"),
    (64, 2, 1, 64, 128, 0.0, BRAIN, "left"),
    (128, 1, 1, 48, 17, 0.0, BRAIN, "right"),
    (129, 8, 1, 300, 24, 0.0, WIDE, "none"),
    (33, 257, 2, 16, 16, 0.0, WIDE, "left"),
]


def operands(T: int, K: int, M: int, N: int, gathered: str, plan: Plan, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """left and right; rows that belong to no expert are poisoned."""
    left = torch.randn(T if gathered == "left" else T * K, M).to(dtype)
    right = torch.randn(T if gathered == "right" else T * K, N).to(dtype)
    for name, rows in (("left", left), ("right", right)):
        if gathered != name:
            rows[int(plan.offsets[-1]) :] = float("nan")
    return left, right


@pytest.mark.parametrize(("T", "E", "K", "M", "N", "dropped", "dtype", "gathered"), CASES)
def test_ragged_gemm(
    T: int, E: int, K: int, M: int, N: int, dropped: float, dtype: torch.dtype, gathered: str, device: torch.device
) -> None:
    ids = random_ids(T, E, K, dropped)
    plan, reference = routing_plan(ids.to(device), E), routing_plan_torch(ids, E)
    left, right = operands(T, K, M, N, gathered, reference, dtype)
    options = {"gather_left": gathered == "left", "gather_right": gathered == "right"}
    dw = ragged_gemm(left.to(device), right.to(device), plan, **options)
    assert dw.dtype == dtype
    assert_close("dw", dw, ragged_gemm_torch(left.double(), right.double(), reference, **options), TOLERANCES[dtype])
    assert (dw.cpu()[reference.counts == 0] == 0).all(), "an expert without rows has a gradient"
    assert torch.equal(dw, ragged_gemm(left.to(device), right.to(device), plan, **options))


def test_reference_equals_a_sum_of_outer_products() -> None:
    ids = random_ids(7, 3, 2, 0.3)
    plan = routing_plan_torch(ids, 3)
    left, right = torch.randn(14, 5).double(), torch.randn(7, 4).double()
    wanted = torch.zeros(3, 5, 4).double()
    for row, (expert, token) in enumerate(zip(plan.row2expert.tolist(), plan.row2token.tolist(), strict=True)):
        if expert >= 0:
            wanted[expert] += torch.outer(left[row], right[token])
    assert_close("dw", ragged_gemm_torch(left, right, plan, gather_right=True), wanted, 1e-12)


@pytest.mark.parametrize("gathered", ["left", "right", "none"])
def test_a_neighbours_infinities_stay_its_own(gathered: str, device: torch.device) -> None:
    """A tile's last step loads rows of the next expert too; 0 * inf would be NaN."""
    ids = torch.arange(6)[:, None].repeat_interleave(3, dim=0) // 2
    plan = routing_plan(ids.to(device), 3)
    left, right = torch.ones(18, 16), torch.ones(18, 16)
    left[6:12], right[6:12] = float("inf"), float("nan")
    dw = ragged_gemm(
        left.to(device), right.to(device), plan, gather_left=gathered == "left", gather_right=gathered == "right"
    ).cpu()
    assert (dw[[0, 2]] == 6).all()
    assert not torch.isfinite(dw[1]).any()


def test_one_expert_with_everything(device: torch.device) -> None:
    ids = torch.full((65, 1), 3)
    plan, left, right = routing_plan(ids.to(device), 8), torch.randn(65, 70), torch.randn(65, 70)
    dw = ragged_gemm(left.to(device), right.to(device), plan).cpu()
    assert_close("dw", dw[3], left.double().mT @ right.double(), TOLERANCES[WIDE])
    assert (dw[[0, 1, 2, 4, 5, 6, 7]] == 0).all()


def test_unaligned_operands_are_loaded_without_descriptors(device: torch.device) -> None:
    """A row length, or a start, that is no multiple of 16 bytes: TMA cannot take it."""
    plan = routing_plan(random_ids(20, 3, 1).to(device), 3)
    wide = torch.randn(21 * 16 + 1, device=device)
    left, right = wide[1 : 20 * 16 + 1].view(20, 16), torch.randn(20, 17, device=device)
    assert left.data_ptr() % 16
    wanted = ragged_gemm_torch(left.double(), right.double(), plan)
    assert_close("dw", ragged_gemm(left, right, plan), wanted, TOLERANCES[WIDE])


def test_heaviest_first() -> None:
    offsets = torch.tensor([0, 3, 3, 10, 13, 20], dtype=torch.int32)
    assert heaviest_first(offsets).tolist() == [2, 4, 0, 3, 1]


def test_any_skew_is_spread_to_within_one_tile() -> None:
    """The claim of the file: walking tiles by falling load, programs differ by no more than the longest tile."""
    for seed in range(20):
        counts = torch.distributions.Pareto(1.0, 0.6).sample((64,)).long().clamp(max=5000)
        counts[seed] = 0
        tiles, programs = 6 + seed, 132
        loads = counts.sort(descending=True).values.repeat_interleave(tiles)
        each = torch.zeros(-(-len(loads) // programs) * programs, dtype=torch.int64)
        each[: len(loads)] = loads
        total = each.view(-1, programs).sum(0)
        assert total.max() - total.min() <= counts.max()


def test_configs_never_exceed_the_matrix() -> None:
    for family in TILES:
        for kind in RAGGED_KINDS:
            c = ragged_config(kind, 17, 3000, HALF, family)
            assert (c.block_m, c.num_warps) == (32, 4)
            big = ragged_config(kind, 4096, 4096, HALF, family)
            assert replace(big, block_m=0, block_n=0) == replace(TILES[family], block_m=0, block_n=0)
            mirrored = kind in ("dw_gather_right", "dw_gather_both")
            assert (big.block_m >= big.block_n) if mirrored else (big.block_m <= big.block_n)


def test_candidates_start_with_the_shipped_tile_and_fit() -> None:
    for family in TILES:
        for kind in RAGGED_KINDS:
            found = ragged_candidates(kind, 1536, 2048, HALF, family)
            assert found[0] == ragged_config(kind, 1536, 2048, HALF, family)
            assert len(found) == len(set(found)) > 10
            for c in found[1:]:
                assert ragged_shared_bytes(c, 2, family) * c.per_unit <= SHARED_KB[family] * 1024
        assert {c.block_m for c in ragged_candidates("dw", 40, 2048, HALF, family)} == {64}, "none wider than the dW"


def test_a_tuned_file_gives_the_tile_of_its_load(tmp_path: Path) -> None:
    tile = {"block_m": 32, "block_n": 64, "block_r": 32, "num_warps": 4, "num_stages": 2}
    entry = {"kind": "dw_gather_right", "dtype": "float16", "block_m": 64, "n": 128, "k": 96, "config": tile}
    file = {
        "schema": 1, "device": "cpu", "device_family": "interpreter", "triton": runtime.triton.__version__,
        "entries": [entry],
    }  # fmt: skip
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps(file))
    tuned = load_tuned(path)
    shipped = ragged_config("dw_gather_right", 96, 128, HALF, "interpreter")
    pick = partial(ragged_config, M=96, N=128, dtype=HALF, family="interpreter", tuned=tuned)
    assert pick("dw_gather_right", load=64) == RaggedConfig(**tile)
    assert pick("dw_gather_right", load=128) == shipped
    assert pick("dw", load=64) == ragged_config("dw", 96, 128, HALF, "interpreter")
    for wrong, says in (
        ({"block_r": 24}, "power of two"),
        ({"per_unit": 9}, "per_unit is 9"),
        ({"swap": True}, "swap"),
    ):
        path.write_text(json.dumps(file | {"entries": [entry | {"config": tile | wrong}]}))
        with pytest.raises(ValueError, match=says):
            load_tuned(path)
    use_tuned(tuned)
    try:
        assert pick_ragged_config("dw_gather_right", 64, 96, 128, HALF, torch.device("cpu")) == RaggedConfig(**tile)
    finally:
        use_tuned(None)
    assert pick_ragged_config("dw_gather_right", 64, 96, 128, HALF, torch.device("cpu")) == shipped


def test_operator(device: torch.device) -> None:
    plan = routing_plan(random_ids(9, 3, 2).to(device), 3)
    arguments = (
        torch.randn(18, 16, device=device), torch.randn(9, 8, device=device), plan.offsets, plan.row2assignment,
        2, False, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.moebench.ragged_gemm.default, arguments)
    compiled = torch.compile(ragged_gemm, fullgraph=True, backend="aot_eager")
    found = compiled(arguments[0], arguments[1], plan, gather_right=True)
    assert torch.equal(found, ragged_gemm(arguments[0], arguments[1], plan, gather_right=True))


def test_not_differentiable_is_said(device: torch.device) -> None:
    plan = routing_plan(random_ids(9, 3, 2).to(device), 3)
    left = torch.randn(18, 16, device=device).requires_grad_()
    with pytest.raises(RuntimeError, match=r"moebench[:.]+ragged_gemm.* no autograd formula"):
        ragged_gemm(left, torch.randn(18, 8, device=device), plan).sum().backward()


@pytest.mark.parametrize(
    ("left", "right", "options", "error", "message"),
    [
        ((17, 8), (18, 8), {}, ValueError, r"left has shape \[17, 8\]; needed: \[18, M\]"),
        ((18, 8), (18, 8), {"gather_right": True}, ValueError, r"right has shape \[18, 8\]; needed: \[9, N\]"),
        ((18, 8), (18, 0), {}, ValueError, r"right has shape \[18, 0\]"),
    ],
)
def test_refuses(left: tuple, right: tuple, options: dict, error: type, message: str, device: torch.device) -> None:
    plan = routing_plan(random_ids(9, 3, 2).to(device), 3)
    with pytest.raises(error, match=message):
        ragged_gemm(torch.zeros(left, device=device), torch.zeros(right, device=device), plan, **options)
    with pytest.raises(TypeError, match="one dtype is needed"):
        ragged_gemm(torch.zeros(18, 8, device=device), torch.zeros(18, 8, device=device).half(), plan)


def test_builds_name_every_family_and_form() -> None:
    found = builds()
    assert {target for build in found for target in build.targets} == {"sm_80", "sm_90", "sm_100", "gfx942", "gfx950"}
    assert {build.name.split()[1] for build in found} == {"dw_up", "dw_down", "rows"}
    assert all("wgmma" in b.expect for b in found if b.targets == ("sm_90",) and "fp32" not in b.name)


@pytest.mark.gpu
def test_large_bf16_repeated(device: torch.device) -> None:
    ids = random_ids(4096, 16, 2, 0.05)
    plan, reference = routing_plan(ids.to(device), 16), routing_plan_torch(ids, 16)
    left, right = operands(4096, 2, 512, 768, "right", reference, BRAIN)
    wanted = ragged_gemm_torch(left.double(), right.double(), reference, gather_right=True)
    runs = [ragged_gemm(left.to(device), right.to(device), plan, gather_right=True) for _ in range(20)]
    assert_close("dw", runs[0], wanted, TOLERANCES[BRAIN])
    assert all(torch.equal(runs[0], run) for run in runs)
