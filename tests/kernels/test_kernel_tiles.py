"""The tile tables, the pick, and tuned files: good, near, hostile and stale ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from kernel_loops import TOLERANCES, assert_close

from moebench_kernels import grouped_gemm, grouped_gemm_torch, routing_plan, routing_plan_torch
from moebench_kernels.tiles import (
    BLOCK_MS,
    FAMILIES,
    KINDS,
    SHARED_KB,
    TMA_FAMILIES,
    GemmConfig,
    candidates,
    device_family,
    gemm_config,
    gemm_kind,
    shared_bytes,
    shipped_config,
    tile_rows,
)
from moebench_kernels.tuned_tiles import _shrink, device_slug, load_tuned, pick_config, use_tuned

HALF = torch.float16
SMALL = GemmConfig(32, 16, 4, 2, group_m=2, flatten=False, tma=True)


@pytest.fixture(autouse=True)
def _nothing_in_use(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MOEBENCH_TILES", raising=False)
    use_tuned(None)
    yield
    use_tuned(None)


def entry(**changes: Any) -> dict[str, Any]:
    """A good entry but for `changes`; those of the config by its own names."""
    config = asdict(SMALL)
    mine = {"kind": "rows", "dtype": "float16", "block_m": 16, "n": 64, "k": 32, "median_ms": 0.5}
    config |= {name: value for name, value in changes.items() if name in config or name.startswith("config_")}
    return mine | {name: value for name, value in changes.items() if name in mine} | {"config": config}


def write(path: Path, *entries: Any, **changes: Any) -> Path:
    """A tuned file for the interpreter."""
    whole = {"schema": 1, "device": "interpreter", "device_family": "interpreter", "triton": triton.__version__}
    path.write_text(json.dumps(whole | {"entries": list(entries)} | changes))
    return path


def test_rows_of_a_tile() -> None:
    """Twice the mean load as a power of two, from 16 to 128."""
    assert [tile_rows(load) for load in (0, 0.3, 8, 8.1, 16, 17, 32, 33, 64, 65, 1e9)] == [
        16, 16, 16, 32, 32, 64, 64, 128, 128, 128, 128,
    ]  # fmt: skip


def test_kinds() -> None:
    names = {gemm_kind(gather, gated, t) for gather in (False, True) for gated, t in ((0, 0), (1, 0), (0, 1))}
    assert names == set(KINDS)
    with pytest.raises(ValueError, match="no transposed form"):
        gemm_kind(True, True, True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.bfloat16])
def test_every_shipped_tile_is_possible(family: str, dtype: torch.dtype) -> None:
    for kind in KINDS:
        for block_m in BLOCK_MS:
            for N, K in ((4096, 4096), (1, 1), (17, 130)):
                c = shipped_config(kind, block_m, N, K, dtype, family)
                maps = 2 if kind.startswith("gated") else 1
                assert min(c.block_n // maps, c.block_k) >= 16  # the least of a product
                assert c.block_n // maps // (2 if c.halves else 1) >= 16
                assert c.block_n <= 2 * max(16, N) * maps
                assert all(size & (size - 1) == 0 for size in (c.block_n, c.block_k, c.num_warps))
                assert not c.tma or family in TMA_FAMILIES
                if family != "interpreter":
                    assert shared_bytes(c, block_m, dtype.itemsize, family) <= SHARED_KB[family] * 1024


def test_candidates_start_with_the_shipped_tile() -> None:
    for family in FAMILIES:
        for kind, block_m, N, K in (("gated_gather", 128, 768, 2048), ("rows_t", 16, 2048, 64), ("rows", 64, 24, 4096)):
            found = candidates(kind, block_m, N, K, torch.bfloat16, family)
            assert found[0] == shipped_config(kind, block_m, N, K, torch.bfloat16, family)
            assert len(found) == len(set(found)) > 10
            for c in found[1:]:
                assert shared_bytes(c, block_m, 2, family) * c.ctas_per_sm <= SHARED_KB[family] * 1024
                assert c.block_n <= 2 * max(16, N) * 2
                assert not c.swap or block_m <= 64


def test_the_pick_takes_exact_then_near_then_shipped(tmp_path: Path) -> None:
    other = replace(SMALL, block_n=16)
    path = write(tmp_path / "a.json", entry(), entry(n=128, block_n=16))
    tuned = load_tuned(path)
    shipped = shipped_config("rows", 16, 4096, 32, HALF, "interpreter")

    def pick(N: int, K: int = 32, kind: str = "rows", block_m: int = 16, dtype: torch.dtype = HALF) -> GemmConfig:
        return gemm_config(kind, block_m, N, K, dtype, "interpreter", tuned)

    assert pick(64) == pick(40) == pick(70) == SMALL
    assert pick(128) == pick(250) == other
    assert pick(4096) == shipped
    assert pick(64, K=128) == shipped_config("rows", 16, 64, 128, HALF, "interpreter")
    for changed in ({"kind": "rows_t"}, {"block_m": 32}, {"dtype": torch.bfloat16}):
        assert pick(64, **changed) != SMALL
    assert gemm_config("rows", 16, 4096, 32, HALF, "interpreter") == shipped
    assert replace(pick(64), block_n=16) == gemm_config(
        "rows", 16, 64, 32, HALF, "interpreter", load_tuned(write(tmp_path / "b.json", entry(n=32, block_n=16)))
    )


def test_a_file_is_used_when_named_and_no_longer_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    if device.type != "cpu":
        pytest.skip("the file is for the interpreter")
    own = pick_config("rows", 16, 64, 32, HALF, device)
    use_tuned(write(tmp_path / "a.json", entry()))
    assert pick_config("rows", 16, 64, 32, HALF, device) == SMALL != own
    monkeypatch.setenv("MOEBENCH_TILES", str(write(tmp_path / "b.json", entry(block_n=16))))
    assert pick_config("rows", 16, 64, 32, HALF, device) == SMALL, "what was given in the program comes first"
    use_tuned(None)
    assert pick_config("rows", 16, 64, 32, HALF, device) == replace(SMALL, block_n=16)
    monkeypatch.delenv("MOEBENCH_TILES")
    assert pick_config("rows", 16, 64, 32, HALF, device) == own


def test_the_kernel_runs_on_a_tuned_tile(tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also inside torch.compile, whose graph holds the operator and not the tile."""
    if device.type != "cpu":
        pytest.skip("the file is for the interpreter")
    ids = torch.tensor([[0], [1], [1]], dtype=torch.int32)
    plan, rows, weights = routing_plan(ids, 2), torch.randn(3, 32).half(), torch.randn(2, 64, 32).half()
    wanted = grouped_gemm_torch(rows, weights, routing_plan_torch(ids, 2))
    compiled = torch.compile(lambda a, b: grouped_gemm(a, b, plan), fullgraph=True, backend="aot_eager")
    assert_close("out", compiled(rows, weights), wanted, TOLERANCES[HALF])
    monkeypatch.setenv("MOEBENCH_TILES", str(write(tmp_path / "a.json", entry())))
    assert_close("out", grouped_gemm(rows, weights, plan), wanted, TOLERANCES[HALF])
    monkeypatch.setenv("MOEBENCH_TILES", str(write(tmp_path / "c.json", device_family="sm_90", device="NVIDIA H200")))
    for call in (compiled, lambda a, b: grouped_gemm(a, b, plan)):
        with pytest.raises(ValueError, match=r"for sm_90 \(NVIDIA H200\); this device is interpreter"):
            call(rows, weights)


