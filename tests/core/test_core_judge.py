"""A check that cannot fail is none: every wrong kernel in user_kernels.py is caught, with a reason one can act on."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from core_arms import arm_of, bench_of, layer_of, shared, user_kernel, verdict_of

from moebench.answer import Answer, sample_tokens
from moebench.check import judge
from moebench.providers import torch_bmm, torch_grouped
from moebench.providers.base import StagedProvider, Stages
from moebench.providers.load import load

NUMBER = r"[0-9.]+(e[+-]\d+)?"
OFF = rf"relative error {NUMBER} against the float64 oracle"


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
    _matches(WRONG_FORWARD[function], verdict.wrong)


def _matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text
    assert "\n" not in text


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "function", ["drops_last_pick", "ignores_weights", "up_before_gate", "gelu_for_silu", "nan_in_one_row"]
)
def test_wrong_forward_is_caught_in_16_bits_too(function: str, precision: str) -> None:
    assert verdict_of(user_kernel("right"), layer_of(), precision=precision).wrong is None
    assert verdict_of(user_kernel(function), layer_of(), precision=precision).wrong is not None


def test_ignored_drops_are_caught() -> None:
    _matches(OFF, verdict_of(user_kernel("drops_nothing"), layer_of(), capacity=0.5).wrong)
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
    _matches(WRONG_BACKWARD[function], verdict_of(user_kernel(function), layer_of(), **problem).wrong)


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


def test_rows_that_are_not_sampled_are_still_written() -> None:
    """Of 600 tokens 256 are compared; a row that nobody wrote is seen in any of them."""
    bench = bench_of(layer_of(), tokens=600)
    left_out = sorted(set(range(600)) - set(sample_tokens(bench.draws[-1].routing.wanted_ids).tolist()))[0]

    def forgets_a_row(x, *rest):
        y = load(user_kernel("right")).experts(x, *rest)
        y[left_out] = float("nan")
        return y

    provider = replace(load(user_kernel("right")), experts=forgets_a_row)
    assert arm_of(provider, bench).check().wrong == "1 of 600 rows hold NaN or infinity"
    assert arm_of(user_kernel("right"), bench).check().wrong is None


# The gate and the plan.


def staged(**stages: Any) -> StagedProvider:
    """torch-grouped with other stages."""
    return replace(torch_grouped.PROVIDER, stages=replace(torch_grouped.STAGES, **stages))


def other_expert(x: Any, router: Any, case: Any) -> Any:
    ids, weights = torch_grouped.STAGES.gate(x, router, case)
    ids = ids.clone()
    taken = set(ids[0].tolist())
    ids[0, -1] = next(expert for expert in range(case.layer.routed_experts) if expert not in taken)
    return ids, weights


def test_a_gate_that_picks_another_expert_is_caught() -> None:
    assert verdict_of(staged(), layer_of(), scope="gate").wrong is None
    assert verdict_of(staged(gate=other_expert), layer_of(), scope="gate").wrong == (
        "gate chose other experts than the float64 gate"
    )
    _matches(OFF, verdict_of(staged(gate=other_expert), layer_of(), scope="layer").wrong)


def test_a_gate_with_other_weights_is_caught() -> None:
    def halved(x: Any, router: Any, case: Any) -> Any:
        ids, weights = torch_grouped.STAGES.gate(x, router, case)
        return ids, weights / 2

    _matches("relative error 0.5 ", verdict_of(staged(gate=halved), layer_of(), scope="gate").wrong)


def test_a_gate_of_another_shape_is_caught() -> None:
    def fewer(x: Any, router: Any, case: Any) -> Any:
        ids, weights = torch_grouped.STAGES.gate(x, router, case)
        return ids[:, :1], weights[:, :1]

    _matches(
        r"ids of shape \[37, 1\], not \[T, K\] = \[37, 2\]",
        verdict_of(staged(gate=fewer), layer_of(), scope="gate").wrong,
    )


def test_a_gate_that_forgets_to_renormalise_is_caught() -> None:
    layer = layer_of()
    layer = replace(layer, router=replace(layer.router, normalise=True))

    def bare(x: Any, router: Any, case: Any) -> Any:
        plain = replace(case, layer=replace(case.layer, router=replace(case.layer.router, normalise=False)))
        return torch_grouped.STAGES.gate(x, router, plain)

    assert verdict_of(staged(), layer, scope="gate").wrong is None
    assert verdict_of(staged(gate=bare), layer, scope="gate").wrong is not None
    assert verdict_of(staged(gate=bare), layer, scope="layer").wrong is not None


def slots_changed(change: Any) -> StagedProvider:
    """torch-bmm with a plan whose slots have been tampered with."""

    def plan(ids: Any, case: Any) -> Any:
        made = torch_bmm.plan(ids, case)
        slots = made.slot2assignment.clone()
        change(slots)
        return replace(made, slot2assignment=slots)

    return replace(torch_bmm.PROVIDER, stages=replace(torch_bmm.STAGES, plan=plan))


def lose(slots: Any) -> None:
    slots[(slots >= 0).nonzero()[0]] = -1


def duplicate(slots: Any) -> None:
    filled, empty = (slots >= 0).nonzero().flatten(), (slots < 0).nonzero().flatten()
    slots[empty[0]] = slots[filled[0]]


def misplace(slots: Any) -> None:
    first, last = (slots >= 0).nonzero().flatten()[[0, -1]].tolist()
    slots[first], slots[last] = slots[last].item(), slots[first].item()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lose, "the plan does not hold each kept assignment exactly once"),
        (duplicate, "the plan does not hold each kept assignment exactly once"),
        (misplace, "the plan puts an assignment under another expert"),
    ],
)
@pytest.mark.parametrize("scope", ["plan", "permute", "up_projection", "down_projection", "combine"])
def test_a_tampered_plan_is_caught(change: Any, reason: str, scope: str) -> None:
    assert verdict_of(slots_changed(lambda slots: None), layer_of(), scope=scope, capacity=1.5).wrong is None
    assert verdict_of(slots_changed(change), layer_of(), scope=scope, capacity=1.5).wrong == reason


def in_token_order() -> Stages:
    """Rows in the order of the tokens: each is there once, under its own expert, but not grouped."""
    return replace(
        torch_grouped.STAGES,
        plan=lambda ids, case: ids.flatten(),
        row_map=lambda plan: torch.arange(plan.numel()),
        row_experts=lambda plan: plan,
    )


def test_an_ungrouped_plan_is_caught() -> None:
    provider = replace(torch_grouped.PROVIDER, stages=in_token_order())
    assert verdict_of(provider, layer_of(), scope="plan").wrong == "the plan does not group its rows by expert"


def test_a_plan_over_capacity_is_caught() -> None:
    """A provider is handed ids within capacity, so the ids are tampered with here."""
    arm = arm_of("torch-grouped", bench_of(layer_of(), traffic="zipf:2"), scope="plan", capacity=0.5)
    full = arm_of("torch-grouped", bench_of(layer_of(), traffic="zipf:2"), scope="plan")
    inputs = full.buffers[0]
    plan = torch_grouped.plan(inputs.ids, full.case)
    answer = Answer(inputs, inputs.ids, inputs.weights, plan, {})
    verdict = judge(arm.provider, arm.state, arm.case, arm.bench.weights, answer)
    assert verdict.wrong == f"the plan gives an expert more than its capacity of {arm.case.slots}"
    assert judge(full.provider, full.state, full.case, full.bench.weights, answer).wrong is None


WRONG_STAGES = {
    "permute": {"permute": lambda x, plan: torch_grouped.permute(x, plan).flip(0)},
    "up_projection": {
        "up_projection": lambda rows, w, plan, act: torch_grouped.up_projection(rows, w.flip(0), plan, act)
    },
    "down_projection": {
        "down_projection": lambda hidden, w, plan: torch_grouped.down_projection(hidden, w.flip(0), plan)
    },
    "combine": {"combine": lambda rows, weights, plan: torch_grouped.combine(rows, torch.ones_like(weights), plan)},
}


@pytest.mark.parametrize("scope", WRONG_STAGES)
def test_a_wrong_stage_is_caught_at_its_own_scope(scope: str) -> None:
    _matches(OFF, verdict_of(staged(**WRONG_STAGES[scope]), layer_of(), scope=scope).wrong)
    others = set(WRONG_STAGES) - {scope}
    for other in others:  # what came before is only its input
        assert verdict_of(staged(**WRONG_STAGES[scope]), layer_of(), scope=other).wrong is None, other


# Which tokens are looked at.


def test_all_tokens_are_looked_at_up_to_256() -> None:
    for tokens in (1, 37, 256):
        ids = torch.randint(0, 8, (tokens, 2))
        assert sample_tokens(ids).tolist() == list(range(tokens))


def test_the_sample_hits_every_active_expert() -> None:
    ids = torch.zeros(5000, 2, dtype=torch.int64)
    ids[:, 1] = 1
    rare = torch.arange(2, 200)
    at = torch.randperm(5000)[: len(rare)]
    ids[at, 1] = rare
    picked = sample_tokens(ids)
    assert len(picked) <= 256
    assert picked.tolist() == sorted(set(picked.tolist()))
    assert set(ids[picked].flatten().tolist()) == set(range(200))


def test_the_sample_spreads_over_the_tokens() -> None:
    picked = sample_tokens(torch.randint(0, 4, (10_000, 2)))
    assert 250 <= len(picked) <= 256
    assert picked.diff().max() <= 40
    assert (picked[0].item(), picked[-1].item()) == (0, 9999)


def test_many_experts_leave_no_stretch_of_tokens_out() -> None:
    picked = sample_tokens(torch.rand(10_000, 128).topk(8).indices)
    assert len(picked) <= 256
    assert picked.diff().max() <= 80


def test_dropped_assignments_do_not_count_as_hits() -> None:
    ids = torch.full((1000, 2), -1)
    ids[700, 0] = 3
    assert 700 in sample_tokens(ids).tolist()
