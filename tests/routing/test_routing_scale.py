"""Every rule that looks at the whole batch, once at a larger shape than loops can follow: its laws still hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moebench.catalogue.spec import RouterSpec
from moebench.routing import assignment, expert_choice, mixing
from moebench.routing.auction import balanced_assignment, resolution
from moebench.routing.augment import below_best
from moebench.routing.forms import Mix, Ragged, TopK
from moebench.routing.scores import Scores

T, E, K = 4096, 256, 8
TRAINING, INFERENCE = RouterSpec(training=True), RouterSpec()


def logits(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(T, E, generator=generator)
    if kind == "skewed":
        return normal + 2 * torch.randn(E, generator=generator)
    if kind == "low rank":
        return torch.randn(T, 8, generator=generator) @ torch.randn(8, E, generator=generator) / 2
    return normal * 0 if kind == "equal" else normal


KINDS = ["normal", "skewed", "low rank", "equal"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "rule", [expert_choice.expert_choice, expert_choice.expert_choice_mesh, expert_choice.batch_mask]
)
def test_experts_choose(rule: Callable[[Scores, RouterSpec, int], Ragged], kind: str) -> None:
    routing = rule(Scores(logits(kind)), TRAINING, K)
    assert routing.counts().tolist() == [T * K // E] * E
    assert int((routing.token * E + routing.expert).unique().numel()) == routing.kept == T * K
    assert bool((routing.token.diff() >= 0).all())
    assert bool((routing.weight.isfinite() & (routing.weight >= 0)).all())


@pytest.mark.parametrize("tokens", [T, T - 100])
@pytest.mark.parametrize("kind", KINDS)
def test_assignment_has_prices_that_prove_it(kind: str, tokens: int) -> None:
    """Weak duality: whatever the prices p, no balanced sum exceeds sum_t max_e (z - p) + the sum of p over all places.

    The test fits prices of its own, so that a wrong assignment cannot bring any that excuse it.
    """
    z = logits(kind)[:tokens]
    ids = balanced_assignment(z)
    counts = torch.bincount(ids, minlength=E)
    assert int(counts.min()) >= tokens // E
    assert int(counts.max()) <= -(-tokens // E)
    read = below_best(z).double()
    got = float(read.gather(1, ids.unsqueeze(1)).sum())
    assert got >= upper_bound(read) - SLACK - resolution(z) * tokens


SLACK = 0.001 * T  # the test's own prices are not exact: they leave 0.0003 to 0.0008


def upper_bound(z: Tensor) -> float:
    """The dual value at prices from entropic transport, at temperature 0.02."""
    tokens, prices = len(z), torch.zeros(E).double()
    for heat in (1.0, 0.3, 0.1, 0.02):
        for _ in range(15):
            share = torch.softmax((z - prices).float() / heat, dim=1).sum(dim=0) * E / tokens
            prices = prices + heat * share.double().clamp_min(1e-30).log()
    floor, more = divmod(tokens, E)
    dearest = prices.sort(descending=True).values[:more].sum()
    return float((z - prices).amax(dim=1).sum() + floor * prices.sum() + dearest)


@pytest.mark.parametrize("kind", KINDS)
def test_base_and_sinkhorn(kind: str) -> None:
    z = logits(kind)
    routings: list[TopK] = [assignment.base(Scores(z), spec, 1) for spec in (TRAINING, INFERENCE)]
    routings += [assignment.sinkhorn(Scores(z), spec, k) for spec in (TRAINING, INFERENCE) for k in (1, K)]
    for routing in routings:
        assert int(routing.counts().sum()) == routing.ids.numel()
        assert bool((routing.ids.sort(dim=1).values.diff(dim=1) > 0).all())
        assert bool((routing.weights.isfinite() & (routing.weights >= 0)).all())
    assert routings[0].counts().tolist() == [T // E] * E


def test_soft_moe() -> None:
    mix: Mix = mixing.soft_moe(Scores(logits("skewed")), RouterSpec(slots=4), 1)
    torch.testing.assert_close(mix.dispatch.sum(dim=0), torch.ones(E))
    torch.testing.assert_close(mix.combine.sum(dim=1), torch.ones(T))
    assert mix.counts().tolist() == [4] * (E // 4)
