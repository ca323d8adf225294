"""The forms as providers: what they refuse, the answer that they are checked against, and their work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from form_cases import FORMS, NAMES, TRAINING, case_of, error, layers_of, provider_of, tokens_of, weights_of
from torch.utils.flop_counter import FlopCounterMode

from moebench.catalogue.layer_forms import LAYER_FORMS, form_work, hyper_sizes, moh_work
from moebench.catalogue.spec import LayerSpec
from moebench.point import Capacity
from moebench.providers import PROVIDERS
from moebench.weights import make_weights
from moebench.workload import Inputs

SHARED: dict[str, Any] = {"shared_experts": 2, "shared_ffn_size": 8, "shared_combine": "add"}


def test_the_table_lists_every_form_as_a_yardstick() -> None:
    assert list(FORMS) == NAMES
    for name in NAMES:
        assert PROVIDERS[name].role == "yardstick"
        provider = provider_of(name)
        assert provider.name == name
        assert provider.form is FORMS[name]
        assert not provider.interpreted("cpu")


def test_fingerprints_tell_the_forms_apart() -> None:
    assert len({provider_of(name).fingerprint() for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_no_form_takes_is_said_in_a_line(name: str) -> None:
    layer, provider = layers_of(name)[0], provider_of(name)
    assert provider.refuse(case_of(layer)) is None
    for asked, reason in (
        ({"scope": "experts"}, "has no scope 'experts'"), ({"scope": "gate"}, "has no scope 'gate'"),
        ({"direction": "forward_backward"}, "measured forward only"), ({"precision": "int8"}, "not int8"),
        ({"capacity": Capacity(1.0)}, "knows no capacity"),
    ):  # fmt: skip
        said = provider.refuse(case_of(layer, **asked))
        assert said is not None
        assert reason in said
        assert said.startswith(name)
        assert "\n" not in said
    assert provider.refuse(case_of(replace(layer, expert_bias=True))) == f"{name} has no biases in its experts"


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("smear", LayerSpec(32, 16, 8, 2, **SHARED), "no shared experts"),
        ("hyper-moe", LayerSpec(32, 16, 8, 2, **SHARED), "no shared experts"),
        ("moh", LayerSpec(32, 16, 7, 2), "its 7 heads"),
        ("moh", LayerSpec(32, 16, 8, 2, **SHARED), "its 10 heads"),
        ("moh", LayerSpec(32, 16, 6, 2, **(SHARED | {"shared_combine": "sigmoid_gate"})), "mixes its shared heads"),
        ("peer", LayerSpec(32, 1, 8, 2, activation="relu"), "square"),
        ("peer", LayerSpec(32, 16, 16, 2, activation="relu"), "single neurons"),
        ("peer", LayerSpec(32, 1, 16, 2), "one input map"),
        ("peer", LayerSpec(32, 1, 4, 3, activation="relu"), "more than its 2 sub-keys"),
        ("peer", LayerSpec(1, 1, 16, 2, activation="relu"), "halves its queries"),
        ("multi-head-moe", LayerSpec(30, 16, 8, 2), "hidden_size 30"),
        ("hetero-moe", LayerSpec(32, 16, 1, 1), "two experts"),
        ("hetero-moe", LayerSpec(32, 1, 8, 2), "two experts"),
    ],
)
def test_shapes_that_a_form_cannot_have(name: str, layer: LayerSpec, reason: str) -> None:
    said = provider_of(name).refuse(case_of(layer))
    assert said is not None
    assert reason in said


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_provider_s_answer_is_its_own_reference(name: str, precision: str) -> None:
    """As the harness asks: weights of the layer, a run, and the reference of the whole x in float64."""
    allowed = {"fp32": 2e-6, "bf16": 2e-2, "fp16": 4e-3}[precision]
    for layer in layers_of(name)[:2]:
        case = case_of(layer, 300, precision=precision)
        weights = make_weights(layer, precision, "cpu", 0)
        provider = provider_of(name)
        state = provider.prepare(weights, case)
        x = tokens_of(layer, 300, weights.w_down.dtype)
        none = torch.zeros(300, layer.top_k)
        inputs = Inputs(x, none.long(), none)
        y = provider.run(state, provider.scope_inputs(state, inputs))
        assert y.dtype == x.dtype
        assert error(y, provider.own_reference(state, x.double())) < allowed
        again = provider.prepare(weights, case).weights
        assert all(torch.equal(value, again[key]) for key, value in state.weights.items())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_work_counts_every_weight_once_all_are_hit(name: str, training: bool) -> None:
    for layer in layers_of(name):
        layer = replace(layer, router=replace(layer.router, training=training))
        weights = weights_of(name, layer)
        unread = ("predictor", "threshold") if training else ()
        total = sum(value.numel() for key, value in weights.items() if key not in unread)
        assert form_work(name, layer, 10**6)[1] == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_work_counts_the_products_that_pytorch_counts(name: str) -> None:
    """With K = E nothing is padded."""
    T = 24
    for layer in layers_of(name):
        if name not in ("peer", "moh"):
            layer = replace(layer, top_k=layer.routed_experts, router=TRAINING)
        weights, x = weights_of(name, layer), tokens_of(layer, T)
        with FlopCounterMode(display=False) as counter:
            FORMS[name].forward(layer, weights, x)
        expected = provider_of(name).executed_flops(case_of(layer, T), torch.ones(1))
        assert counter.get_total_flops() + beyond_the_counter(name, layer, T) == expected, layer


def beyond_the_counter(name: str, layer: LayerSpec, tokens: int) -> int:
    """Attention, embedding_bag, matrix times vector, unknown to it; what HyperMoE does otherwise than is counted."""
    H, b = hyper_sizes(layer)
    chosen_alone = layer.top_k * H - 2 * layer.routed_experts * H  # the forward pass multiplies a mask instead
    scaled = 2 * H * b  # and scales by elementwise products
    per_token = {
        "peer": 2 * layer.top_k * layer.hidden_size,
        "mixture-of-depths": 2 * layer.hidden_size,
        "moh": 2 * (tokens + 1) * layer.hidden_size,
        "hyper-moe": chosen_alone + scaled,
    }
    return tokens * per_token.get(name, 0)


def test_work_of_fewer_tokens_reads_fewer_experts() -> None:
    for name in ("peer", "hyper-moe", "multi-head-moe", "hetero-moe"):
        layer = layers_of(name)[0]
        few, many = (form_work(name, layer, tokens)[1] for tokens in (1, 10**6))
        assert few < many
    layer = LayerSpec(32, 16, 8, 2)
    assert form_work("hetero-moe", layer, 1)[1] == 8 * 32 + 2 * 3 * 32 * 16


def test_executed_flops_are_unknown_where_the_draw_decides_and_all_heads_where_all_are_run() -> None:
    depths, counts = provider_of("mixture-of-depths"), torch.ones(8)
    layer = LayerSpec(32, 16, 8, 2)
    assert depths.executed_flops(case_of(layer), counts) is None
    assert depths.executed_flops(case_of(replace(layer, router=TRAINING)), counts) is not None
    executed = provider_of("moh").executed_flops(case_of(layer), counts)
    assert executed == moh_work(layer, 37, 8)[0] > form_work("moh", layer, 37)[0]


def test_an_unknown_form_has_no_work() -> None:
    assert "plain" not in LAYER_FORMS
    with pytest.raises(KeyError):
        form_work("plain", LayerSpec(32, 16, 8, 2), 4)
