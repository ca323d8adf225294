"""Targets: each with a table that meets it, one that misses it by 0.1 %, one without its rows, one of failed rows."""

from __future__ import annotations

import pandas as pd
import pytest
from moebench_suites.published.ratios import OURS, Missing, points_of
from moebench_suites.published.runs import rows_of
from moebench_suites.published.target_table import Target, parsed, read_targets
from moebench_suites.published.verdicts import NO_GPU, rounded, targets_block
from published.straw_runs import CPU, H100, H200, read, timed, untimed

from moebench.suite import load_suite

TARGETS = {target.id: target for target in read_targets()}
TIMED = [target for target in TARGETS.values() if target.suites]
# One row that counts for each target: what its `where` asks for.
COUNTS = {
    "gemm-of-dense": {"scope": "down_projection", "tokens": 16384},
    "gemm-over-torch": {"scope": "up_projection", "tokens": 16384},
    "gemm-over-deepgemm": {"scope": "layer", "tokens": 16384},
    "layer-of-dense": {"tokens": 32768},
    "layer-over-torch": {"tokens": 32768, "scope": "experts"},
    "training-of-dense": {"tokens": 32768, "direction": "forward_backward"},
    "decode-16-to-128": {"tokens": 128},
    "decode-1-to-8": {"tokens": 8},
    "decode-over-peers": {"tokens": 1},
    "middle-over-vllm": {"tokens": 512},
    "fp8-row-over-bf16": {"precision": "fp8:row", "tokens": 4096},
    "fp8-128-over-bf16": {"precision": "fp8:128", "tokens": 4096},
    "int8-over-bf16": {"precision": "int8", "tokens": 4096},
    "w4a16-over-bf16": {"precision": "w4a16:128", "tokens": 32},
    "permute-combine-of-copy": {"scope": "combine", "tokens": 8192},
    "routing-share": {"tokens": 8192},
    "routing-share-gathered": {"tokens": 8192, "scope": "experts"},
    "routing-microseconds": {"scope": "gate", "tokens": 128},
}


def block(target, value, block_id="b", failed=False, **more):
    """A block in which one of our rows counts for the target, and its ratio is `value` (or the row failed)."""
    at = {**COUNTS[target.id], "block_id": block_id, **more}
    rate = {"of_gemm": "tflops", "of_copy": "gbytes_per_s"}.get(target.measure)
    numbers = {rate: 400.0} if rate else {}
    ours = untimed("triton", **at) if failed else timed("triton", 1.0, **numbers, **at)
    return [ours, *_against(target, value, at)]


def _against(target, value, at):
    unlike = timed("torch-bmm", 0.001, **{**at, "scope": "plan"})  # fast at something else
    if target.measure in ("of_gemm", "of_copy"):
        # The yardstick has twice the work of our row, so equal rates mean twice our latency.
        name, rate = ("gemm", "tflops") if target.measure == "of_gemm" else ("copy", "gbytes_per_s")
        latency = 2 * value
        return [unlike, timed(name, latency, role="yardstick", **{**at, rate: 2 * 400.0 / latency, "scope": "layer"})]
    if target.measure == "over_rival":
        rivals = target.rivals or ("liger", "torch-grouped")
        faults = untimed("torch-loop", **at), timed("dense-ffn", 0.01, **{**at, "role": "yardstick"})
        return [unlike, *faults, *(timed(name, value * (1 + place), **at) for place, name in enumerate(rivals))]
    if target.measure == "over_bf16":
        return [unlike, timed("triton", value, **{**at, "precision": "bf16"})]
    whole = 1e-3 * value if target.measure == "total_us" else value
    if at.get("scope") == "experts":  # then the layer is the gate longer: (gate + whole / 2) / (1 + gate) = whole
        parts = {"gate": whole / 2 / (1 - whole), "plan": whole / 4, "combine": whole / 4}
    else:
        parts = dict.fromkeys(target.stages, whole / len(target.stages))
    return [unlike, *(timed("triton", ms, **{**at, "scope": stage}) for stage, ms in parts.items()
                      if stage != at.get("scope"))]  # fmt: skip


