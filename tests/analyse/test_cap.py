"""CAP scores: ratios to a named baseline, on axes that others cannot move."""

import numpy as np
import pytest
from analyse.tables import record, table

from moebench.analyse import cap, find_baseline

AXES = ["throughput at prefill", "latency at decode", "fidelity", "peak memory", "energy", "cost"]


def problem(tokens, latencies, **over):
    return [
        record(
            name, [ms] * 8, tokens=tokens, block_id=f"b{tokens}", tokens_per_s=tokens * 1e3 / ms, **over.get(name, {})
        )
        for name, ms in latencies.items()
    ]


def scores(found):
    return {(row.variant, row.axis): row for row in found.scores.itertuples()}


def test_largest_tokens_are_prefill_and_smallest_decode():
    rows = table(*problem(1, {"base": 4.0, "x": 2.0}), *problem(16, {"base": 1.0, "x": 1.0}),
                 *problem(256, {"base": 30.0, "x": 10.0}))  # fmt: skip
    found = scores(cap(rows, "base"))
    assert found["x", AXES[0]].ratio == pytest.approx(3)
    assert found["x", AXES[1]].ratio == pytest.approx(2)
    assert [found["x", axis].n for axis in AXES[:3]] == [1, 1, 3]
    assert all(found["base", axis].ratio == pytest.approx(1) for axis in AXES[:3])


def test_phase_labels_rule_where_they_are():
    rows = table(
        *[row.model_copy(update={"phase": "prefill"}) for row in problem(256, {"base": 3.0, "x": 1.0})],
        *[row.model_copy(update={"phase": "decode"}) for row in problem(512, {"base": 8.0, "x": 2.0})],
    )
    found = scores(cap(rows, "base"))
    assert found["x", AXES[0]].ratio == pytest.approx(3)
    assert found["x", AXES[1]].ratio == pytest.approx(4)


def test_one_token_count_has_no_decode_and_says_why():
    found = cap(table(*problem(16, {"base": 4.0, "x": 2.0})), "base")
    assert scores(found)["x", AXES[0]].ratio == pytest.approx(2)
    assert np.isnan(scores(found)["x", AXES[1]].ratio)
    assert "one token count" in scores(found)["x", AXES[1]].reason


def test_adding_a_system_moves_no_other():
    two = {"base": 4.0, "x": 2.0}
    before = scores(cap(table(*problem(1, two), *problem(64, two)), "base"))
    three = two | {"monster": 0.01}
    after = scores(cap(table(*problem(1, three), *problem(64, three)), "base"))
    assert all(after[key].ratio == pytest.approx(row.ratio, nan_ok=True) for key, row in before.items())


def test_geometric_mean_over_the_problems_in_common():
    memory = {"x": {"peak_memory_bytes": 100}, "base": {"peak_memory_bytes": 200}}
    eightfold = {"x": {"peak_memory_bytes": 100}, "base": {"peak_memory_bytes": 800}}
    rows = table(*problem(1, {"base": 1.0, "x": 1.0}, **memory), *problem(2, {"base": 1.0, "x": 1.0}, **eightfold),
                 *problem(4, {"x": 1.0}, **memory))  # fmt: skip
    score = scores(cap(rows, "base"))["x", "peak memory"]
    assert (score.ratio, score.n) == (pytest.approx(4), 2)


def test_fidelity_is_a_ratio_of_correct_digits_and_noise_is_no_difference():
    errors = {"base": {"fidelity_error": 3e-7}, "noisy": {"fidelity_error": 1e-8}, "bf16": {"fidelity_error": 1e-3},
              "wrong": {"fidelity_error": 1.7}}  # fmt: skip
    found = scores(cap(table(*problem(1, dict.fromkeys(errors, 1.0), **errors)), "base"))
    assert found["noisy", "fidelity"].ratio == pytest.approx(1)
    assert found["bf16", "fidelity"].ratio == pytest.approx(0.5)
    assert 0 < found["wrong", "fidelity"].ratio < 0.01


def test_cost_is_left_out_where_it_repeats_latency_and_kept_where_not():
    def priced(per_second):
        base = {"usd_per_mtok": 1e6 * 1.0 / 4e3}
        return table(*problem(16, {"base": 4.0, "x": 2.0}, base=base, x={"usd_per_mtok": 1e6 * per_second / 8e3}))

    same = cap(priced(1.0), "base")
    assert [axis.name for axis in same.axes] == AXES[:5]
    assert "repeat latency" in same.left_out["cost"]
    own = cap(priced(1.5), "base")
    assert [axis.name for axis in own.axes] == AXES
    assert scores(own)["x", "cost"].ratio == pytest.approx(2 / 1.5)


def test_missing_axes_stay_in_place_with_their_reason():
    found = cap(table(*problem(16, {"base": 4.0, "x": 2.0})), "base")
    missing = {axis.name: axis.missing for axis in found.axes}
    assert list(missing) == AXES
    assert "energy source" in missing["energy"]
    assert "price" in missing["cost"]


def test_yardsticks_and_other_scopes_have_no_score():
    rows = table(*problem(16, {"base": 4.0}), record("dense-ffn", [1.0] * 8, role="yardstick", block_id="b16"),
                 record("base", [0.1] * 8, scope="gate", block_id="b16"))  # fmt: skip
    found = cap(rows, "base")
    assert set(found.scores["variant"]) == {"base"}
    assert scores(found)["base", "fidelity"].n == 1


def test_baseline_by_default_by_variant_and_by_provider():
    rows = table(*problem(1, {"a": 1.0, "torch-loop": 1.0}), *problem(4, {"a": 1.0, "torch-loop": 1.0}))
    assert find_baseline(rows) == "torch-loop"
    rows = table(*problem(1, {"a": 1.0, "torch-loop": 1.0}), *problem(4, {"a": 1.0}))
    assert find_baseline(rows) == "a"
    assert find_baseline(rows, "torch-loop") == "torch-loop"
    capped = [row.model_copy(update={"capacity_factor": 1.0, "point_id": "x"}) for row in problem(1, {"a": 1.0})]
    rows = table(*problem(1, {"a": 1.0, "b": 1.0}, a={"precision": "bf16"}), *problem(4, {"a": 1.0}), *capped)
    assert sorted(set(rows["variant"])) == ["a bf16", "a fp32", "a fp32 cap 1", "b fp32"]
    assert find_baseline(rows, "b") == "b fp32"
    assert find_baseline(rows, "a bf16") == "a bf16"
    assert find_baseline(rows.iloc[:0], "b") is None


def test_an_unknown_baseline_names_the_nearest():
    rows = table(*problem(1, {"torch-bmm": 1.0, "torch-loop": 1.0}))
    for refuse in (find_baseline, cap):
        with pytest.raises(
            ValueError, match="'torch-lop' has no measured row; nearest: 'torch-loop'; measured are torch-bmm"
        ):
            refuse(rows, "torch-lop")
