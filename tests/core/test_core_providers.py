"""Every shipped provider against the oracle, on the shapes where implementations break."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from core_arms import arm_of, bench_of, layer_of, router, shared, user_kernel, verdict_of

from moebench.catalogue.layer_forms import LAYER_FORMS
from moebench.catalogue.routers import ROUTERS, imposable, needed_picks
from moebench.catalogue.spec import ACTIVATIONS, SHARED_COMBINES, LayerSpec
from moebench.point import DROP_ORDERS, STAGES, Capacity
from moebench.providers import PROVIDERS, base, layer_parts
from moebench.providers.case import Case
from moebench.providers.load import load
from moebench.routing import make_scores, route

EAGER = ["torch-loop", "torch-bmm", "torch-grouped", "torch-dense", "dense-ffn"]
STAGED = ["torch-bmm", "torch-grouped"]
CAPACITIES = ["dropless", 1.0, 0.5]
# T, E, K: one of each; all experts; more experts than assignments (idle ones); one pick.
SHAPES = [(1, 1, 1), (5, 1, 1), (1, 8, 2), (5, 3, 2), (5, 8, 1), (37, 3, 3), (37, 8, 2), (37, 8, 8)]


def passes(provider: str, layer: LayerSpec, tokens: int = 37, **more: Any) -> None:
    verdict = verdict_of(provider, layer, tokens, **more)
    assert verdict.wrong is None, f"{layer} {tokens} {more}: {verdict.wrong}"
    assert verdict.rel_error is not None


def test_the_table_is_covered() -> None:
    """A provider of ours that is added must be added here; those of other libraries, in tests/providers."""
    ours = {name for name, listing in PROVIDERS.items() if listing.needs is None}
    assert ours - set(LAYER_FORMS) == {*EAGER, "torch-compile", "torch-compile-max-autotune", "triton"}


@pytest.mark.parametrize("scope", ["experts", "layer"])
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("provider", EAGER)
def test_shapes(provider: str, capacity: Any, direction: str, scope: str) -> None:
    for tokens, experts, top_k in SHAPES:
        passes(provider, layer_of(experts, top_k), tokens, capacity=capacity, direction=direction, scope=scope)


@pytest.mark.parametrize("scope", ["experts", "layer"])
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("provider", EAGER)
def test_activations(provider: str, direction: str, scope: str) -> None:
    for activation in ACTIVATIONS:
        for capacity in ("dropless", 0.5):
            layer = layer_of(activation=activation)
            passes(provider, layer, 9, capacity=capacity, direction=direction, scope=scope)


@pytest.mark.parametrize("provider", EAGER)
def test_built_activations_are_the_catalogue_s(provider: str) -> None:
    assert load(provider).activations == base.ACTIVATIONS == ACTIVATIONS


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("combine", SHARED_COMBINES[1:])
@pytest.mark.parametrize("provider", EAGER)
def test_shared_experts(provider: str, combine: str, direction: str) -> None:
    for activation in ("swiglu", "relu"):
        layer = shared(combine, activation=activation)
        passes(provider, layer, 9, scope="layer", direction=direction)
        passes(provider, layer, 9, scope="experts", direction=direction)  # runs without them


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("provider", ["torch-loop", "torch-bmm", "torch-grouped", "torch-dense"])
def test_expert_biases(provider: str, direction: str) -> None:
    for activation in ("clamped_swiglu", "gelu"):
        layer = layer_of(activation=activation, expert_bias=True)
        for capacity in ("dropless", 0.5):
            passes(provider, layer, 21, scope="layer", direction=direction, capacity=capacity)
    if provider in STAGED:
        for scope in ("up_projection", "down_projection"):
            passes(provider, layer_of(expert_bias=True), 21, scope=scope, capacity=0.5)


def test_biases_nobody_took_are_refused() -> None:
    biased = case(layer=layer_of(expert_bias=True))
    assert load("torch-compile").refuse(biased) == "torch-compile does not take biases in the experts"
    assert load(user_kernel("right")).refuse(biased).endswith("does not take biases in the experts")


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_every_router(kind: str, mode: str) -> None:
    """At every scope that has one: each provider's gate and sum against float64."""
    info = ROUTERS[kind]
    K = needed_picks(kind, 8) or 2
    layer = layer_of(8, K, router=router(kind, training=mode == "training", **info.defaults))
    traffics = ("router", "zipf:1") if imposable(layer.router) or "token_ids" in info.side else ("router",)
    for traffic in traffics:
        passes("torch-grouped", layer, 40, scope="gate", traffic=traffic)
        for provider in ("torch-loop", "torch-bmm", "torch-grouped", "torch-dense"):
            for scope in ("layer", "experts"):
                passes(provider, layer, 40, scope=scope, traffic=traffic)
    for scope in ("layer", "experts"):
        passes("torch-grouped", layer, 24, scope=scope, traffic="router", direction="forward_backward")


