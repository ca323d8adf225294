"""Every form: forward against its reference, gradients, what later tokens may change, ties that rounding decides."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from form_cases import FORMS, NAMES, TRAINING, error, layers_of, tokens_of, weights_of

from moebench.catalogue.layer_forms import LAYER_FORMS
from moebench.catalogue.spec import LayerSpec
from moebench.layer_forms.bank import run_experts, settle

ALLOWED = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}
TINY = {"peer": LayerSpec(4, 1, 9, 6, activation="gelu"), "moh": LayerSpec(8, 4, 4, 2)}


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_forward_is_its_reference(name: str, dtype: torch.dtype) -> None:
    form = FORMS[name]
    for layer in layers_of(name):
        weights = weights_of(name, layer, dtype)
        for tokens in (1, 7, 64, 300):
            x = tokens_of(layer, tokens, dtype)
            y = form.forward(layer, weights, x)
            assert y.dtype == dtype
            assert y.shape == x.shape
            expected = form.reference(layer, weights, x.double(), form.choices(layer, weights, x))
            assert expected.dtype == torch.float64
            assert error(y, expected) < ALLOWED[dtype], (layer, tokens)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_needs_no_choices_of_the_form_s(name: str) -> None:
    form = FORMS[name]
    for layer in layers_of(name):
        weights, x = weights_of(name, layer), tokens_of(layer, 50)
        assert error(form.forward(layer, weights, x), form.reference(layer, weights, x)) < 1e-13


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("smear", "lora-moe")])
def test_a_wrong_choice_is_not_taken_over(name: str) -> None:
    """The choices given to the reference count only where they are ties: else a form that routes wrongly would pass."""
    layer = layers_of(name)[0]
    weights, x = weights_of(name, layer), tokens_of(layer, 40)
    form = FORMS[name]
    own = form.choices(layer, weights, x)
    right = form.reference(layer, weights, x)
    if name == "mixture-of-depths":
        wrong = own[1:]
    else:
        spread = layer.routed_experts
        wrong = (own + 1) % spread
        assert error(form.reference(layer, weights, x, own[:, :1].expand_as(own).contiguous()), right) < 1e-13
    assert error(form.reference(layer, weights, x, wrong), right) < 1e-13
    assert error(form.reference(layer, weights, x, own), right) < 1e-13


@pytest.mark.parametrize(("name", "training"), [(name, False) for name in NAMES] + [("mixture-of-depths", True)])
def test_gradients(name: str, training: bool) -> None:
    layer = TINY.get(name, LayerSpec(4, 2, 3, 2))
    if training:
        layer = replace(layer, router=TRAINING)
    weights, x = weights_of(name, layer), tokens_of(layer, 12 if name == "mixture-of-depths" else 3)
    names = [key for key in weights if key not in ("predictor", "threshold")]  # they choose, and choices have none

    def run(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = FORMS[name].forward(layer, weights | dict(zip(names, values, strict=True)), x)
        return y

    leaves = [value.clone().requires_grad_() for value in (x, *(weights[key] for key in names))]
    assert not torch.equal(run(*leaves), x)
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    grads = torch.autograd.grad(run(*leaves).square().sum(), leaves)
    assert all(bool(grad.abs().sum() > 0) for grad in grads)


@pytest.mark.parametrize("name", NAMES)
def test_causality_is_as_the_catalogue_says(name: str) -> None:
    for training in (False, True):
        causal = {"yes": True, "no": False, "inference": not training}[LAYER_FORMS[name].causal]
        layer = layers_of(name)[0]
        layer = replace(layer, router=replace(layer.router, training=training))
        weights, x = weights_of(name, layer), tokens_of(layer, 64)
        later = torch.cat([x[:40], 5 * tokens_of(layer, 24, seed=9)])
        y, changed = (FORMS[name].forward(layer, weights, value)[:40] for value in (x, later))
        assert torch.allclose(y, changed, rtol=1e-12, atol=1e-12) == causal


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_the_same_for_the_same_seed_alone(name: str) -> None:
    layer = layers_of(name)[0]
    first, again, other = (weights_of(name, layer, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_no_form_loops_over_tokens_or_experts() -> None:
    """forward is vectorised: its source has no loop but over classes, maps and parts of a batch."""
    for name, form in FORMS.items():
        source = inspect.getsource(form.forward)
        assert "range(" not in source, name
        assert "tolist" not in source, name


def test_settle_takes_ties_and_nothing_else() -> None:
    scores = torch.tensor([[3.0, 2.0, 2.0 - 1e-6, 1.0]], dtype=torch.float64)
    assert settle(scores, 2, None).tolist() == [[0, 1]]
    assert settle(scores, 2, torch.tensor([[2, 0]])).tolist() == [[2, 0]]
    assert settle(scores, 2, torch.tensor([[0, 3]])).tolist() == [[0, 1]]
    assert settle(scores, 2, torch.tensor([[0, 0]])).tolist() == [[0, 1]]
    assert settle(scores - scores, 2, torch.tensor([[3, 2]])).tolist() == [[3, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_experts_without_a_token_and_no_tokens_at_all(dtype: torch.dtype) -> None:
    """Both products of a bank: grouped, and padded where a dtype or width is not for it."""
    for width in (8, 5):
        layer = LayerSpec(8, width, 4, 1)
        w_in, w_down, x = (torch.randn(*shape, dtype=dtype) for shape in ((4, 2 * width, 8), (4, 8, width), (6, 8)))
        token, expert = torch.tensor([5, 0, 0, 3]), torch.tensor([2, 0, 2, 2])
        found = run_experts(layer, x, token, expert, w_in, w_down)
        for row, (t, e) in enumerate(zip(token, expert, strict=True)):
            gate, up = (w_in[e].double() @ x[t].double()).chunk(2)
            out = w_down[e].double() @ (gate * torch.sigmoid(gate) * up)
            assert torch.allclose(found[row].double(), out, rtol=1e-4, atol=1e-5)
        assert run_experts(layer, x, token[:0], expert[:0], w_in, w_down).shape == (0, 8)
