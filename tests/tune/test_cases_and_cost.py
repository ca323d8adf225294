"""What is tuned, how the cost model ranks, and what the command says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from moebench.cli import main
from moebench.tune.case import Case, cases, layers_of
from moebench.tune.cost import estimated_ms
from moebench.tune.kept import Kept
from moebench.tune.race import Result, Runner
from moebench_kernels.ragged_tiles import RaggedConfig
from moebench_kernels.tiles import GemmConfig, tile_rows

QWEN = {"shapes": ["128,2048,768,8"], "models": []}


def one(tokens: int, map_: str = "up") -> Case:
    found = cases(layers_of([], ["128,2048,768,8"]), [tokens], ["bf16"], backward=True)
    return next(case for case in found if case.map == map_)


def test_the_products_of_a_layer() -> None:
    found = {case.map: case for case in cases(layers_of([], ["128,2048,768,8"]), [32768], ["bf16"], backward=True)}
    shapes = {name: (case.kind, case.n, case.k, case.gather, case.transpose, case.maps) for name, case in found.items()}
    assert shapes == {
        "up": ("gated_gather", 768, 2048, True, False, 2),
        "down": ("rows", 2048, 768, False, False, 1),
        "d_hidden": ("gather_t", 768, 2048, True, True, 1),
        "d_rows": ("rows_t", 2048, 1536, False, True, 1),
        "dw_up": ("dw_gather_right", 2048, 1536, True, False, 1),
        "dw_down": ("dw_gather_left", 768, 2048, True, False, 1),
    }
    assert {name for name, case in found.items() if case.weight_gradient} == {"dw_up", "dw_down"}
    assert {case.block_m for case in found.values()} == {tile_rows(32768 * 8 / 128)}
    assert found["up"].activation == "swiglu"
    assert found["down"].activation is None


def test_a_key_is_raced_once_under_its_largest_load() -> None:
    found = cases(layers_of([], ["8,64,32,2"]), [4096, 16384], ["bf16"])
    assert [case.tokens for case in found] == [16384, 16384]


def test_the_largest_load_counts_rows_of_all_layers() -> None:
    for shapes in (["128,2048,768,8", "8,2048,768,2"], ["8,2048,768,2", "128,2048,768,8"]):
        found = cases(layers_of([], shapes), [8192], ["bf16"])
        assert {case.rows for case in found} == {65536}


def test_presets_are_layers() -> None:
    found = cases(layers_of(["mixtral-8x7b"], []), [16], ["bf16", "fp16"])
    assert {(case.n, case.k) for case in found} == {(14336, 4096), (4096, 14336)}
    assert {case.dtype for case in found} == {"bf16", "fp16"}


@pytest.mark.parametrize("text", ["128,2048,768", "a,b,c,d", "0,1,1,1", "8,64,32,2,1", ""])
def test_malformed_shapes(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not E,D,F,K"):
        layers_of([], [text])


def test_the_model_scales_with_the_work() -> None:
    tile = GemmConfig(256, 64, 8, 4)
    assert estimated_ms(one(65536), tile, "sm_90") == pytest.approx(
        2 * estimated_ms(one(32768), tile, "sm_90"), rel=0.05
    )
    assert estimated_ms(one(32768), tile, "sm_80") > estimated_ms(one(32768), tile, "sm_90")


def test_the_model_prefers_more_bytes_in_flight_where_weights_bound() -> None:
    case = one(16)
    shallow, deep = GemmConfig(128, 32, 4, 2, swap=True), GemmConfig(128, 128, 4, 5, swap=True)
    assert estimated_ms(case, deep, "sm_90") < estimated_ms(case, shallow, "sm_90")


def test_the_model_never_beats_the_machine() -> None:
    case = one(32768)
    flops = 2 * case.rows * case.n * case.maps * case.k
    for block_n in (64, 128, 256):
        assert estimated_ms(case, GemmConfig(block_n, 64, 8, 4), "sm_90") * 1e-3 >= flops / 989e12
    few = one(16)
    weights = min(few.experts, few.rows) * few.n * few.maps * few.k * 2
    assert estimated_ms(few, GemmConfig(128, 128, 4, 6, swap=True), "sm_90") * 1e-3 >= weights / 4.8e12


def test_the_model_of_a_weight_gradient() -> None:
    case, tile = one(32768, "dw_up"), RaggedConfig(128, 256, 64, 8, 4)
    ms = estimated_ms(case, tile, "sm_90")
    assert ms * 1e-3 >= 2 * case.rows * case.n * case.k / 989e12, "never beats the machine"
    assert estimated_ms(one(65536, "dw_up"), tile, "sm_90") == pytest.approx(2 * ms, rel=0.05)
    assert ms < estimated_ms(case, replace(tile, block_m=64, block_n=64), "sm_90")
    few = one(16, "dw_up")
    written = few.experts * few.n * few.k * 2
    assert estimated_ms(few, tile, "sm_90") * 1e-3 >= written / 4.8e12


def test_wider_tiles_are_fed_better_at_large_loads() -> None:
    case = one(32768)
    tile = GemmConfig(256, 64, 8, 4)
    assert estimated_ms(case, tile, "sm_90") < estimated_ms(case, replace(tile, block_n=32), "sm_90")


def invoke(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["tune", *words])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name layers to tune with --model or --shape"),
        (("--model", "mixtrl-8x7b"), "unknown model 'mixtrl-8x7b'"),
        (("--shape", "1,2"), "is not E,D,F,K"),
        (("--shape", "8,64,32,2", "--tokens", "0"), "--tokens '0'"),
        (("--shape", "8,64,32,2", "--dtype", "fp8"), "--dtype 'fp8' is unknown (allowed: bf16, fp16, fp32)"),
        (("--shape", "8,64,32,9"), "more than the 8 routed experts"),
        (("--shape", "8,64,32,2", "--target", "sm_80"), "--target goes with --dry-run"),
    ],
)
def test_bad_words(words: tuple[str, ...], message: str) -> None:
    code, _, errors = invoke(*words)
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    code, _, errors = invoke("--shape", "8,64,32,2", "--tokens", "4", "--out", str(tmp_path / "t.json"))
    assert code == 1
    assert "there is none here; --dry-run --target sm_90 shows what would be raced" in errors
    assert not (tmp_path / "t.json").exists()


@pytest.mark.slow
def test_a_dry_run_compiles_the_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path))
    words = ("--shape", "8,256,128,2", "--tokens", "64", "--keep", "3", "--dry-run", "--json", "--backward")
    code, printed, _ = invoke(*words)
    rows = json.loads(printed)
    assert code == 0
    assert [row["target"] for row in rows] == ["sm_90"] * 6
    for row in rows:
        assert row["considered"] > 20
        assert 1 <= row["raced"] <= 3


def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, outcome: object) -> tuple[int, str, str]:
    """The command, with a tuner that raises `outcome` or gives a file of so many failed cases."""

    def tuned(cases: list[Case], out: Path, **_: object) -> Kept:
        if isinstance(outcome, BaseException):
            raise outcome
        kept = Kept(out, {"device": "x", "device_family": "sm_90", "triton": "3.7", "source": ""}, resume=False)
        for case in cases[:outcome]:
            kept.add(case, Result(None, None, None, False, [Runner(None, wrong="out of memory")]))
        return kept

    monkeypatch.setattr("moebench.tune.run.tune", tuned)
    return invoke("--shape", "8,64,32,2", "--tokens", "4", "--out", str(tmp_path / "t.json"))


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, _, errors = results(monkeypatch, tmp_path, 1)
    assert code == 1
    assert "1 without a tile that gives a right answer: see" in errors
    (tmp_path / "t.json").unlink()
    assert results(monkeypatch, tmp_path, 0)[0] == 0
    code, _, errors = results(monkeypatch, tmp_path, KeyboardInterrupt())
    assert code == 130
    assert "the same command with --resume goes on" in errors