def bound(target):
    return target.at_least or target.at_most


def just(target, met):
    """0.1 % on the right or on the wrong side of the target."""
    return bound(target) * (1.001 if (target.at_least is not None) == met else 0.999)


def line(text, target):
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {target.text} |")]
    return [cell.strip() for cell in found.strip("|").split(" | ")]


def verdict(target, rows, device=H200):
    return line(targets_block([read(target.suites[0], rows, device)], [target]), target)


def fix_gate(target, rows, value):
    """A stage that is itself the row that counts has its share of the sum."""
    if target.measure != "total_us":
        return rows
    return [timed("triton", 1e-3 * value / len(target.stages), **COUNTS[target.id], block_id="b"), *rows[1:]]


@pytest.mark.parametrize("target", TIMED, ids=lambda target: target.id)
def test_a_table_that_meets_it_by_a_thousandth_is_met(target):
    value = just(target, True)
    found = verdict(target, fix_gate(target, block(target, value), value))
    assert found[2] == "**met**"
    assert found[4].startswith(rounded(target, value))
    assert found[7] == "1"


@pytest.mark.parametrize("target", TIMED, ids=lambda target: target.id)
def test_a_table_that_misses_it_by_a_thousandth_is_not_met(target):
    value = just(target, False)
    found = verdict(target, fix_gate(target, block(target, value), value))
    assert found[2] == "not met: 0 of 1"
    assert f"{bound(target):.3f}" not in found[4]


@pytest.mark.parametrize("target", TIMED, ids=lambda target: target.id)
def test_a_table_without_its_rows_is_not_measured(target):
    found = verdict(target, [timed("triton", 1.0, tokens=256, traffic="zipf:1.2", scope="plan")])
    assert found[2] == f"not measured: no such row in {target.suites[0]}"
    assert found[4:] == ["", "", "", "0"]


@pytest.mark.parametrize("target", TIMED, ids=lambda target: target.id)
def test_a_table_of_failed_rows_is_not_measured_and_says_why(target):
    found = verdict(target, block(target, just(target, True), failed=True))
    assert found[2] == "not measured: 1 without a ratio (triton failed: it raised RuntimeError: no)"


def test_every_target_is_tried_above():
    assert set(COUNTS) == {target.id for target in TIMED}
    assert [target.id for target in TARGETS.values() if not target.suites] == ["gather-free"]


def suite_rows(name):
    """What our rows of a suite on a GPU say of themselves."""
    rows = []
    for block in load_suite([name]).blocks("cuda"):
        problem, layer = block.problem, block.problem.layer
        shape = {"hidden_size": layer.hidden_size, "expert_ffn_size": layer.expert_ffn_size, "top_k": layer.top_k,
                 "routed_experts": layer.routed_experts}  # fmt: skip
        told = {"tokens": problem.tokens, "direction": problem.direction, "traffic": problem.traffic}
        rows += [{**shape, **told, "scope": variant.scope, "precision": variant.precision, "others": block.variants}
                 for variant in block.variants if variant.provider == OURS]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize("target", TIMED, ids=lambda target: target.id)
def test_the_suites_hold_rows_of_it_with_what_they_are_held_against(target):
    for name in target.suites:
        found = suite_rows(name).query(target.where, engine="python")
        assert len(found), name
        for row in found.itertuples():
            scopes = {each.scope for each in row.others if each.provider == OURS}
            assert set(target.stages) <= scopes
            assert target.measure != "over_bf16" or "bf16" in {each.precision for each in row.others}
        rivals = {each.provider for variants in found["others"] for each in variants} - {OURS}
        if target.measure == "over_rival" and target.id != "middle-over-vllm":  # which no suite can install
            assert rivals & set(target.rivals) if target.rivals else rivals


