"""The suites that ship: what the README and the design promise of them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from moebench.axes import AXES
from moebench.catalogue.layer_forms import LAYER_FORMS
from moebench.estimate import CALL_OVERHEAD, NOMINAL, estimate_seconds
from moebench.point import QUANTISED_PRECISIONS
from moebench.providers import PROVIDERS
from moebench.suite import Budget, load_suite, shipped
from moebench.suite_file import read_source

EVERYWHERE = [
    "capacity", "decode", "granularity", "kernels", "nightly", "prefill", "quick", "routers", "routing-skew", "smoke",
    "sweep", "train",
]  # fmt: skip
# For one data-centre GPU; on a CPU they are rehearsed (test_h200.py).
H200 = [
    "h200-compile", "h200-decode", "h200-energy", "h200-gemm", "h200-mixtral", "h200-precision", "h200-prefill",
    "h200-stages", "h200-train",
]  # fmt: skip
NAMES = sorted([*EVERYWHERE, *H200])
# Those that need no other library and compute the layer, and the one yardstick that is the price of its sparsity;
# without the compiler's race of templates, which takes minutes.
OURS = {name for name, listing in PROVIDERS.items() if listing.needs is None} - set(LAYER_FORMS)
OURS -= {"torch-compile-max-autotune"}


def points(name, kind):
    return [point for block in load_suite([name]).blocks(kind) for point in block.points()]


def test_all_ship():
    assert shipped() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_says_what_it_answers_and_runs_on_both_devices(name):
    file, text = read_source(name)
    suite = load_suite([name])
    assert (suite.name, file) == (name, f"{name}.toml")
    assert text.startswith("# ")
    assert suite.question.endswith("?")
    quantised = set(QUANTISED_PRECISIONS) if name in ("kernels", "h200-precision") else set()
    assert {point.variant.precision for point in points(name, "cpu")} == {"fp32"} | quantised
    wide = {"fp32"} if name == "routers" else set()  # routers decide in fp32, and most are timed alone
    assert {point.variant.precision for point in points(name, "cuda")} == {"bf16"} | quantised | wide


@pytest.mark.parametrize("name", EVERYWHERE)
def test_no_layer_is_too_large_for_an_ordinary_machine(name):
    for kind, limit, width in (("cpu", 4e9, 4), ("cuda", 20e9, 2)):
        assert max(point.problem.layer.total_params() for point in points(name, kind)) * width < limit


def test_smoke_tries_every_provider_backward_and_drops():
    found = points("smoke", "cpu")
    assert {point.variant.provider for point in found} == OURS
    assert {point.problem.direction for point in found} == {"forward", "forward_backward"}
    assert {point.variant.capacity_factor for point in found} == {1.0, "dropless"}


def test_quick_measures_olmoe_at_full_width_and_leaves_slow_arms_out():
    published = [point for point in points("quick", "cpu") if point.problem.model == "olmoe-1b-7b"]
    found = [point for point in published if point.variant.scope == "layer"]
    layer = found[0].problem.layer
    assert (layer.routed_experts, layer.top_k, layer.hidden_size, layer.expert_ffn_size) == (64, 8, 2048, 1024)
    arms = {tokens: {p.variant.provider for p in found if p.problem.tokens == tokens} for tokens in (1, 16, 256)}
    assert sum(map(len, arms.values())) == len(found)
    assert arms[1] == arms[16] == OURS
    assert arms[256] == OURS - {"torch-dense"}


def test_granularity_goes_from_8_to_256_at_constant_active_parameters():
    layers = {point.problem.layer for point in points("granularity", "cpu")}
    assert {layer.routed_experts for layer in layers} == {8, 16, 32, 64, 128, 256}
    assert len({layer.top_k * layer.expert_params() for layer in layers}) == 1
    assert len({layer.routed_experts * layer.expert_params() for layer in layers}) == 1


def test_sweep_crosses_four_axes():
    found = points("sweep", "cpu")
    for axis in (
        lambda p: p.problem.layer.routed_experts,
        lambda p: p.problem.layer.top_k,
        lambda p: p.variant.capacity_factor,
        lambda p: p.problem.traffic,
    ):
        assert len({axis(point) for point in found}) > 1


@pytest.mark.parametrize(("name", "limit"), [("smoke", 60), ("quick", 240)])
def test_the_estimate_of_the_fast_ones_is_within_their_promise(name, limit):
    assert estimate_seconds(load_suite([name]), "cpu").seconds < limit


def test_an_estimate_says_what_it_rests_on():
    suite = load_suite(["quick"])
    guess = estimate_seconds(suite, "cpu")
    assert guess.basis == "uncalibrated"
    slow = {"gemm_tflops": {"fp32": NOMINAL["cpu"]["gflops"] / 1e5}, "copy_gbs": 1.0, "read_gbs": 1.0}
    assert estimate_seconds(suite, "cpu", slow).basis == "calibrated"
    assert estimate_seconds(suite, "cpu", slow).seconds > 2 * guess.seconds
    assert estimate_seconds(suite, "cpu", {"gemm_tflops": None, "copy_gbs": None, "read_gbs": None}) == guess
    assert CALL_OVERHEAD["cpu"] > 0


def test_an_estimate_grows_with_the_budget_until_evidence_is_enough(tmp_path):
    def sampling(seconds):
        text = re.sub("seconds_per_point = .*", f"seconds_per_point = {seconds}", read_source("quick")[1])
        (tmp_path / "other.toml").write_text(text)
        return estimate_seconds(load_suite([f"{tmp_path}/other.toml"]), "cpu").phases["sampling"]

    assert sampling(0.05) < sampling(1.5)
    assert sampling(1.5) <= sampling(20) == sampling(40), "no budget is used up for its own sake"


def test_loading_a_suite_imports_neither_torch_nor_pandas():
    code = (
        "import sys, conftest\n"
        "from moebench.suite import load_suite\n"
        "from moebench.estimate import estimate_seconds\n"
        "estimate_seconds(load_suite(['quick']), 'cpu')\n"
        "print(sorted({'torch', 'triton', 'numpy', 'pandas', 'plotly', 'seaborn'} & set(sys.modules)))"
    )
    path = [__file__.rpartition("/")[0]] + [place for place in sys.path if place]  # this folder's conftest
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ":".join(path)}, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_documentation_shows_what_ships_and_every_axis(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "suites.md").read_text()
    for name in NAMES:
        assert load_suite([name]).question in page
    assert all(f"`{name}`" in page for name in AXES)
    assert all(f"`{name}`" in page for name in Budget.model_fields)
    (tmp_path / "mine.toml").write_text(page.split("```toml\n")[1].split("```")[0])
    suite = load_suite([f"{tmp_path}/mine.toml"])
    assert suite.count("cpu").points > 0
