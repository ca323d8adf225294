"""BASE and Sinkhorn: the assignment against an exact solver, the matrix against loops."""

from __future__ import annotations

import pytest
import torch
from assignment_oracles import adversarial, as_read, best_sum, sinkhorn, softmax
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moebench.catalogue.spec import RouterSpec
from moebench.routing import assignment, auction, augment
from moebench.routing.auction import balanced_assignment, resolution
from moebench.routing.forms import TopK
from moebench.routing.scores import Scores

TRAINING, INFERENCE = RouterSpec(training=True), RouterSpec()
SHAPES = [(64, 8), (61, 8), (7, 8), (1, 8), (100, 1), (48, 3), (40, 40), (41, 40), (150, 70), (3, 90)]
CASES = list(adversarial(2, 2))
PARTS = ["whole", "no paths", "paths alone", "falling eps", "short lists"]


def check(z: Tensor) -> None:
    """Exactly balanced, and within the stated gap of the largest sum."""
    T, E = z.shape
    ids = balanced_assignment(z)
    counts = torch.bincount(ids, minlength=E)
    assert ids.shape == (T,)
    assert int(counts.min()) >= T // E
    assert int(counts.max()) <= -(-T // E)
    got = float(as_read(z)[range(T), ids.tolist()].sum())
    assert 0.0 <= best_sum(z) - got + 1e-6 <= resolution(z) * T + 2e-6


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("tokens", "experts"), SHAPES)
def test_within_the_gap_of_the_largest_sum(tokens: int, experts: int, case: str) -> None:
    check(adversarial(tokens, experts, seed=tokens)[case])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("part", PARTS)
