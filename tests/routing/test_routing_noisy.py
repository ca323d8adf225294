"""Routers with noise: against loops, in distribution, in their gradients; SparseMixer against its released code."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import pytest
import router_loops as loops
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_loops import adversarial, same, scores_of, sound, uniform
from torch import Tensor

from moebench.catalogue.routers import ROUTERS
from moebench.catalogue.spec import RouterSpec
from moebench.routing import noisy
from moebench.routing.forms import TopK
from moebench.routing.scores import Scores, Side, linear

E = 8
Rule = Callable[[Scores, RouterSpec, int], TopK]
# The rule, its kind, top_k.
RULES: list[tuple[str, str, int]] = [
    ("gshard_top2", "gshard_top2", 2), ("gumbel_top2", "gumbel_top2", 2), ("noisy_topk", "noisy_topk", 1),
    ("noisy_topk", "noisy_topk", 3), ("noisy_softmax_topk", "noisy_softmax_topk", 3),
    ("noisy_softmax_topk", "noisy_softmax_topk", E), ("gumbel_straight_through", "gumbel_straight_through", 1),
    ("sparsemixer", "sparsemixer", 2),
]  # fmt: skip
IDS = [f"{rule}-{top_k}" for rule, _, top_k in RULES]


def spec_of(kind: str, *, training: bool = False, **more: object) -> RouterSpec:
    return RouterSpec(kind=kind, training=training, **more)  # type: ignore[arg-type]


def routed(rule: str, kind: str, top_k: int, z: Tensor, *, training: bool, seed: int = 3, **more: object) -> TopK:
    spec = spec_of(kind, training=training, **more)
    u = uniform(len(z), noisy.noise_width(spec, z.shape[1], 4), seed, z.dtype) if training else None
    spread = torch.linspace(-3, 2, z.numel()).view_as(z).to(z)
    function: Rule = getattr(noisy, rule)
    return function(scores_of(z, u, noise_logits=spread), spec, top_k)


def by_loop(rule: str, kind: str, top_k: int, z: Tensor, *, training: bool, seed: int = 3, **more: object) -> list:
    spec = spec_of(kind, training=training, **more)
    u = uniform(len(z), noisy.noise_width(spec, z.shape[1], 4), seed).tolist()
    spread = torch.linspace(-3, 2, z.numel()).view_as(z).double().tolist()
    function = getattr(loops, rule)
    if rule == "noisy_topk":
        return [function(row, u[t] if training else None, spec, top_k, spread[t]) for t, row in enumerate(z.tolist())]
    if rule == "noisy_softmax_topk":
        return [function(row, u[t] if training else None, spec, top_k) for t, row in enumerate(z.tolist())]
    return [function(row, u[t] if training else None, spec) for t, row in enumerate(z.tolist())]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("case", list(adversarial()))
@pytest.mark.parametrize(("rule", "kind", "top_k"), RULES, ids=IDS)
def test_every_rule_is_its_loop(rule: str, kind: str, top_k: int, case: str, training: bool) -> None:
    z = adversarial()[case]
    same(routed(rule, kind, top_k, z, training=training), by_loop(rule, kind, top_k, z, training=training))


@pytest.mark.parametrize("rule", ["noisy_topk", "noisy_softmax_topk"])
def test_scale_and_renormalisation(rule: str) -> None:
    z, more = adversarial()["random"], {"scale": 2.5, "normalise": True}
    got = routed(rule, rule, 3, z, training=True, **more)
    same(got, by_loop(rule, rule, 3, z, training=True, **more))
    assert (got.weights.sum(dim=1) - 2.5).abs().max() < 1e-12


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("case", list(adversarial()))
@pytest.mark.parametrize(("rule", "kind", "top_k"), RULES, ids=IDS)
def test_float32_stays_sound(rule: str, kind: str, top_k: int, case: str, training: bool) -> None:
    z = adversarial()[case].float().requires_grad_()
    got = routed(rule, kind, top_k, z, training=training)
    assert got.weights.dtype == torch.float32
    sound(got, top_k, E)
    got.weights.sum().backward()
    assert z.grad is not None
    assert bool(z.grad.isfinite().all())


@pytest.mark.parametrize(("rule", "kind", "top_k"), RULES, ids=IDS)
def test_noise_decides_in_training_alone(rule: str, kind: str, top_k: int) -> None:
    z = adversarial(40)["close" if rule == "sparsemixer" else "random"]
    a, b, c = (routed(rule, kind, top_k, z, training=True, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.ids, b.ids)
    assert torch.equal(a.weights, b.weights)
    assert not (torch.equal(a.ids, c.ids) and torch.equal(a.weights, c.weights))
    function: Rule = getattr(noisy, rule)
    plain = function(scores_of(z), spec_of(kind), top_k)
    noise = uniform(40, noisy.noise_width(spec_of(kind), E, 4))
    given_noise = function(scores_of(z, noise), spec_of(kind), top_k)
    assert torch.equal(plain.ids, given_noise.ids)
    assert torch.equal(plain.weights, given_noise.weights)


@pytest.mark.parametrize(("rule", "kind", "top_k"), RULES, ids=IDS)
def test_training_without_enough_noise_is_refused(rule: str, kind: str, top_k: int) -> None:
    z, spec = adversarial()["random"], spec_of(kind, training=True)
    function: Rule = getattr(noisy, rule)
    with pytest.raises(ValueError, match=f"router '{kind}' needs noise in training"):
        function(scores_of(z, noise_logits=z), spec, top_k)
    width = noisy.noise_width(spec, E, 4)
    with pytest.raises(ValueError, match=f"router '{kind}' draws {width} columns of noise; {width - 1} were given"):
        function(scores_of(z, uniform(len(z), width)[:, : width - 1], noise_logits=z), spec, top_k)
    if rule == "noisy_topk":
        with pytest.raises(ValueError, match="needs noise_logits in training"):
            function(scores_of(z, uniform(len(z), width)), spec, top_k)


@pytest.mark.parametrize("rule", ["gshard_top2", "gumbel_top2", "gumbel_straight_through", "sparsemixer"])
def test_a_rule_of_fixed_picks_refuses_others(rule: str) -> None:
    function: Rule = getattr(noisy, rule)
    with pytest.raises(ValueError, match=f"router '{rule}' picks [12], not 3"):
        function(scores_of(adversarial()["random"]), spec_of(rule), 3)


def test_noise_width_is_what_the_catalogue_says() -> None:
    for kind, info in ROUTERS.items():
        assert (noisy.noise_width(spec_of(kind), E, 24) > 0) == info.noise, kind
    assert noisy.noise_width(spec_of("switch_top1"), E, 24) == 24
    assert noisy.noise_width(spec_of("hierarchical_noisy_topk", groups=4), E, 24) == E + 4


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_largest_is_a_stable_sort(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    count = data.draw(st.integers(1, columns))
    numbers = st.sampled_from([-math.inf, -1e30, -1.0, -0.0, 0.0, 0.5, 1e30, math.inf])
    values = data.draw(st.lists(st.lists(numbers, min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    got = noisy.largest(torch.tensor(values, dtype=torch.float32), count).tolist()
    assert got == [loops.best(row, count) for row in values]


# Switch's jitter.


def test_jitter_multiplies_x_in_training_alone() -> None:
    x, W = torch.randn(5, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    u = uniform(5, 6)
    got = noisy.jittered(spec_of("switch_top1", training=True), x, {"router": W}, Side(noise=u)).logits
    for t in range(5):
        for e in range(3):
            want = math.fsum(float(x[t, d] * (0.99 + 0.02 * u[t, d]) * W[e, d]) for d in range(6))
            assert float(got[t, e]) == pytest.approx(want, rel=1e-12)
    plain = noisy.jittered(spec_of("switch_top1"), x, {"router": W}, Side(noise=u)).logits
    assert torch.equal(plain, linear(spec_of("switch_top1"), x, {"router": W}, Side()).logits)


def test_jitter_of_low_precision_inputs_is_drawn_in_float32() -> None:
    x, W = torch.full((2000, 1), 1.3, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16)
    u = uniform(2000, 1, dtype=torch.float32)
    got = noisy.jittered(spec_of("switch_top1", training=True), x, {"router": W}, Side(noise=u)).logits
    want = (x.float() * (0.99 + 0.02 * u)).bfloat16().float()
    assert torch.equal(got, want)
    assert got.dtype == torch.float32


def test_jitter_needs_a_column_for_each_dimension() -> None:
    x, gate = torch.randn(5, 6), {"router": torch.randn(3, 6)}
    with pytest.raises(ValueError, match="needs noise in training"):
        noisy.jittered(spec_of("switch_top1", training=True), x, gate, Side())
    with pytest.raises(ValueError, match="draws 6 columns of noise; 3 were given"):
        noisy.jittered(spec_of("switch_top1", training=True), x, gate, Side(noise=uniform(5, 3)))


# Distributions: T draws of one row, within five standard errors.

T = 20000
ROW = torch.tensor([0.3, 1.0, -0.5, 0.9, 0.0, -2.0, 0.2, 0.99], dtype=torch.float64)


def many(rule: str, kind: str, top_k: int, row: Tensor = ROW) -> TopK:
    return routed(rule, kind, top_k, row.expand(T, -1).contiguous(), training=True)


def close_frequencies(ids: Tensor, p: Tensor) -> None:
    seen = torch.bincount(ids, minlength=len(p)).double() / len(ids)
    error = (p * (1 - p) / len(ids)).sqrt()
    assert bool(((seen - p).abs() <= 5 * error + 1e-12).all()), f"{seen} is not {p}"


def test_gshard_keeps_the_second_twice_as_often_as_its_share() -> None:
    got = many("gshard_top2", "gshard_top2", 2, ROW - 1.5 * (ROW < 1))
    share = float(got.weights[:, 1].max())
    assert 0.05 < share < 0.45
    close_frequencies((got.ids[:, 1] >= 0).long(), torch.tensor([1 - 2 * share, 2 * share], dtype=torch.float64))
    assert torch.equal(got.wanted_ids, got.ids)


def test_gumbel_noise_draws_from_the_softmax() -> None:
    close_frequencies(many("gumbel_straight_through", "gumbel_straight_through", 1).ids[:, 0], ROW.softmax(0))
    got = many("gumbel_top2", "gumbel_top2", 2)
    assert set(got.ids[:, 0].tolist()) == {1}
    close_frequencies(got.ids[:, 1], ROW.index_fill(0, torch.tensor([1]), -math.inf).softmax(0))


def test_sparsemixer_draws_from_its_masked_softmax_and_cuts_three_in_four() -> None:
    got = many("sparsemixer", "sparsemixer", 2)
    p = torch.where(ROW > 0.97, ROW, -math.inf).softmax(0)  # 0.9 and below are far from 1
    close_frequencies(got.ids[:, 0], p)
    other = got.weights[got.ids[:, 0] == 7, 0]
    cut = (other < 0.9 * p[7]).long()
    close_frequencies(cut, torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert (got.weights[got.ids[:, 0] == 1, 0] - p[1]).abs().max() < 1e-12


def test_v_moe_noise_has_a_standard_deviation_of_one_over_e() -> None:
    got = many("noisy_softmax_topk", "noisy_softmax_topk", E)
    dense = torch.zeros(T, E, dtype=torch.float64).scatter(1, got.ids, got.weights.log())
    gap = (dense[:, 0] - dense[:, 1]) - (ROW[0] - ROW[1])
    assert abs(float(gap.mean())) < 5 * math.sqrt(2 / T) / E
    assert float(gap.std()) * E == pytest.approx(math.sqrt(2), rel=0.03)


def test_shazeer_noise_has_the_softplus_as_its_standard_deviation() -> None:
    spread = torch.tensor([1.5, -0.7], dtype=torch.float64)
    spec = spec_of("noisy_topk", training=True)
    z = torch.zeros(T, 2, dtype=torch.float64)
    got = noisy.noisy_topk(scores_of(z, uniform(T, 2), noise_logits=spread.expand(T, -1)), spec, 2)
    dense = torch.zeros(T, 2, dtype=torch.float64).scatter(1, got.ids, got.weights.log())
    want = math.hypot(*(loops.softplus(value) for value in spread.tolist()))
    assert float((dense[:, 0] - dense[:, 1]).std()) == pytest.approx(want, rel=0.03)


# Gradients.


def jacobian_rows(routing: Callable[[Tensor], TopK], z: Tensor) -> list[Tensor]:
    """d weights[:, k] / d z [T, E] for each k; a token's weights depend on its own logits alone."""
    leaf = z.clone().requires_grad_()
    weights = routing(leaf).weights
    return [torch.autograd.grad(weights[:, k].sum(), leaf, retain_graph=True)[0] for k in range(weights.shape[1])]