def test_the_worst_point_decides_and_every_point_without_a_ratio_counts_against_it():
    target = TARGETS["gemm-of-dense"]
    rows = block(target, 0.9, "b1") + block(target, 0.86, "b2", tokens=32768) + block(target, 0.95, "b3", tokens=65536)
    found = verdict(target, rows)
    assert found[2] == "**met**"
    assert found[4].startswith("0.860 (0.860–0.860) at qwen3-30b-a3b T 32,768 down\\_projection uniform")
    assert found[5:] == ["0.900", "0.950", "3"]
    found = verdict(target, [*rows, *block(target, 0.9, "b4", failed=True)])
    assert found[2] == "partly: 3 of 4, 1 without a ratio (triton failed: it raised RuntimeError: no)"
    found = verdict(target, rows + block(target, 0.8499999, "b4"))
    assert found[2] == "partly: 3 of 4"
    assert found[4].startswith("0.849 ")


@pytest.mark.parametrize("flag", ["throttled:sw_power_cap", "contended", "not_settled"])
def test_flagged_rows_count_and_are_named(flag):
    target = TARGETS["decode-16-to-128"]
    rows = block(target, 0.95) + block(target, 0.96, "b2", tokens=64, flags=[flag])
    found = verdict(target, rows)
    assert found[2] == f"**met**; flagged 1 of 2: {flag.replace('_', chr(92) + '_')} 1"


def test_a_reason_written_by_hand_is_kept_where_the_target_is_not_met():
    target = TARGETS["decode-1-to-8"].model_copy(update={"why": "Two launches."})
    assert verdict(target, block(target, 0.7))[2] == "not met: 0 of 1; Two launches."
    assert verdict(target, block(target, 0.8))[2] == "**met**"


def test_printed_numbers_never_reach_the_target_by_rounding():
    least, most, micro = TARGETS["gemm-of-dense"], TARGETS["routing-share"], TARGETS["routing-microseconds"]
    assert [rounded(least, value) for value in (0.8499999999, 0.85, 0.29, 1.0)] == ["0.849", "0.850", "0.290", "1.000"]
    assert [rounded(most, value) for value in (0.0500001, 0.05)] == ["0.051", "0.050"]
    assert [rounded(micro, value) for value in (15.0001, 15.0)] == ["15.1", "15.0"]


def test_what_does_not_count():
    """Skewed traffic, few rows an expert, another precision; arms of other blocks; rows of a CPU."""
    target = TARGETS["gemm-over-torch"]
    others = [
        block(target, 0.5, "s", traffic="zipf:1.2"), block(target, 0.5, "t", tokens=16383),
        block(target, 0.5, "p", precision="fp16"),
    ]  # fmt: skip
    found = verdict(target, [*block(target, 1.1), *(row for rows in others for row in rows)])
    assert (found[2], found[7]) == ("**met**", "1")
    lonely, elsewhere = block(target, 1.1)[:1], block(target, 1.1, "other")[1:]
    found = verdict(target, lonely + elsewhere)
    assert found[2] == "not measured: 1 without a ratio (no torch-grouped in its block)"
    assert verdict(target, block(target, 1.1), CPU)[2] == NO_GPU


def test_a_rival_that_is_not_there_says_why():
    target = TARGETS["middle-over-vllm"]
    rows = [*block(target, 2.0)[:1], untimed("vllm", "unavailable", **COUNTS[target.id], block_id="b")]
    found = verdict(target, rows)
    assert found[2] == "not measured: 1 without a ratio (vllm unavailable: it raised RuntimeError: no)"


def test_every_gpu_has_a_table_of_its_own():
    target = TARGETS["decode-1-to-8"]
    runs = [read("h200-decode", block(target, value), gpu) for value, gpu in ((0.8, H200), (0.7, H100))]
    text = targets_block(runs, [target])
    h100, h200 = text.split("\n\n**NVIDIA H200**")
    assert h100.startswith("**NVIDIA H100 80GB HBM3**: 2026-11-27, torch 2.11.0, triton 3.6.0, commit 1a2b3c4d5e\n")
    assert line(h100, target)[2] == "not met: 0 of 1"
    assert line(h200, target)[2] == "**met**"