def test_each_part_alone_keeps_the_gap(part: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bids to the end, paths from the start, useless starting prices, lists too short (and bids to the end)."""
    if part == "no paths":
        monkeypatch.setattr(auction, "PATIENCE", 0)
    elif part == "paths alone":
        monkeypatch.setattr(auction, "PATIENCE", 10**9)
        monkeypatch.setattr(auction, "FEW", 1.0)
    elif part == "falling eps":
        monkeypatch.setattr(auction, "_starting_prices", lambda z, _: torch.arange(z.shape[1]).double() % 2)
        monkeypatch.setattr(auction, "PROBE", 0)
    elif part == "short lists":
        monkeypatch.setattr(auction, "LISTED", 2)
        monkeypatch.setattr(auction, "PATIENCE", 0)
    if auction.PATIENCE or case not in ("huge", "large", "experts masked"):  # bids alone rise to 1000 by 0.001
        for tokens, experts in ((48, 8), (45, 8), (30, 40)):
            check(adversarial(tokens, experts, seed=1)[case])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 10**6), st.sampled_from([0.01, 1.0, 30.0]), st.booleans())
def test_any_shape(tokens: int, experts: int, seed: int, spread: float, coarse: bool) -> None:
    z = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    check(((z * 2).round() if coarse else z) * spread)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    z = adversarial(90, 7)["skewed"]
    whole = balanced_assignment(z)
    monkeypatch.setattr(augment, "CHUNK", 70)
    assert torch.equal(balanced_assignment(z), whole)


def test_deterministic_and_without_the_global_generator() -> None:
    z = adversarial(100, 9)["ties"]
    torch.manual_seed(1)
    first, state = balanced_assignment(z), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(balanced_assignment(z), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_equal_values_take_one_round() -> None:
    """All would bid for the same expert, E rounds long, were ties not spread."""
    bids = []
    original = auction._Book.bid

    def counted(self: auction._Book, step: float) -> None:
        bids.append(step)
        original(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auction._Book, "bid", counted)
        balanced_assignment(torch.zeros(1024, 128))
    assert len(bids) == 1


def test_gap_follows_small_ranges() -> None:
    assert resolution(torch.tensor([[0.0, 5.0], [1.0, 1.5]])) == pytest.approx(1e-3)
    assert resolution(torch.tensor([[0.0, 0.01], [1.0, 1.0]])) == pytest.approx(1e-5)
    assert 0 < resolution(torch.zeros(4, 4)) < 1e-8


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("spec", [TRAINING, INFERENCE])
def test_base_weighs_by_the_sigmoid_of_the_raw_logit(spec: RouterSpec, case: str) -> None:
    z = adversarial(37, 5)[case]
    routing = assignment.base(Scores(z), spec, 1)
    assert routing.ids.shape == routing.weights.shape == (37, 1)
    assert bool(routing.weights.isfinite().all())
    for t, (expert, weight) in enumerate(zip(routing.ids[:, 0].tolist(), routing.weights[:, 0].tolist(), strict=True)):
        assert weight == pytest.approx(float(torch.sigmoid(z[t, expert].double())), rel=1e-5, abs=1e-30)
        if not spec.training:
            assert expert == z[t].tolist().index(max(z[t].tolist()))
    if spec.training:
        assert sorted(routing.counts().tolist()) == [7, 7, 7, 8, 8]


def test_base_takes_one_pick() -> None:
    with pytest.raises(ValueError, match="picks 1, not 2"):
        assignment.base(Scores(torch.zeros(4, 4)), TRAINING, 2)


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("case", ["normal", "skewed", "tiny", "same rows", "experts masked"])
def test_sinkhorn_picks_from_the_normalised_matrix(case: str, top_k: int) -> None:
    z = adversarial(37, 5)[case].double()
    routing = assignment.sinkhorn(Scores(z), TRAINING, top_k)
    read = (z - z.max(dim=1, keepdim=True).values).clamp(min=-assignment.FARTHEST)
    matrix = sinkhorn(read.tolist(), assignment.TOLERANCE, assignment.ROUNDS)
    for t, row in enumerate(matrix):
        chosen = [row[e] for e in routing.ids[t].tolist()]
        # Equal entries may come in any order, so values are compared.
        assert chosen == pytest.approx(sorted(row, reverse=True)[:top_k], rel=1e-6)
        assert len(set(routing.ids[t].tolist())) == top_k
        every = softmax(z[t].tolist())
        one = [float(torch.sigmoid(z[t, e])) for e in routing.ids[t].tolist()]
        expected = one if top_k == 1 else [every[e] for e in routing.ids[t].tolist()]
        assert routing.weights[t].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-30)


def test_sinkhorn_balances() -> None:
    """The normalised matrix has equal column sums, which top-1 follows loosely; plain top-1 does not at all."""
    z = adversarial(4000, 8)["skewed"]
    scores = assignment.sinkhorn_scores(z)
    columns = torch.softmax(scores, dim=1).sum(dim=0)
    torch.testing.assert_close(columns, torch.full((8,), 500.0), rtol=1e-3, atol=0.0)
    trained = assignment.sinkhorn(Scores(z), TRAINING, 1).counts()
    tested = assignment.sinkhorn(Scores(z), INFERENCE, 1).counts()
    assert int(trained.max()) < 700
    assert int(tested.max()) > 1000


def test_sinkhorn_in_inference_is_top_k() -> None:
    z = adversarial(37, 5)["normal"]
    routing = assignment.sinkhorn(Scores(z), INFERENCE, 3)
    for t in range(37):
        row = z[t].tolist()
        assert routing.ids[t].tolist() == sorted(range(5), key=row.__getitem__, reverse=True)[:3]


def test_sinkhorn_normalises_and_scales_where_asked() -> None:
    z = adversarial(37, 5)["normal"]
    weights = assignment.sinkhorn(Scores(z), RouterSpec(normalise=True, scale=2.5), 2).weights
    torch.testing.assert_close(weights.sum(dim=1), torch.full((37,), 2.5))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("spec", [TRAINING, INFERENCE])
def test_sinkhorn_survives(spec: RouterSpec, top_k: int, case: str) -> None:
    routing = assignment.sinkhorn(Scores(adversarial(37, 5)[case]), spec, top_k)
    assert bool((routing.weights.isfinite() & (routing.weights >= 0)).all())
    assert int(routing.counts().sum()) == 37 * top_k


@pytest.mark.parametrize("name", ["base", "sinkhorn"])
@pytest.mark.parametrize("spec", [TRAINING, INFERENCE])
def test_gradients_and_causality(name: str, spec: RouterSpec) -> None:
    """Weights by finite differences; a later token moves an earlier one in training only."""
    rule = getattr(assignment, name)
    z = adversarial(9, 4)["normal"].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: rule(Scores(logits), spec, 1).weights, (z,))
    before = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4).double()
    before[0] = torch.tensor([0.1, 0.0])
    after = before.clone()
    after[4:] = torch.tensor([9.0, 0.0])
    routes: list[TopK] = [rule(Scores(each), spec, 1) for each in (before, after)]
    assert (routes[0].ids[:4].tolist() != routes[1].ids[:4].tolist()) == spec.training


def test_no_tokens() -> None:
    for spec in (TRAINING, INFERENCE):
        assert assignment.base(Scores(torch.zeros(0, 4)), spec, 1).kept == 0
        assert assignment.sinkhorn(Scores(torch.zeros(0, 4)), spec, 2).kept == 0
