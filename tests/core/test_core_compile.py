"""torch-compile: few cases, since each compiles C++."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core_arms import arm_of, bench_of, layer_of, verdict_of

from moebench.point import Capacity
from moebench.providers.case import Case
from moebench.providers.torch_compiled import MAX_AUTOTUNE, PROVIDER, traces_grouped
from moebench.rotation import rotate


def case(precision: str, hidden: int = 32) -> Case:
    return Case(layer_of(hidden=hidden), 8, "forward", precision, Capacity(), "experts", "cpu")


def test_the_grouped_form_is_compiled_where_inductor_takes_it() -> None:
    assert traces_grouped(case("bf16"))
    assert not traces_grouped(case("fp32"))
    assert not traces_grouped(case("fp16"))
    assert not traces_grouped(case("bf16", hidden=36))  # rows of 72 bytes


def test_executed_flops_are_those_of_the_form() -> None:
    """One slot count for all experts in the bmm form; kept rows only in the grouped one."""
    padded = arm_of(PROVIDER, bench_of(layer_of(), traffic="zipf:2")).routing_facts()
    plain = arm_of("torch-bmm", bench_of(layer_of(), traffic="zipf:2")).routing_facts()
    assert padded["executed_flops"] == plain["executed_flops"] > padded["kept"] * 6 * 32 * 16
    kept = arm_of(PROVIDER, bench_of(layer_of(), traffic="zipf:2", precision="bf16"), precision="bf16").routing_facts()
    assert kept["executed_flops"] == kept["kept"] * 6 * 32 * 16


def test_a_case_is_compiled_for_its_own_sizes_whatever_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler remembers sizes by function: a second layer would be compiled for any size."""
    traced: list[list[Any]] = []

    def record(graph: Any, inputs: list[Any]) -> Any:
        traced.append(inputs)
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **more: compiler(function, backend=record))
    for number in range(1, 11):
        layer = layer_of(hidden=16 * number)
        arm_of(PROVIDER, bench_of(layer, tokens=2 * number, precision="bf16"), precision="bf16").call(0)
    assert len(traced) == 10
    assert all(isinstance(value, torch.Tensor) for inputs in traced for value in inputs)
    assert not any(isinstance(size, torch.SymInt) for inputs in traced for value in inputs for size in value.shape)


def test_max_autotune_leaves_graphs_to_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, **more: modes.append(more["mode"]) or function)
    for provider in (PROVIDER, MAX_AUTOTUNE):
        arm_of(provider, bench_of(layer_of())).call(0)
    assert modes == [None, "max-autotune-no-cudagraphs"]


@pytest.mark.slow
def test_max_autotune_against_the_oracle() -> None:
    assert verdict_of("torch-compile-max-autotune", layer_of(8, 2, hidden=64, ffn=32), 21).wrong is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "direction"), [("fp32", "forward"), ("fp32", "forward_backward"), ("bf16", "forward_backward")]
)
@pytest.mark.parametrize(("capacity", "scope"), [("dropless", "experts"), (0.5, "layer")])
def test_against_the_oracle(precision: str, direction: str, capacity: Any, scope: str) -> None:
    layer = layer_of(8, 2, hidden=64, ffn=32)
    verdict = verdict_of(
        "torch-compile", layer, 21, precision=precision, direction=direction, capacity=capacity, scope=scope
    )
    assert verdict.wrong is None


@pytest.mark.slow
def test_one_token_and_other_loads() -> None:
    """Dropless slot counts change from draw to draw: the compiled form must follow."""
    arm = arm_of("torch-compile", bench_of(layer_of(), tokens=1))
    assert arm.check().wrong is None
    arm = arm_of("torch-compile", bench_of(layer_of(), tokens=37, traffic="zipf:1"))
    eager = arm_of("torch-bmm", bench_of(layer_of(), tokens=37, traffic="zipf:1"))
    for index in range(4):
        assert (arm.call(index) - eager.call(index)).abs().max() < 1e-4


@pytest.mark.slow
def test_copies_of_the_weights_are_not_compiled_for_again() -> None:
    arm = arm_of("torch-compile", bench_of(layer_of(), precision="bf16"), precision="bf16")
    for draw in range(4):
        arm.call(draw)
    rotate(arm, 1e5, 1e12)
    assert len(arm.states) > 1
    with torch.compiler.set_stance("fail_on_recompile"):
        for index in range(arm.rotation):
            arm.call(index)