def softmax_slope(p: Tensor, ids: Tensor) -> Tensor:
    """d p[id] / d z = p[id] (onehot(id) - p), [T, E]."""
    return p.gather(1, ids) * (torch.nn.functional.one_hot(ids[:, 0], p.shape[1]) - p)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_straight_through_is_hard_forward_and_soft_backward(training: bool) -> None:
    z = adversarial(30)["random"]
    route = functools.partial(routed, "gumbel_straight_through", "gumbel_straight_through", 1, training=training)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(route(z.to(dtype)).weights, torch.ones(30, 1, dtype=dtype))
    h = z - (-uniform(30, E, 3).log()).log() if training else z
    torch.testing.assert_close(jacobian_rows(route, z)[0], softmax_slope(h.softmax(1), route(z).ids))


SMOOTH = [each for each in RULES if each[0] not in ("sparsemixer", "gumbel_straight_through")]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("rule", "kind", "top_k"), SMOOTH)
def test_gradients_are_finite_differences(rule: str, kind: str, top_k: int, training: bool) -> None:
    z = adversarial(4)["random"].requires_grad_()
    assert torch.autograd.gradcheck(lambda leaf: routed(rule, kind, top_k, leaf, training=training).weights, (z,))


def test_the_noise_weights_of_noisy_topk_learn() -> None:
    z, u = adversarial(4)["random"], uniform(4, E)
    spread = (z / 2).requires_grad_()
    spec = spec_of("noisy_topk", training=True)
    assert torch.autograd.gradcheck(
        lambda leaf: noisy.noisy_topk(scores_of(z, u, noise_logits=leaf), spec, 3).weights, (spread,)
    )


