"""`--set axis=value,value`: typed by the axis, in place of what the file says, checked the same way."""

import re

import pytest

from moebench.suite import SuiteError, load_suite

FILE = """
name = "made"
question = "What do overrides do?"
[defaults]
precision = "fp32"
[[sweep]]
where = "top_k < experts"
[sweep.grid]
hidden_size = 16
expert_ffn_size = 8
experts = [4, 8]
top_k = 2
provider = ["torch-loop", "torch-bmm"]
[sweep.zip]
tokens = [1, 64]
phase = ["decode", "prefill"]
[[sweep]]
[[sweep.points]]
model = "mixtral-8x7b"
tokens = 4
provider = "torch-loop"
[[sweep.points]]
model = "dbrx"
tokens = 4
provider = "torch-loop"
"""


@pytest.fixture
def points(tmp_path):
    path = tmp_path / "made.toml"
    path.write_text(FILE)

    def load(**overrides):
        suite = load_suite([str(path)], overrides)
        return [point for block in suite.blocks("cpu") for point in block.points()]

    return load


def test_without_overrides(points):
    assert len(points()) == 10


def test_a_grid_axis_is_replaced(points):
    found = points(provider=["triton"])
    assert {point.variant.provider for point in found} == {"triton"}
    assert len(found) == 6


def test_a_zipped_axis_leaves_the_zip(points):
    found = [point.problem for point in points(tokens=["2", "3"]) if point.problem.model == "custom"]
    assert {(each.tokens, each.phase) for each in found} == {
        (2, "decode"), (3, "decode"), (2, "prefill"), (3, "prefill"),
    }  # fmt: skip


def test_an_axis_of_explicit_rows_and_of_defaults_is_replaced(points):
    found = points(precision=["bf16"], model=["olmoe-1b-7b"], tokens=["7"])
    assert {(point.problem.tokens, point.variant.precision) for point in found} == {(7, "bf16")}
    # The plain shape goes; its experts and picks stay and override the model's.
    assert {point.problem.model for point in found} == {"olmoe-1b-7b*", "olmoe-1b-7b"}
    assert len(found) == 9


def test_values_are_typed_by_their_axis(points):
    found = points(capacity_factor=["1.5", "dropless", "2"], traffic=["zipf:1.0"], seed=["3"])
    assert {point.variant.capacity_factor for point in found} == {1.5, 2.0, "dropless"}
    assert {(point.problem.traffic, point.problem.seed) for point in found} == {("zipf:1", 3)}


def test_an_axis_the_file_does_not_name_is_added(points):
    assert {point.problem.direction for point in points(direction=["forward_backward"])} == {"forward_backward"}


def test_where_and_the_layers_own_rules_still_prune(points):
    found = points(top_k=["4", "8"])
    assert {(p.problem.layer.top_k, p.problem.layer.routed_experts) for p in found} == {
        (4, 8),
        (8, 8),
        (4, 16),
        (8, 16),
    }


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"tokns": ["1"]}, "--set: unknown axis 'tokns'; did you mean tokens"),
        ({"tokens": ["x"]}, "--set tokens=x: found 'x'; allowed: whole numbers"),
        ({"tokens": ["1", "1"]}, "--set tokens=1,1: 1 is given twice"),
        ({"tokens": []}, "--set tokens=: is empty"),
        ({"tokens": [""]}, "--set tokens=: found ''"),
        ({"tokens": ["1.5"]}, "--set tokens=1.5: found 1.5"),
        ({"tokens": ["9" * 5000]}, "--set tokens: found"),
        ({"capacity_factor": ["nan"]}, "--set capacity_factor=nan: found nan"),
        ({"capacity_factor": ["inf"]}, "--set capacity_factor=inf: found inf"),
        ({"provider": ["torch-lop"]}, "--set provider=torch-lop: provider 'torch-lop' is not known; did you mean"),
        ({"traffic": ["zipf"]}, "--set traffic=zipf: traffic 'zipf'"),
        ({"top_k": ["2", "99"]}, "--set top_k=99: is in no point"),
        ({"top_k": ["99"]}, "--set top_k=99: is in no point"),
        ({"model": ["dbrx"], "hidden_size": ["8"]}, "--set model: a model and hidden_size or expert_ffn_size cannot"),
        ({"hidden_size": ["8"]}, "sweep 2: expert_ffn_size: is missing"),
    ],
)  # fmt: skip
def test_faults_name_the_override(points, overrides, says):
    with pytest.raises(SuiteError, match=re.escape(says)) as error:
        points(**overrides)
    assert all("\n" not in fault for fault in error.value.faults)


def test_digest_follows_text_and_overrides(tmp_path):
    path = tmp_path / "made.toml"
    path.write_text(FILE)
    first = load_suite([str(path)])
    assert load_suite([str(path)]).digest == first.digest
    assert load_suite([str(path)], {"tokens": ["1"]}).digest != first.digest
    path.write_text(FILE + "# a comment\n")
    assert load_suite([str(path)]).digest != first.digest
    assert first.text == FILE