@pytest.mark.parametrize("kind", ["cosine", "attention", "noisy_topk_tanh", "hierarchical_noisy_topk"])
def test_no_rounding_flips_a_choice_of_hidden_states_as_they_come(kind: str) -> None:
    """Near ties are drawn again: 20,000 choices hold under ten times what float32 rounds."""
    layer = layer_of(32, 4, hidden=64, router=router(kind, **ROUTERS[kind].defaults))
    bench = bench_of(layer, tokens=1000, traffic="router")
    gate, generator = bench.weights.whole_gate, torch.Generator().manual_seed(1)
    for draw in bench.draws:
        shaken = draw.x + 1e-5 * torch.randn(draw.x.shape, generator=generator)
        ids = route(layer, make_scores(layer, shaken, gate, draw.side)).ids
        assert torch.equal(ids.sort(1).values, draw.routing.ids.sort(1).values)


USERS = """
import torch
def every_other(logits, top_k):
    ids = torch.topk(logits[:, ::2], top_k).indices * 2
    return ids, torch.softmax(logits.gather(1, ids), dim=-1)
def masks_in_place(logits, top_k):
    logits[:, 1::2] = -torch.inf
    best = logits.topk(top_k)
    return best.indices, torch.softmax(best.values, dim=-1)
def of_the_batch(logits, top_k):
    best = torch.softmax(logits, dim=0).topk(top_k)
    return best.indices, best.values
def narrow(logits, top_k): return logits.topk(1)[1], logits.topk(1)[0]
def one(logits, top_k): return logits.topk(top_k).indices
def floats(logits, top_k): return logits.topk(top_k)[0], logits.topk(top_k)[0]
def far(logits, top_k): return logits.topk(top_k).indices + 7, torch.ones(len(logits), top_k)
def minus(logits, top_k): return logits.topk(top_k).indices - 8, torch.ones(len(logits), top_k)
def twice(logits, top_k): return logits.topk(1).indices.repeat(1, top_k), torch.ones(len(logits), top_k)
def nan(logits, top_k): return logits.topk(top_k).indices, torch.full((len(logits), top_k), float("nan"))
def leaves(logits, top_k): raise SystemExit(3)
"""


@pytest.fixture
def users(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(USERS)
    return tmp_path / "mine.py"


@pytest.mark.parametrize("function", ["every_other", "masks_in_place", "of_the_batch"])
def test_a_router_of_the_user_s(users: Path, function: str) -> None:
    layer = layer_of(8, 2, router=router(f"{users}:{function}"))
    for scope in ("gate", "layer", "experts"):
        passes("torch-grouped", layer, 300, scope=scope, traffic="router")
    passes("torch-loop", layer, 40, scope="layer", traffic="zipf:1", direction="forward_backward")
    if function != "of_the_batch":
        assert set(bench_of(layer).draws[0].routing.ids.flatten().tolist()) <= {0, 2, 4, 6}


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("narrow", r"returned shapes \[37, 1\] and \[37, 1\], not \[37, 2\]"),
        ("one", "returned a Tensor; expected two tensors, ids and weights"),
        ("floats", "returned torch.float32 ids and torch.float32 weights; not integers and floats"),
        ("far", "an id is not among 0 to 7"),
        ("minus", "an id is not among 0 to 7"),
        ("twice", "a token has an expert twice"),
        ("nan", "a weight is negative, infinite or NaN"),
        ("leaves", "SystemExit: 3"),
    ],
)
def test_a_wrong_router_of_the_user_s_is_named_before_anybody_runs(users: Path, function: str, words: str) -> None:
    with pytest.raises(ValueError, match=rf"^router .*mine.py:{function}: {words}$"):
        bench_of(layer_of(8, 2, router=router(f"{users}:{function}")))


def test_what_is_executed_of_gathered_and_blended_rows() -> None:
    row = 2 * layer_of().expert_params()
    taken = case(layer=layer_of(8, 2, router=router("expert_choice")), tokens=20)
    counts = torch.full((8,), 5)
    assert load("torch-dense").executed_flops(taken, counts) == 8 * 40 * row
    assert load("torch-grouped").executed_flops(taken, counts) == 40 * row
    assert load("torch-dense").executed_flops(case(tokens=20), counts) == 8 * 20 * row


