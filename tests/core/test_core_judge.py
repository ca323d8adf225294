"""A check that cannot fail is none: every wrong kernel in user_kernels.py is caught, with a reason one can act on."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from core_arms import NUMBER, OFF, arm_of, assert_says, bench_of, layer_of, shared, user_kernel, verdict_of

from moebench import oracle
from moebench.answer import sample_tokens
from moebench.providers.load import load
from moebench.workload import Choice, choice_of


def picks(ids: torch.Tensor) -> Choice:
    return Choice(ids, torch.ones(ids.shape))


@pytest.mark.parametrize("scope", ["experts", "layer"])
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("capacity", ["dropless", 1.0, 0.5])
def test_a_right_kernel_passes(scope: str, direction: str, capacity: Any) -> None:
    verdict = verdict_of(user_kernel("right"), shared(), scope=scope, direction=direction, capacity=capacity)
    assert verdict.wrong is None
    assert 0 < verdict.rel_error < 1e-5
    assert 0 < verdict.max_error < 1e-4
    dropless = capacity == "dropless"
    assert (verdict.fidelity_error < 1e-5) == dropless  # against the layer that drops nothing


WRONG_FORWARD = {
    "caches_output": "37 of 37 rows hold NaN or infinity",
    "caches_a_copy": OFF,
    "caches_plan": OFF,
    "unwritten_buffer": "37 of 37 rows hold NaN or infinity",
    "half_written_buffer": "19 of 37 rows hold NaN or infinity",
    "changes_x": "changed its input x",
    "changes_ids": "changed its input ids",
    "changes_weights": "changed its input weights",
    "writes_into_x": "changed its input x",
    "zeroes_w_down": "changed the layer's w_down",
    "swaps_rows_of_w_gate_up": "changed the layer's w_gate_up",
    "returns_x": OFF,
    "returns_view_of_x": OFF,
    "transposed": r"returned shape \[32, 37\], not \[37, 32\]",
    "too_few_rows": r"returned shape \[36, 32\], not \[37, 32\]",
    "other_dtype": r"returned torch.float64, not torch.float32",
    "in_bf16": rf"relative error 0.00{NUMBER} against",
    "nan_in_one_row": "1 of 37 rows hold NaN or infinity",
    "infinite_element": "1 of 37 rows hold NaN or infinity",
    "drops_expert": OFF,
    "drops_last_pick": OFF,
    "ignores_weights": OFF,
    "weights_input": OFF,
    "up_before_gate": OFF,
    "gelu_for_silu": OFF,
    "wrong_sign": OFF,
    "returns_tuple": "returned a tuple, not a tensor",
    "returns_none": "returned a NoneType, not a tensor",
}


@pytest.mark.parametrize("function", WRONG_FORWARD)
def test_wrong_forward_is_caught(function: str) -> None:
    verdict = verdict_of(user_kernel(function), layer_of())
    assert verdict.wrong is not None
    assert_says(WRONG_FORWARD[function], verdict.wrong)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "function", ["drops_last_pick", "ignores_weights", "up_before_gate", "gelu_for_silu", "nan_in_one_row"]
)
def test_wrong_forward_is_caught_in_16_bits_too(function: str, precision: str) -> None:
    assert verdict_of(user_kernel("right"), layer_of(), precision=precision).wrong is None
    assert verdict_of(user_kernel(function), layer_of(), precision=precision).wrong is not None


def test_ignored_drops_are_caught() -> None:
    assert_says(OFF, verdict_of(user_kernel("drops_nothing"), layer_of(), capacity=0.5).wrong)
    assert (
        verdict_of(user_kernel("drops_nothing"), layer_of(), capacity=8.0).wrong is not None
    )  # it raises small weights
    assert verdict_of(user_kernel("right"), layer_of(), capacity=8.0).wrong is None


WRONG_BACKWARD = {
    "detached_output": "no gradient reached x",
    "detached_weights": "no gradient reached weights",
    "detached_x": "no gradient reached x",
    "detached_w_down": "no gradient reached w_down",
    "scaled_dx": rf"gradient of x: relative error (1|{NUMBER}) against",
    "scaled_dweights": "gradient of weights: relative error 1 against",
    "scaled_dw_gate_up": "gradient of w_gate_up: relative error 1 against",
    "gradient_for_idle_experts": "gradient of w_down is not zero for experts that no token chose",
    "zeroes_w_down": "changed the layer's w_down",
    "transposed": r"returned shape \[32, 7\], not \[7, 32\]",
    "other_dtype": r"returned torch.float64, not torch.float32",
    "returns_tuple": "returned a tuple, not a tensor",
    "returns_none": "returned a NoneType, not a tensor",
    "returns_x": "no gradient reached weights",
}


@pytest.mark.parametrize("function", WRONG_BACKWARD)
def test_wrong_backward_is_caught(function: str) -> None:
    """A few tokens on one favoured pair of experts: most are idle."""
    problem = {"tokens": 7, "traffic": "zipf:6", "direction": "forward_backward"}
    assert verdict_of(user_kernel("right"), layer_of(), **problem).wrong is None
    assert_says(WRONG_BACKWARD[function], verdict_of(user_kernel(function), layer_of(), **problem).wrong)


@pytest.mark.parametrize("function", ["scaled_dx", "scaled_dweights", "scaled_dw_gate_up", "gradient_for_idle_experts"])
def test_their_forward_is_right(function: str) -> None:
    assert verdict_of(user_kernel(function), layer_of()).wrong is None


def test_what_raises_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="no kernel image is available"):
        verdict_of(user_kernel("raises"), layer_of())


@pytest.mark.parametrize("function", ["zeroes_w_down", "swaps_rows_of_w_gate_up"])
def test_changed_weights_are_put_right_for_the_others(function: str) -> None:
    bench = bench_of(layer_of())
    before = {name: value.clone() for name, value in bench.weights.tensors().items()}
    honest = arm_of("torch-bmm", bench)
    assert arm_of(user_kernel(function), bench).check().wrong is not None
    for name, value in bench.weights.tensors().items():
        assert torch.equal(value, before[name]), name
    assert honest.check().wrong is None


def test_weights_changed_on_the_way_to_an_exception_are_put_right() -> None:
    bench = bench_of(layer_of())
    before = bench.weights.w_down.clone()

    def spoils_and_raises(x, ids, weights, w_gate_up, w_down):
        w_down.zero_()
        raise RuntimeError("out of luck")

    provider = replace(load(user_kernel("right")), experts=spoils_and_raises)
    with pytest.raises(RuntimeError, match="out of luck"):
        arm_of(provider, bench).check()
    assert torch.equal(bench.weights.w_down, before)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
def test_what_the_oracle_said_is_told_to_the_arms_it_is_for(direction: str) -> None:
    """The arms of a block share its answers: other scopes, capacities and providers ask their own questions."""
    bench = bench_of(shared("sigmoid_gate"), direction=direction)
    questions = itertools.product(
        ("experts", "layer"), ("dropless", 1.0, 0.5), ("torch-bmm", "dense-ffn", user_kernel("right"))
    )
    for scope, capacity, provider in [*questions] * 2:
        assert arm_of(provider, bench, scope=scope, capacity=capacity).check().wrong is None, (
            scope,
            capacity,
            provider,
        )
        assert arm_of(user_kernel("drops_nothing"), bench, scope=scope, capacity=0.5).check().wrong is not None


def test_the_oracle_is_asked_once_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, asked = bench_of(layer_of(), direction="forward_backward"), []
    answer = oracle.ffn
    monkeypatch.setattr(oracle, "ffn", lambda *args: (asked.append(1), answer(*args))[1])
    first, again = ([arm_of(name, bench).check().rel_error, len(asked)] for name in ("torch-loop", "torch-loop"))
    assert first == again
    assert first[1] > 0


def test_rows_that_are_not_sampled_are_still_written() -> None:
    """Of 600 tokens 256 are compared; a row that nobody wrote is seen in any of them."""
    bench = bench_of(layer_of(), tokens=600)
    left_out = sorted(set(range(600)) - set(sample_tokens(choice_of(bench.draws[-1].routing), 600).tolist()))[0]

    def forgets_a_row(x, *rest):
        y = load(user_kernel("right")).experts(x, *rest)
        y[left_out] = float("nan")
        return y

    provider = replace(load(user_kernel("right")), experts=forgets_a_row)
    assert arm_of(provider, bench).check().wrong == "1 of 600 rows hold NaN or infinity"
    assert arm_of(user_kernel("right"), bench).check().wrong is None


# Which tokens are looked at.


def test_all_tokens_are_looked_at_up_to_256() -> None:
    for tokens in (1, 37, 256):
        ids = torch.randint(0, 8, (tokens, 2))
        assert sample_tokens(picks(ids), tokens).tolist() == list(range(tokens))


def test_the_sample_hits_every_active_expert() -> None:
    ids = torch.zeros(5000, 2, dtype=torch.int64)
    ids[:, 1] = 1
    rare = torch.arange(2, 200)
    at = torch.randperm(5000)[: len(rare)]
    ids[at, 1] = rare
    picked = sample_tokens(picks(ids), 5000)
    assert len(picked) <= 256
    assert picked.tolist() == sorted(set(picked.tolist()))
    assert set(ids[picked].flatten().tolist()) == set(range(200))


def test_the_sample_spreads_over_the_tokens() -> None:
    picked = sample_tokens(picks(torch.randint(0, 4, (10_000, 2))), 10_000)
    assert 250 <= len(picked) <= 256
    assert picked.diff().max() <= 40
    assert (picked[0].item(), picked[-1].item()) == (0, 9999)


def test_many_experts_leave_no_stretch_of_tokens_out() -> None:
    picked = sample_tokens(picks(torch.rand(10_000, 128).topk(8).indices), 10_000)
    assert len(picked) <= 256
    assert picked.diff().max() <= 80


def test_dropped_assignments_do_not_count_as_hits() -> None:
    ids = torch.full((1000, 2), -1)
    ids[700, 0] = 3
    assert 700 in sample_tokens(picks(ids), 1000).tolist()