def test_sparsemixer_gradient_is_that_of_the_masked_softmax_cut_or_not() -> None:
    z = adversarial(60)["close"]
    route = functools.partial(routed, "sparsemixer", "sparsemixer", 2, training=True)
    got = route(z)
    first, second = jacobian_rows(route, z)
    top = z.amax(dim=1, keepdim=True)
    p = z.masked_fill((top - z) / top > 0.02, -math.inf).softmax(1)
    assert bool(((got.weights[:, :1] - p.gather(1, got.ids[:, :1])).abs() > 1e-3).any()), "no pick was cut"
    torch.testing.assert_close(first, softmax_slope(p, got.ids[:, :1]))
    left = z.scatter(1, got.ids[:, :1], -math.inf)
    top = left.amax(dim=1, keepdim=True)
    p = left.masked_fill((top - left) / top > 0.02, -math.inf).softmax(1)
    torch.testing.assert_close(second, softmax_slope(p, got.ids[:, 1:]))


def test_sparsemixer_in_inference_has_finite_difference_gradients() -> None:
    z = adversarial(6)["close"].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda leaf: routed("sparsemixer", "sparsemixer", 2, leaf, training=False).weights, (z,), eps=1e-7
    )


# SparseMixer against transformers.


@pytest.mark.parametrize("case", ["random", "close", "negative", "few_values", "one_hot", "huge", "zero"])
def test_sparsemixer_in_inference_is_the_released_one(case: str) -> None:
    phimoe = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    z = adversarial(200)[case].float()
    weights, ids = phimoe.sparsemixer(z, jitter_eps=0.01, training=False)
    got = noisy.sparsemixer(scores_of(z), spec_of("sparsemixer"), 2)
    assert torch.equal(got.ids, ids)
    assert torch.equal(got.weights, weights)