@pytest.mark.parametrize(
    "kind", ["sinkhorn", "batch_mask", "base", "expert_choice", "sparsemixer", "softmax_bias_zero"]
)
def test_one_token(kind: str) -> None:
    picks, zero = needed_picks(kind, 4) or 1, {"zero_experts": 4} if kind == "softmax_bias_zero" else {}
    for mode in (False, True):
        for seed in range(4):
            layer = layer_of(4, picks, router=router(kind, training=mode, **zero))
            for direction in ("forward", "forward_backward"):
                passes("torch-loop", layer, 1, scope="layer", traffic="router", direction=direction, seed=seed)


@pytest.mark.parametrize("order", DROP_ORDERS)
def test_drop_orders(order: str) -> None:
    for rounding in ("ceil", "v-moe"):
        for scope in ("layer", "experts"):
            for provider in ("torch-loop", "torch-bmm", "torch-grouped"):
                more = {"traffic": "zipf:1", "capacity": 0.6, "order": order, "rounding": rounding, "scope": scope}
                passes(provider, layer_of(), 60, **more)
    passes("torch-grouped", layer_of(), 60, traffic="zipf:1", capacity=0.6, order=order, scope="layer",
           direction="forward_backward")  # fmt: skip


@pytest.mark.parametrize("scope", ["experts", "layer"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("provider", EAGER)
def test_16_bits(provider: str, precision: str, scope: str) -> None:
    for direction in ("forward", "forward_backward"):
        for capacity in ("dropless", 0.5):
            layer = layer_of(8, 2, hidden=64, ffn=32)
            passes(provider, layer, 21, precision=precision, direction=direction, scope=scope, capacity=capacity)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("provider", EAGER)
def test_everything_to_one_expert(provider: str, direction: str) -> None:
    """Seven of eight experts are idle: their gradients are exactly zero, whatever the layout pads with."""
    layer = layer_of(8, 1)
    for capacity in CAPACITIES:
        for scope in ("experts", "layer"):
            more = {"traffic": "zipf:20", "capacity": capacity, "direction": direction, "scope": scope}
            passes(provider, layer, 37, **more)
    arm = arm_of(provider, bench_of(layer, traffic="zipf:20"))
    assert arm.routing_facts()["active_experts"] == 1


@pytest.mark.parametrize("provider", EAGER)
def test_more_tokens_than_are_sampled(provider: str) -> None:
    for direction in ("forward", "forward_backward"):
        passes(provider, layer_of(), 700, direction=direction, capacity=1.0)


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("scope", STAGES)
@pytest.mark.parametrize("provider", STAGED)
def test_stages(provider: str, scope: str, capacity: Any) -> None:
    for tokens, experts, top_k in SHAPES:
        for activation in ("swiglu", "gelu"):
            passes(provider, layer_of(experts, top_k, activation=activation), tokens, scope=scope, capacity=capacity)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("provider", STAGED)
def test_stages_in_16_bits(provider: str, precision: str) -> None:
    for scope in STAGES:
        passes(provider, layer_of(8, 2, hidden=64, ffn=32), 21, scope=scope, precision=precision)


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
def test_same_inputs_same_answer(direction: str, capacity: Any) -> None:
    """Not only near the oracle each: near each other, gradients included."""
    for layer in (shared("sigmoid_gate"), layer_of(activation="relu")):
        bench = bench_of(layer, direction=direction)
        for scope in ("experts", "layer"):
            answers = {name: _answer(name, bench, scope, capacity) for name in EAGER if name != "dense-ffn"}
            first = answers.pop("torch-loop")
            for name, answer in answers.items():
                assert answer.keys() == first.keys(), name
                for part, value in answer.items():
                    torch.testing.assert_close(
                        value, first[part], rtol=1e-4, atol=1e-5, msg=lambda text, n=name, p=part: f"{n} {p}: {text}"
                    )


def _answer(provider: str, bench: Any, scope: str, capacity: Any) -> dict[str, torch.Tensor]:
    arm = arm_of(provider, bench, scope=scope, capacity=capacity)
    output, grads = arm._execute(arm.buffers[1], arm.scoped[1])
    kept = (arm.buffers[1].ids >= 0).float()
    grads = {name: value.clone() for name, value in grads.items()}
    if "weights" in grads:
        grads["weights"] *= kept  # what a dropped weight would earn is undefined
    return {"y": output.detach(), **grads}


@pytest.mark.parametrize("provider", EAGER)
def test_calls_rotate_over_the_draws_and_repeat(provider: str) -> None:
    arm = arm_of(provider, bench_of(layer_of()))
    outputs = [arm.call(index).clone() for index in range(4)]
    assert torch.equal(arm.call(2), outputs[2])
    assert all(not torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("provider", EAGER)
def test_gradients_do_not_pile_up_over_calls(provider: str) -> None:
    arm = arm_of(provider, bench_of(layer_of(), direction="forward_backward"))
    arm.call(0)
    once = arm.state.weights.w_down.grad.clone()
    arm.call(0)
    assert torch.equal(arm.state.weights.w_down.grad, once)


def test_dense_ffn_is_the_first_k_experts_with_weight_one() -> None:
    """Another function by design: it ignores the routing and reports no fidelity."""
    bench = bench_of(layer_of(8, 3))
    arm = arm_of("dense-ffn", bench)
    y, weights = arm.call(0), bench.weights
    want = sum(
        layer_parts.activate(arm.buffers[0].x @ weights.w_gate_up[expert].T, "swiglu") @ weights.w_down[expert].T
        for expert in range(3)
    )
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    assert arm.check().fidelity_error is None


def test_fidelity_is_what_dropping_costs() -> None:
    errors = [
        verdict_of("torch-loop", layer_of(), capacity=capacity).fidelity_error
        for capacity in ("dropless", 2.0, 1.0, 0.5)
    ]
    assert errors[0] < 1e-6
    assert errors[1:] == sorted(errors[1:])
    assert errors[-1] > 0.3


def test_fidelity_is_what_the_precision_costs() -> None:
    layer = layer_of(hidden=64, ffn=64)
    errors = [
        verdict_of("torch-loop", layer, precision=precision).fidelity_error for precision in ("fp32", "fp16", "bf16")
    ]
    assert errors[0] < 1e-5 < errors[1] < errors[2] < 0.03


# What is refused, and how it is said.


def case(**more: Any) -> Case:
    base_case = Case(layer_of(), 8, "forward", "fp32", Capacity(), "experts", "cpu")
    return replace(base_case, **more)


@pytest.mark.parametrize("provider", ["torch-loop", "torch-dense", "dense-ffn", "torch-compile", user_kernel("right")])
@pytest.mark.parametrize("scope", STAGES)
def test_one_function_has_no_stages(provider: str, scope: str) -> None:
    assert f"has no stage '{scope}'" in load(provider).refuse(case(scope=scope))


@pytest.mark.parametrize("provider", STAGED)
def test_stages_are_forward_only(provider: str) -> None:
    for scope in STAGES:
        assert load(provider).refuse(case(scope=scope)) is None
        assert (
            load(provider).refuse(case(scope=scope, direction="forward_backward")) == "stages are measured forward only"
        )


@pytest.mark.parametrize("activation", ["limited_swiglu", "relu2"])
def test_other_activations_are_refused_by_name(activation: str) -> None:
    for provider in ("triton", user_kernel("right")):
        assert load(provider).refuse(case(layer=layer_of(activation=activation))) == (
            f"{provider} does not compute activation '{activation}'"
        )


def test_grouped_names_the_width_that_does_not_fit() -> None:
    grouped = load("torch-grouped")
    assert grouped.refuse(case(layer=layer_of(hidden=30))) == (
        "grouped_mm needs rows of a multiple of 16 bytes; hidden_size 30 in fp32 is not"
    )
    assert "expert_ffn_size 20 in bf16" in grouped.refuse(case(layer=layer_of(ffn=20), precision="bf16"))
    assert grouped.refuse(case(layer=layer_of(ffn=20))) is None
    assert "hidden_size 30" in grouped.refuse(case(layer=layer_of(hidden=30), scope="up_projection"))


def test_odd_widths_run_elsewhere() -> None:
    for provider in ("torch-loop", "torch-bmm", "torch-dense", "dense-ffn"):
        passes(provider, layer_of(3, 2, hidden=7, ffn=5), 5, direction="forward_backward", scope="layer")


@pytest.mark.parametrize("provider", [*EAGER, "torch-compile"])
def test_fingerprints_are_of_the_source(provider: str) -> None:
    found = load(provider)
    assert len(found.fingerprint()) == 16
    assert found.fingerprint() == load(provider).fingerprint()
    assert found.version.startswith("torch 2.")
    assert not found.interpreted("cpu")


def test_fingerprints_differ() -> None:
    assert len({load(provider).fingerprint() for provider in EAGER}) == len(EAGER)
    changed = replace(load("torch-loop"), version="torch 0.1")
    assert changed.fingerprint() != load("torch-loop").fingerprint()


def test_checked_on_names_the_shape() -> None:
    assert arm_of("torch-loop", bench_of(layer_of())).checked_on == "T37 D32 F16 E8 K2"
