"""Wrong gates, plans and stages are caught at their own scope."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from core_arms import OFF, arm_of, assert_says, bench_of, layer_of, verdict_of

from moebench.answer import Answer
from moebench.check import judge
from moebench.providers import torch_bmm, torch_grouped
from moebench.providers.base import StagedProvider, Stages


def staged(**stages: Any) -> StagedProvider:
    """torch-grouped with other stages."""
    return replace(torch_grouped.PROVIDER, stages=replace(torch_grouped.STAGES, **stages))


def changed(routing: Any, ids: Any, weights: Any) -> Any:
    """The gate's answer with others in place of its ids and weights, as kept and as wanted."""
    return replace(routing, ids=ids, weights=weights, wanted_ids=ids, wanted_weights=weights)


def other_expert(x: Any, gate: Any, case: Any, side: Any) -> Any:
    found = torch_grouped.STAGES.gate(x, gate, case, side)
    ids = found.ids.clone()
    taken = set(ids[0].tolist())
    ids[0, -1] = next(expert for expert in range(case.layer.routed_experts) if expert not in taken)
    return changed(found, ids, found.weights)


def test_a_gate_that_picks_another_expert_is_caught() -> None:
    assert verdict_of(staged(), layer_of(), scope="gate").wrong is None
    assert verdict_of(staged(gate=other_expert), layer_of(), scope="gate").wrong == (
        "gate chose other experts than the float64 gate"
    )
    assert_says(OFF, verdict_of(staged(gate=other_expert), layer_of(), scope="layer").wrong)


def test_a_gate_with_other_weights_is_caught() -> None:
    def halved(*given: Any) -> Any:
        found = torch_grouped.STAGES.gate(*given)
        return changed(found, found.ids, found.weights / 2)

    assert_says("relative error 0.5 ", verdict_of(staged(gate=halved), layer_of(), scope="gate").wrong)


def test_a_gate_of_another_shape_is_caught() -> None:
    def fewer(*given: Any) -> Any:
        found = torch_grouped.STAGES.gate(*given)
        return changed(found, found.ids[:, :1], found.weights[:, :1])

    assert_says(
        r"ids of shape \[37, 1\], not \[T, K\] = \[37, 2\]",
        verdict_of(staged(gate=fewer), layer_of(), scope="gate").wrong,
    )


def test_a_gate_that_forgets_to_renormalise_is_caught() -> None:
    layer = layer_of()
    layer = replace(layer, router=replace(layer.router, normalise=True))

    def bare(x: Any, router: Any, case: Any, side: Any) -> Any:
        plain = replace(case, layer=replace(case.layer, router=replace(case.layer.router, normalise=False)))
        return torch_grouped.STAGES.gate(x, router, plain, side)

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
    answer = Answer(inputs, inputs.choice, plan, {})
    verdict = judge(arm.provider, arm.state, arm.case, arm.bench.weights, answer)
    assert verdict.wrong == f"the plan gives an expert more than its capacity of {arm.case.slots}"
    assert judge(full.provider, full.state, full.case, full.bench.weights, answer).wrong is None


WRONG_STAGES = {
    "permute": {"permute": lambda x, plan: torch_grouped.permute(x, plan).flip(0)},
    "up_projection": {"up_projection": lambda rows, w, *rest: torch_grouped.up_projection(rows, w.flip(0), *rest)},
    "down_projection": {
        "down_projection": lambda hidden, w, *rest: torch_grouped.down_projection(hidden, w.flip(0), *rest)
    },
    "combine": {"combine": lambda rows, weights, plan: torch_grouped.combine(rows, torch.ones_like(weights), plan)},
}


@pytest.mark.parametrize("scope", WRONG_STAGES)
def test_a_wrong_stage_is_caught_at_its_own_scope(scope: str) -> None:
    assert_says(OFF, verdict_of(staged(**WRONG_STAGES[scope]), layer_of(), scope=scope).wrong)
    others = set(WRONG_STAGES) - {scope}
    for other in others:  # what came before is only its input
        assert verdict_of(staged(**WRONG_STAGES[scope]), layer_of(), scope=other).wrong is None, other
