"""Work: FLOPs and bytes against published figures, tensors' own sizes and PyTorch's FLOP counter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from core_arms import arm_of, bench_of, layer_of, shared
from torch.utils.flop_counter import FlopCounterMode

from moebench.catalogue.models import resolve_layer
from moebench.catalogue.spec import LayerSpec
from moebench.point import STAGES, Problem, Variant
from moebench.routing.forms import active_experts
from moebench.work import dense_work, expected_active, point_work, stage_work

GATED, UNGATED = layer_of(activation="swiglu"), layer_of(activation="relu")
SHARED = [shared("add"), shared("sigmoid_gate"), shared("add", activation="gelu")]


def work(
    layer: LayerSpec,
    tokens: int = 10,
    *,
    scope: str = "layer",
    direction: str = "forward",
    precision: str = "fp32",
    **routed,
):
    return point_work(Problem("m", layer, tokens, direction=direction), Variant("p", precision, scope=scope), **routed)


def test_mixtral_by_hand() -> None:
    layer = resolve_layer("mixtral-8x7b")[1].layer
    D, F, E, K, T, b = 4096, 14336, 8, 2, 16, 2
    found = work(layer, T, precision="bf16", active_experts=7, kept=30)
    assert found.flops == T * 2 * E * D + 30 * 6 * D * F
    assert found.weight_bytes == b * (7 * 3 * D * F + E * D)
    assert found.input_bytes == found.output_bytes == T * D * b
    assert found.compulsory_bytes == found.weight_bytes + 2 * T * D * b
    assert work(layer, T, scope="experts").flops == T * K * 6 * D * F  # no router; all assignments kept


def test_ungated_experts_take_two_maps_for_three() -> None:
    gated, ungated = (work(layer, scope="experts", active_experts=3, kept=20) for layer in (GATED, UNGATED))
    D, F = 32, 16
    assert (gated.flops, gated.weight_bytes) == (20 * 6 * D * F, 3 * 3 * D * F * 4)
    assert (ungated.flops, ungated.weight_bytes) == (20 * 4 * D * F, 3 * 2 * D * F * 4)


@pytest.mark.parametrize(
    "layer", [GATED, UNGATED, *SHARED], ids=lambda layer: f"{layer.activation}-{layer.shared_combine}"
)
def test_weight_bytes_are_those_of_the_tensors(layer: LayerSpec) -> None:
    bench = bench_of(layer, tokens=3, traffic="zipf:3", precision="bf16")
    hit = bench.draws[0].routing.ids.unique()
    tensors = bench.weights.tensors()
    whole = {name: value[hit] if name in ("w_gate_up", "w_down") else value for name, value in tensors.items()}
    assert len(hit) < layer.routed_experts
    found = work(layer, 3, precision="bf16", active_experts=len(hit))
    assert found.weight_bytes == sum(value.nbytes for value in whole.values())
    assert work(layer, 3, precision="bf16", scope="experts", active_experts=len(hit)).weight_bytes == sum(
        whole[name].nbytes for name in ("w_gate_up", "w_down")
    )


@pytest.mark.parametrize("scope", ["layer", "experts"])
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize(
    "layer", [GATED, UNGATED, *SHARED], ids=lambda layer: f"{layer.activation}-{layer.shared_combine}"
)
def test_flops_are_what_pytorch_counts(layer: LayerSpec, direction: str, scope: str) -> None:
    """A loop over experts multiplies no padding, so its GEMMs are exactly the useful work."""
    bench = bench_of(layer, tokens=24, direction=direction)
    arm = arm_of("torch-loop", bench, scope=scope, capacity=0.75)
    facts = arm.routing_facts()
    with FlopCounterMode(display=False) as counter:
        for index in range(4):
            arm.call(index)
    found = work(
        layer, 24, scope=scope, direction=direction, active_experts=facts["active_experts"], kept=facts["kept"]
    )
    assert 0 < facts["kept"] < 48
    assert counter.get_total_flops() == pytest.approx(4 * found.flops, rel=1e-12)


@pytest.mark.parametrize("provider", ["torch-loop", "torch-bmm", "torch-dense", "dense-ffn"])
@pytest.mark.parametrize("capacity", ["dropless", 0.75])
def test_executed_flops_are_what_pytorch_counts(provider: str, capacity: float | str) -> None:
    arm = arm_of(provider, bench_of(layer_of(), tokens=24), capacity=capacity)
    with FlopCounterMode(display=False) as counter:
        for index in range(4):
            arm.call(index)
    weighted_sum = 4 * 2 * 24 * 8 * 32 if provider == "torch-dense" else 0  # done as a GEMM, and no part of the experts
    counted = counter.get_total_flops() - weighted_sum
    assert counted == pytest.approx(4 * arm.routing_facts()["executed_flops"], rel=1e-12)


def test_grouped_executes_what_was_kept() -> None:
    """PyTorch's counter knows no grouped_mm."""
    facts = arm_of("torch-grouped", bench_of(layer_of(), tokens=24), capacity=0.75).routing_facts()
    assert facts["executed_flops"] == facts["kept"] * 6 * 32 * 16


