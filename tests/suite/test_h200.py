"""The suites of the published measurements: what they cover, and that each ends within eight minutes on the GPU."""

import pytest
from click.testing import CliRunner
from test_shipped import H200

from moebench.catalogue.hardware import Hardware, hardware_row, hardware_table
from moebench.cli import main
from moebench.estimate import estimate_seconds
from moebench.plan_text import data_sheet_ceilings
from moebench.point import QUANTISED_PRECISIONS
from moebench.providers import PROVIDERS
from moebench.suite import load_suite

MODELS = {"olmoe-1b-7b", "mixtral-8x7b", "qwen3-30b-a3b", "qwen3-235b-a22b", "deepseek-v3", "gpt-oss-120b"}
NEEDED = 480  # seconds


def points(name, kind="cuda"):
    return [point for block in load_suite([name]).blocks(kind) for point in block.points()]


def arms(found):
    return {point.variant.provider for point in found}


@pytest.mark.parametrize("name", H200)
def test_each_ends_within_eight_minutes_by_the_data_sheet(name):
    ceilings = data_sheet_ceilings(hardware_table()["H200-SXM-141GB"])
    estimate = estimate_seconds(load_suite([name]), "cuda", ceilings)
    assert 30 < estimate.seconds < NEEDED


@pytest.mark.parametrize("name", H200)
def test_each_races_ours_against_torch_and_is_rehearsed_in_seconds_on_a_cpu(name):
    assert {"triton", "torch-grouped"} <= arms(points(name))
    assert max(point.problem.layer.total_params() for point in points(name, "cpu")) < 2e6
    assert estimate_seconds(load_suite([name]), "cpu").seconds < 30


def test_the_whole_layer_is_measured_from_one_token_to_32k_for_six_models():
    found = points("h200-decode") + points("h200-prefill")
    assert {point.variant.scope for point in found} == {"layer"}
    tokens = {1, 8, 16, 64, 128, 512, 1024, 4096, 16384, 32768}
    for provider in ("triton", "torch-grouped", "transformers-grouped-mm"):
        have = {(p.problem.model, p.problem.tokens) for p in found if p.variant.provider == provider}
        assert have == {(model, count) for model in MODELS for count in tokens}
    peers = {name for name in arms(found) if PROVIDERS[name].needs is not None}
    assert peers >= {"transformers-batched-mm", "moe-ops", "triton-kernels", "sonic-moe", "deepgemm"}
    assert peers | arms(points("h200-mixtral")) >= {"liger", "fbgemm"}


def test_grouped_gemms_go_from_1k_to_262k_rows_balanced_and_skewed():
    found = points("h200-gemm")
    for model in ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-120b"):
        own = [point for point in found if point.problem.model == model]
        rows = {point.problem.tokens * point.problem.layer.top_k for point in own}
        assert (min(rows), max(rows)) == (1024, 262144)
        assert {point.variant.scope for point in own} == {"up_projection", "down_projection"}
        assert {point.problem.traffic for point in own} == {"balanced", "zipf:1"}


def test_the_other_demands():
    train = points("h200-train")
    layer = train[0].problem.layer
    assert (layer.routed_experts, layer.hidden_size, layer.expert_ffn_size, layer.top_k) == (128, 2048, 768, 8)
    assert {(p.problem.tokens, p.problem.direction) for p in train} == {
        (tokens, direction) for tokens in (8192, 32768) for direction in ("forward", "forward_backward")
    }
    assert {p.variant.precision for p in points("h200-precision")} == {"bf16", *QUANTISED_PRECISIONS}
    assert len({p.variant.scope for p in points("h200-stages")}) == 7
    energy = load_suite(["h200-energy"])
    assert energy.energy
    assert energy.budget.energy_window_seconds >= 5
    assert energy.budget.energy_trials >= 3
    assert energy.count("cuda").points == 12
    autotuned = [p for p in points("h200-compile") if p.variant.provider == "torch-compile-max-autotune"]
    assert len({p.problem for p in autotuned}) == 3
    mixtral = points("h200-mixtral")
    assert {(p.problem.tokens, p.problem.traffic, p.variant.scope) for p in mixtral} == {
        (tokens, "balanced", "experts") for tokens in (1, 16, 16384)
    }


def test_a_plan_for_a_device_that_is_not_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["run", "suite", "h200-decode", "--dry-run", "--for"]
    shown = CliRunner().invoke(main, [*words, "h200-sxm-141gb"])
    assert shown.exit_code == 0
    assert "on cuda" in shown.output
    assert "data sheet of H200-SXM-141GB" in shown.output
    wrong = CliRunner().invoke(main, [*words, "H100"])
    assert wrong.exit_code == 2
    assert "'H100' is not in the table; did you mean H100-SXM-80GB, H100-PCIe-80GB?" in wrong.output
    assert len(wrong.output.splitlines()) == 1
    alone = CliRunner().invoke(main, ["run", "suite", "--for", "A10G"])
    assert alone.exit_code == 2
    assert "--dry-run" in alone.output


def test_the_data_sheet_gives_rates_of_what_it_states():
    sheet = Hardware("x", bf16_dense_tflops=100.0, fp8_dense_tflops=200.0, mem_bw_gbs=1000.0)
    found = data_sheet_ceilings(sheet)
    assert found["gemm_tflops"]["bf16"] == found["gemm_tflops"]["fp16"] == 75.0
    assert found["gemm_tflops"]["fp8:row"] == 150.0
    assert "fp32" not in found["gemm_tflops"]
    assert found["copy_gbs"] == 850.0
    seen = data_sheet_ceilings(Hardware("x", bf16_dense_tflops=100.0, measured_max_bf16_tflops=90.0, mem_bw_gbs=1.0))
    assert seen["gemm_tflops"]["bf16"] == 90.0
    with pytest.raises(ValueError, match="no bf16 peak or no bandwidth"):
        data_sheet_ceilings(Hardware("x", mem_bw_gbs=1000.0))
    with pytest.raises(ValueError, match="did you mean H20-96GB"):
        hardware_row("h20-", hardware_table())
