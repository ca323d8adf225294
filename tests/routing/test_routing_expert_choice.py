"""Experts that choose tokens, against loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from assignment_oracles import adversarial, batch_mask, by_columns, expert_choice, slots
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moebench.catalogue.routers import router_info
from moebench.catalogue.spec import RouterSpec
from moebench.routing import expert_choice as rules
from moebench.routing.forms import Ragged
from moebench.routing.scores import Scores

Rule = Callable[[Scores, RouterSpec, int], Ragged]
RULES: dict[str, Rule] = {
    "expert_choice": rules.expert_choice,
    "expert_choice_mesh": rules.expert_choice_mesh,
    "batch_mask": rules.batch_mask,
}
CASES = adversarial(37, 5)
TRAINING = RouterSpec(training=True)


def by_hand(kind: str, z: Tensor, top_k: int) -> list[tuple[int, int, float]]:
    rows = z.double().tolist()
    return batch_mask(rows, top_k) if kind == "batch_mask" else expert_choice(rows, top_k, mesh=kind.endswith("mesh"))


def agree(routing: Ragged, expected: list[tuple[int, int, float]]) -> None:
    assert list(zip(routing.token.tolist(), routing.expert.tolist(), strict=True)) == [(t, e) for t, e, _ in expected]
    weights = torch.tensor([weight for _, _, weight in expected], dtype=routing.weight.dtype)
    torch.testing.assert_close(routing.weight, weights)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("kind", RULES)
def test_float64_matches_loops(kind: str, top_k: int, case: str) -> None:
    z = CASES[case].double()
    agree(RULES[kind](Scores(z), TRAINING, top_k), by_hand(kind, z, top_k))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", RULES)
def test_float32_keeps_the_laws(kind: str, case: str) -> None:
    """Exactly C tokens an expert, no pair twice, by token, weights finite and in [0, 1], sums as the table says."""
    z = CASES[case]
    routing = RULES[kind](Scores(z), TRAINING, 2)
    C = slots(37, 5, 2)
    assert routing.counts().tolist() == [C] * 5
    assert routing.kept == 5 * C
    pairs = list(zip(routing.token.tolist(), routing.expert.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    assert routing.weight.dtype == torch.float32
    assert bool((routing.weight.isfinite() & (routing.weight >= 0) & (routing.weight <= 1)).all())
    sums = torch.zeros(37).index_add(0, routing.token, routing.weight)[routing.per_token() > 0]
    if router_info(kind).weights == "1":
        torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("kind", RULES)
def test_ties_go_to_the_earlier_token(kind: str) -> None:
    routing = RULES[kind](Scores(torch.zeros(10, 4)), TRAINING, 2)
    assert routing.token.tolist() == [t for t in range(5) for _ in range(4)]
    assert routing.expert.tolist() == [0, 1, 2, 3] * 5


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 10**6), st.booleans())
def test_any_shape_and_ties(tokens: int, experts: int, seed: int, coarse: bool) -> None:
    """Ties by whole rows: rows of the same logits in another order tie only as far as a sum's order lets them."""
    z = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)).double()
    z = z[torch.arange(tokens) % 3 % tokens] if coarse else z
    top_k = 1 + seed % experts
    for kind, rule in RULES.items():
        agree(rule(Scores(z), TRAINING, top_k), by_hand(kind, z, top_k))


def test_places_are_the_nearest_whole_number() -> None:
    assert rules.tokens_per_expert(10, 4, 1) == 3  # 2.5, a half up
    assert rules.tokens_per_expert(9, 4, 1) == 2  # 2.25
    assert rules.tokens_per_expert(1, 64, 1) == 1  # at least 1
    assert rules.tokens_per_expert(5, 2, 2) == 5  # at most T
    assert rules.tokens_per_expert(0, 4, 2) == 0


@pytest.mark.parametrize("kind", RULES)
def test_no_tokens(kind: str) -> None:
    routing = RULES[kind](Scores(torch.zeros(0, 4)), TRAINING, 2)
    assert routing.kept == 0
    assert routing.counts().tolist() == [0] * 4


def test_scale_multiplies_free_weights_only() -> None:
    for kind, rule in RULES.items():
        plain = rule(Scores(CASES["normal"]), TRAINING, 2).weight
        scaled = rule(Scores(CASES["normal"]), RouterSpec(training=True, scale=2.5), 2).weight
        factor = 1.0 if router_info(kind).weights == "1" else 2.5
        torch.testing.assert_close(scaled, plain * factor)