def test_sums_of_stages_pair_round_by_round():
    """A layer that slows down with its stages has the same share; its interval says so."""
    target, at = TARGETS["routing-share"], {**COUNTS["routing-share"], "block_id": "b"}
    drift = [1.0 + 0.1 * each for each in range(8)]
    stages = [timed("triton", 1.0, **{**at, "scope": stage}) for stage in target.stages]
    rows = [timed("triton", 1.0, **at), *stages]
    rows = [row.model_copy(update={"samples_ms": [ms * each for each in drift], "sample_round": list(range(8))})
            for row, ms in zip(rows, [1.0, 0.01, 0.01, 0.01, 0.01], strict=True)]  # fmt: skip
    (found,) = points_of(target, rows_of([read("h200-stages", rows)]))
    assert (found.value, found.low, found.high) == pytest.approx((0.04, 0.04, 0.04))


def test_rows_without_common_rounds_have_no_interval():
    target = TARGETS["decode-over-peers"]
    rows = block(target, 1.6)
    rows = [row.model_copy(update={"sample_round": [100 + each for each in row.sample_round]})
            if row.provider == "triton" else row for row in rows]  # fmt: skip
    assert verdict(target, rows)[4].startswith("1.600 (too few rounds for an interval) at")


def test_a_share_needs_every_stage():
    target = TARGETS["routing-share"]
    rows = [row for row in block(target, 0.04) if row.scope != "combine"]
    assert points_of(target, rows_of([read("h200-stages", rows)])) == [
        Missing("qwen3-30b-a3b T 8,192 layer uniform", "no triton combine in its block")
    ]


def test_whatever_is_not_measured_beside_ours_says_what_it_is():
    def reason(name, provider, scope):
        kept = {"scope", "tokens", "precision", "role", "block_id"}
        rows = block(TARGETS[name], 1.0)
        place = [(row.provider, row.scope) for row in rows].index((provider, scope))
        rows[place] = untimed(provider, **rows[place].model_dump(include=kept))
        (found,) = points_of(TARGETS[name], rows_of([read("s", rows)]))
        return found.reason

    assert reason("decode-16-to-128", "copy", "layer") == "copy failed: it raised RuntimeError: no"
    assert reason("routing-share", "triton", "gate") == "gate: triton failed: it raised RuntimeError: no"
    assert reason("layer-over-torch", "torch-grouped", "experts") == "torch-grouped failed: it raised RuntimeError: no"


def test_a_condition_that_no_column_answers_is_one_line():
    target = TARGETS["decode-1-to-8"].model_copy(update={"where": "batch <= 8"})
    run = read("h200-decode", block(TARGETS["decode-1-to-8"], 0.8))
    with pytest.raises(ValueError, match=r"^targets.toml: decode-1-to-8: where: name 'batch' is not defined$"):
        points_of(target, rows_of([run]))


def test_a_rate_that_is_not_known_makes_no_ratio():
    rows = [row.model_copy(update={"tflops": None}) for row in block(TARGETS["layer-of-dense"], 0.8)]
    (found,) = points_of(TARGETS["layer-of-dense"], rows_of([read("kernels", rows)]))
    assert found.reason == "a rate of it or of its yardstick is not known"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[target", "not TOML: "),
        ("x = 1", r"expected \[\[target\]\] tables"),
        ("target = [1]", r"expected \[\[target\]\] tables"),
        ('[[target]]\nid = "a"\ntext = "a"\nmeasure = "fast"\nsuites = []\nat_least = 1', "measure: Input should be"),
        ('[[target]]\nid = "a"\ntext = "a"\nmeasure = "share"\nsuites = []\nat_least = 1\nwhen = 1', "when: Extra"),
    ],
)
def test_a_broken_file_of_targets_is_one_line(text, said):
    with pytest.raises(ValueError, match=f"^targets.toml: {said}") as error:
        parsed(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bounds", [{}, {"at_least": 1.0, "at_most": 2.0}])
def test_a_target_has_one_bound(bounds):
    with pytest.raises(ValueError, match="needs one of at_least and at_most"):
        Target(id="x", text="x", measure="share", suites=(), **bounds)