BAD = {
    "no file": (None, "No such file"),
    "no JSON": ("{", "Expecting property name"),
    "not UTF-8": (b"\xff\xfe{}", "codec can't decode"),
    "another thing": ("[1]", "not a tiles file of schema 1"),
    "another schema": ({"schema": 2}, "not a tiles file of schema 1"),
    "deep": ("[" * 100_000, "recursion"),
    "a family": ({"device_family": "sm_70"}, "needs device"),
    "no list": ({"entries": {}}, "entries .a list."),
    "an old triton": ({"triton": "2.1.0"}, "tuned with triton 2.1.0, this is"),
    "a bare number": ({"entries": [3]}, "entry 0: TypeError"),
    "no kind": ({"entries": [{"dtype": "float16"}]}, "entry 0: KeyError: 'kind'"),
    "a field more": ({"entries": [entry(), entry(config_evil=1)]}, "entry 1: TypeError: .*config_evil"),
    "a negative size": ({"entries": [entry(n=-1)]}, "n and k are positive integers"),
    "a true size": ({"entries": [entry(n=True)]}, "n and k are positive integers"),
    "a huge tile": ({"entries": [entry(block_n=1 << 20)]}, "block_n is 1048576"),
    "an odd tile": ({"entries": [entry(block_n=48)]}, "power of two"),
    "a text": ({"entries": [entry(num_warps="8")]}, "num_warps is '8'"),
    "a number for a flag": ({"entries": [entry(swap=1)]}, "swap is 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_clear_line(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    path = tmp_path / "tiles.json"
    if isinstance(content, dict):
        write(path, **content)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"^the tiles file .*tiles\.json cannot be used: .*{message}") as caught:
        load_tuned(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    with path.open("wb") as file:
        file.truncate(5 << 20)
    with pytest.raises(ValueError, match="it has more than 4194304 bytes"):
        load_tuned(path)


def test_fields_left_out_have_their_defaults(tmp_path: Path) -> None:
    short = entry()
    short["config"] = {"block_n": 32, "block_k": 16, "num_warps": 4, "num_stages": 2}
    found = load_tuned(write(tmp_path / "a.json", short)).nearest("rows", HALF, 16, 64, 32)
    assert found == GemmConfig(32, 16, 4, 2)


def test_devices() -> None:
    assert device_family(torch.device("cpu")) == "interpreter"
    assert device_slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert device_slug("../../etc") == "etc"


@pytest.mark.parametrize("block_m", BLOCK_MS)
def test_a_tile_is_cut_down_to_a_smaller_device(block_m: int) -> None:
    """Such as sm_89 and sm_120, with 99 KB."""
    limit = 99 * 1024
    for family in ("sm_80", "sm_90"):
        for dtype in (HALF, torch.float32):
            c = shipped_config("gated_gather", block_m, 4096, 4096, dtype, family)
            smaller = _shrink(c, block_m, dtype.itemsize, family, limit)
            assert shared_bytes(smaller, block_m, dtype.itemsize, family) <= limit
            assert smaller.num_stages >= 2


IN_FLIGHT = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moebench_kernels.grouped_gemm import build

for gather, activation in ((False, None), (True, "swiglu")):
    b = build("sm_90", "bf16", 128, gather, activation, False)
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(b.kernel.arg_names)
        if b.signature[name][0] in "*i" and name not in b.unaligned
    }
    source = ASTSource(b.kernel, dict(b.signature), dict(b.constants), aligned)
    options = {"num_warps": b.num_warps, "num_stages": b.num_stages}
    print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttgir"].count("pendings = 1"))
"""


def test_large_hopper_tiles_keep_a_product_in_flight() -> None:
    """A flattened loop whose sum does not start at zero compiles, fits and is right, but waits for every load."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", IN_FLIGHT], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(int(count) >= 1 for count in done.stdout.split()), done.stdout
    assert len(done.stdout.split()) == 2