@pytest.mark.parametrize("kind", RULES)
def test_gradients_are_those_of_the_weights(kind: str) -> None:
    """By finite differences: the choice is constant nearby."""
    z = CASES["normal"][:9].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: RULES[kind](Scores(logits), TRAINING, 2).weight, (z,))
    for case in CASES.values():
        wild = case.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(RULES[kind](Scores(wild), TRAINING, 2).weight.square().sum(), wild)
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("case", CASES)
def test_batch_mask_in_inference(case: str) -> None:
    z, thresholds = CASES[case].double(), [0.1, 0.2, 0.3, 0.15, 0.0]
    routing = rules.batch_mask(Scores(z, thresholds=torch.tensor(thresholds)), RouterSpec(), 2)
    agree(routing, batch_mask(z.tolist(), 2, torch.tensor(thresholds).double().tolist()))


def test_batch_mask_needs_thresholds() -> None:
    with pytest.raises(ValueError, match="learned thresholds"):
        rules.batch_mask(Scores(torch.zeros(4, 4)), RouterSpec(), 2)


@pytest.mark.parametrize("top_k", [1, 2, 4, 5])
@pytest.mark.parametrize("case", ["normal", "skewed", "tiny"])  # no ties: no threshold parts equal gates
def test_fitted_thresholds_give_back_the_batch(case: str, top_k: int) -> None:
    z = CASES[case].double()
    gates = torch.softmax(z, dim=1)
    thresholds = rules.fit_thresholds(gates, top_k)
    trained = rules.batch_mask(Scores(z), TRAINING, top_k)
    tested = rules.batch_mask(Scores(z, thresholds=thresholds), RouterSpec(), top_k)
    assert torch.equal(trained.token, tested.token)
    assert torch.equal(trained.expert, tested.expert)
    assert float(rules.threshold_loss(gates, thresholds, top_k)) == 0.0


def test_fitted_thresholds_between_neighbouring_floats() -> None:
    """Half way rounds to the lower one of the first pair, to the upper one of the second."""
    lowest = torch.tensor(0.25)
    middle = torch.nextafter(lowest, torch.tensor(1.0))
    for low, high in ((lowest, middle), (middle, torch.nextafter(middle, torch.tensor(1.0)))):
        gates = torch.stack([low, high]).view(2, 1)
        assert (gates > rules.fit_thresholds(gates.expand(2, 2), 1)[0]).flatten().tolist() == [False, True]


def test_threshold_loss_by_loop() -> None:
    """Also that its slope in T_e is the surplus of tokens that the threshold takes, negated."""
    gates = torch.softmax(CASES["skewed"].double(), dim=1)
    thresholds = torch.full((5,), 0.2, dtype=torch.float64, requires_grad=True)
    loss = rules.threshold_loss(gates, thresholds, 2)
    s = by_columns(CASES["skewed"].double().tolist(), False)
    taken = {(t, e) for t, e, _ in batch_mask(CASES["skewed"].double().tolist(), 2)}
    total, surplus = 0.0, [0] * 5
    for t in range(37):
        for e in range(5):
            over = (s[t][e] > 0.2) - ((t, e) in taken)
            total += over * (s[t][e] - 0.2)
            surplus[e] += over
    assert loss.item() == pytest.approx(total)
    assert total > 0
    (gradient,) = torch.autograd.grad(loss, thresholds)
    assert gradient.tolist() == [-n for n in surplus]


@pytest.mark.parametrize("kind", RULES)
def test_causal_as_the_table_says(kind: str) -> None:
    """A later token takes an earlier one's place; in inference, where the table says so, it does not."""
    before = torch.zeros(8, 2)
    before[0] = torch.tensor([0.0, 0.1])
    after = before.clone()
    after[7] = torch.tensor([-9.0, 9.0])
    after[6] = torch.tensor([9.0, -9.0])
    thresholds = torch.full((2,), 0.4)
    changed = {}
    for training in (True, False):
        first, second = (
            RULES[kind](Scores(z, thresholds=thresholds), RouterSpec(training=training), 1) for z in (before, after)
        )
        mine = [
            [(t, e) for t, e in zip(r.token.tolist(), r.expert.tolist(), strict=True) if t < 6] for r in (first, second)
        ]
        changed[training] = mine[0] != mine[1]
    assert changed == {True: True, False: router_info(kind).causal == "no"}