def test_stages_add_up_to_the_layer() -> None:
    for layer in (GATED, UNGATED, SHARED[1]):
        stages = stage_work(layer, 10, 5.0, 17.0, "fp32")
        assert set(stages) == set(STAGES)
        routed = sum(stage.flops for stage in stages.values())
        total = work(layer, active_experts=5.0, kept=17.0)
        assert total.flops == routed + 2 * 10 * layer.shared_params()
        assert total.weight_bytes == sum(s.weight_bytes for s in stages.values()) + 4 * layer.shared_params()


def test_each_stage_alone() -> None:
    stage = {scope: work(GATED, scope=scope, active_experts=5, kept=17) for scope in STAGES}
    T, D, F, E, K = 10, 32, 16, 8, 2
    assert stage["gate"].flops == 2 * T * E * D
    assert stage["gate"].weight_bytes == E * D * 4
    assert stage["up_projection"].flops == 17 * 4 * D * F
    assert stage["up_projection"].weight_bytes == 5 * 2 * D * F * 4
    assert stage["up_projection"].output_bytes == 17 * F * 4
    assert stage["down_projection"].flops == 17 * 2 * D * F
    assert stage["down_projection"].weight_bytes == 5 * D * F * 4
    for copying in ("plan", "permute", "combine"):
        assert (stage[copying].flops, stage[copying].weight_bytes) == (0, 0)
    assert stage["permute"].output_bytes == 17 * D * 4
    assert stage["combine"].output_bytes == T * D * 4
    assert stage["plan"].input_bytes == T * K * 8


def test_backward_is_three_times_the_flops() -> None:
    for scope in ("layer", "experts"):
        once, train = work(SHARED[0], scope=scope), work(SHARED[0], scope=scope, direction="forward_backward")
        assert train.flops == 3 * once.flops
        assert train.compulsory_bytes == 2 * once.compulsory_bytes


def test_fewer_bytes_a_weight_move_fewer_bytes() -> None:
    assert work(GATED, precision="bf16").weight_bytes * 2 == work(GATED).weight_bytes
    assert work(GATED, precision="bf16").flops == work(GATED).flops


def test_dense_ffn_is_k_experts_and_no_router() -> None:
    layer, T = SHARED[1], 10
    for scope, extra in (("experts", 0), ("layer", layer.shared_params())):
        found = dense_work(Problem("m", layer, T), Variant("dense-ffn", scope=scope))
        params = layer.top_k * layer.expert_params() + extra
        assert (found.flops, found.weight_bytes) == (2 * T * params, 4 * params)
    train = dense_work(Problem("m", layer, T, direction="forward_backward"), Variant("dense-ffn"))
    assert train.flops == 3 * dense_work(Problem("m", layer, T), Variant("dense-ffn")).flops


@pytest.mark.parametrize(
    ("experts", "top_k", "tokens", "percent"),
    [(128, 8, 16, 100 * 82.4 / 128), (64, 6, 8, 54.5), (60, 4, 8, 42.4), (256, 8, 8, 22.4)],
    ids=["qwen3-235b", "deepseek-v2-lite", "qwen1.5", "r1"],
)
def test_expected_active_experts_of_uniform_routing(experts: int, top_k: int, tokens: int, percent: float) -> None:
    layer = replace(GATED, routed_experts=experts, top_k=top_k)
    assert 100 * expected_active(layer, tokens) / experts == pytest.approx(percent, abs=0.1)


def test_expected_active_experts_agree_with_draws() -> None:
    layer = layer_of(experts=16, top_k=3)
    active = [active_experts(bench_of(layer, tokens=5, seed=seed).draws[0].routing) for seed in range(200)]
    assert torch.tensor(active).double().mean().item() == pytest.approx(expected_active(layer, 5), abs=0.3)
    assert expected_active(layer, 1) == 3
    assert expected_active(layer_of(experts=4, top_k=4), 7) == 4