def test_sparsemixer_in_training_is_the_released_one_but_for_its_rounded_third(monkeypatch: pytest.MonkeyPatch) -> None:
    phimoe = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    z, u = adversarial(300)["close"], uniform(300, 2 * E + 2)
    first, second = u.split(E + 1, dim=1)
    exponential: Iterator[Tensor] = iter([-first[:, :E].log(), -second[:, :E].log()])
    cuts: Iterator[Tensor] = iter([first[:, E:], second[:, E:]])
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.copy_(next(exponential)))
    monkeypatch.setattr(torch, "rand_like", lambda _: next(cuts))
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self: self)
    theirs, ours = z.clone().requires_grad_(), z.clone().requires_grad_()
    weights, ids = phimoe.sparsemixer(theirs, jitter_eps=0.01, training=True)
    got = noisy.sparsemixer(scores_of(ours, u), spec_of("sparsemixer", training=True), 2)
    assert torch.equal(got.ids, ids)
    torch.testing.assert_close(got.weights, weights, rtol=2e-4, atol=0)
    upstream = torch.linspace(-1, 1, weights.numel(), dtype=torch.float64).view_as(weights)
    torch.testing.assert_close(
        torch.autograd.grad(got.weights, ours, upstream)[0], torch.autograd.grad(weights, theirs, upstream)[0]
    )
