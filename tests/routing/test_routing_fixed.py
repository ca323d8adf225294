"""Routers that are not learned: the frozen gate, tables by token id, domains; and what they refuse."""

from __future__ import annotations

import math

import pytest
import router_loops as loops
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_loops import adversarial, same, sound
from torch import Tensor

from moebench.catalogue.spec import RouterSpec
from moebench.routing import fixed
from moebench.routing.scores import Scores, Side, linear

V, E = 40, 8


def scores_of(z: Tensor, table: Tensor | None, tokens: Tensor | None, domains: Tensor | None = None) -> Scores:
    return Scores(z, table=table, side=Side(token_ids=tokens, domains=domains))


def tokens_of(T: int = 12, seed: int = 1) -> Tensor:
    return torch.randint(V, (T,), generator=torch.Generator().manual_seed(seed))


# The frozen gate.


def test_a_frozen_gate_routes_as_a_linear_one_and_never_learns() -> None:
    spec = RouterSpec("frozen_random")
    x = torch.randn(5, 6, dtype=torch.float64).requires_grad_()
    gate = {
        "router": torch.randn(3, 6, dtype=torch.float64).requires_grad_(),
        "logit_bias": torch.randn(3, dtype=torch.float64).requires_grad_(),
    }
    got = fixed.frozen(spec, x, gate, Side()).logits
    assert torch.equal(got, linear(spec, x, gate, Side()).logits)
    got.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0
    assert all(weight.grad is None for weight in gate.values())


# Tables.


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_hash_is_its_loop(top_k: int) -> None:
    table, tokens = fixed.balanced_table(V, E, top_k, 0), tokens_of()
    got = fixed.hashed(scores_of(torch.randn(12, E), table, tokens), RouterSpec("hash"), top_k)
    for t, token in enumerate(tokens.tolist()):
        assert got.ids[t].tolist() == table[token].tolist()
        assert got.weights[t].tolist() == pytest.approx([1 / top_k] * top_k)
    assert got.weights.dtype == torch.float32
    assert got.logits is None  # they chose nothing


def weighed(z: list[float], ids: list[int], spec: RouterSpec) -> loops.Pick:
    return ids, loops.scaled([math.sqrt(loops.softplus(z[e])) for e in ids], spec)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("case", ["random", "close", "negative", "equal", "zero", "few_values", "one_hot"])
def test_hash_with_weights_is_its_loop(case: str, normalise: bool) -> None:
    spec = RouterSpec("hash_sqrt_softplus", normalise=normalise, scale=2.5)
    z, table, tokens = adversarial()[case], fixed.balanced_table(V, E, 3, 0), tokens_of()
    got = fixed.hashed_sqrt_softplus(scores_of(z, table, tokens), spec, 3)
    same(got, [weighed(row, table[t].tolist(), spec) for row, t in zip(z.tolist(), tokens.tolist(), strict=True)])
    if normalise:
        assert (got.weights.sum(dim=1) - 2.5).abs().max() < 1e-12


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("case", list(adversarial()))
def test_hash_with_weights_stays_sound_in_float32(case: str, normalise: bool) -> None:
    z = adversarial()[case].float().requires_grad_()
    spec = RouterSpec("hash_sqrt_softplus", normalise=normalise)
    got = fixed.hashed_sqrt_softplus(scores_of(z, fixed.balanced_table(V, E, 3, 0), tokens_of()), spec, 3)
    sound(got, 3, E)
    got.weights.sum().backward()
    assert z.grad is not None
    assert bool(z.grad.isfinite().all())


def test_hash_with_weights_has_finite_difference_gradients() -> None:
    table, tokens, spec = (
        fixed.balanced_table(V, E, 3, 0),
        tokens_of(),
        RouterSpec("hash_sqrt_softplus", normalise=True),
    )
    z = adversarial()["random"].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda leaf: fixed.hashed_sqrt_softplus(scores_of(leaf, table, tokens), spec, 3).weights, (z,)
    )


def test_hash_with_weights_is_the_released_one() -> None:
    released = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    configuration = pytest.importorskip("transformers.models.deepseek_v4.configuration_deepseek_v4")
    config = configuration.DeepseekV4Config(
        vocab_size=V, hidden_size=16, n_routed_experts=E, num_experts_per_tok=3, routed_scaling_factor=1.5
    )
    router = released.DeepseekV4HashRouter(config)
    table, tokens, x = fixed.balanced_table(V, router.num_experts, 3, 0), tokens_of(), torch.randn(12, 16)
    router.weight.data = torch.randn(router.weight.shape)
    router.tid2eid.copy_(table)
    logits, weights, ids = router(x, tokens)
    spec = RouterSpec("hash_sqrt_softplus", normalise=True, scale=1.5)
    gate = {"router": router.weight.data, "table": table}
    scores = linear(spec, x, gate, Side(token_ids=tokens))
    got = fixed.hashed_sqrt_softplus(scores, spec, 3)
    torch.testing.assert_close(scores.logits, logits)
    assert torch.equal(got.ids, ids)
    torch.testing.assert_close(got.weights, weights)


def test_domain_random_is_its_loop() -> None:
    spec, table, tokens = RouterSpec("domain_random", groups=4), fixed.balanced_table(V, E, 1, 0), tokens_of()
    domains = torch.arange(12) % 4
    got = fixed.domain_random(scores_of(torch.randn(12, E).double(), table, tokens, domains), spec, 1)
    rows = zip(domains.tolist(), tokens.tolist(), strict=True)
    same(got, [([domain * 2 + int(table[token, 0]) % 2], [1.0]) for domain, token in rows])
    assert torch.equal(got.ids[:, 0] // 2, domains)


def test_every_domain_spreads_the_vocabulary_evenly() -> None:
    spec, table = RouterSpec("domain_random", groups=4), fixed.balanced_table(4000, 32, 1, 0)
    for domain in range(4):
        where = torch.full((4000,), domain)
        scores = scores_of(torch.zeros(4000, 32), table, torch.arange(4000), where)
        counts = fixed.domain_random(scores, spec, 1).counts()
        assert set(counts[domain * 8 : domain * 8 + 8].tolist()) == {500}


# The balanced table.


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_balanced_table_is_balanced_and_its_rows_distinct(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 12))
    top_k, rows = data.draw(st.integers(1, experts)), data.draw(st.integers(1, 60))
    table = fixed.balanced_table(rows, experts, top_k, data.draw(st.integers(0, 5)))
    assert table.dtype == torch.int64
    assert table.shape == (rows, top_k)
    assert all(len(set(row)) == top_k for row in table.tolist())
    counts = torch.bincount(table.flatten(), minlength=experts)
    assert len(counts) == experts
    assert int(counts.max() - counts.min()) <= 1


def test_a_balanced_table_is_random_by_its_seed() -> None:
    one, again, other = (fixed.balanced_table(1000, 16, 2, seed) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    pairs = {tuple(sorted(row)) for row in one.tolist()}
    assert len(pairs) == 120  # all pairs of 16 experts: nothing ties two of them together
    neighbours = (one[1:, 0] == one[:-1, 0]).double().mean()
    assert abs(float(neighbours) - 1 / 16) < 0.04


@pytest.mark.parametrize(("rows", "experts", "top_k"), [(10, 4, 5), (10, 4, 0), (0, 4, 2)])
def test_an_impossible_table_is_refused(rows: int, experts: int, top_k: int) -> None:
    with pytest.raises(ValueError, match=f"no table of {rows} rows can name {top_k} distinct experts of {experts}"):
        fixed.balanced_table(rows, experts, top_k, 0)


# What is refused.

GOOD = fixed.balanced_table(V, E, 2, 0)


def spoiled(row: int, column: int, value: int) -> Tensor:
    table = GOOD.clone()
    table[row, column] = value
    return table


@pytest.mark.parametrize("rule", ["hashed", "hashed_sqrt_softplus"])
@pytest.mark.parametrize(
    ("table", "tokens", "match"),
    [
        (None, tokens_of(), "needs table, and none was given"),
        (GOOD, None, "needs token_ids, and none was given"),
        (GOOD, torch.full((12,), V), "a token id is not among the table's 0 to 39"),
        (GOOD, torch.full((12,), -1), "a token id is not among the table's 0 to 39"),
        (GOOD[:20], torch.full((12,), 20), "a token id is not among the table's 0 to 19"),
        (GOOD, tokens_of(11), r"token_ids torch.int64 \[11\]; expected int64 \[12\]"),
        (GOOD, tokens_of().float(), r"token_ids torch.float32 \[12\]; expected int64 \[12\]"),
        (GOOD[:, :1], tokens_of(), r"a table torch.int64 \[40, 1\]; expected int64 \[V, 2\]"),
        (GOOD[:, 0], tokens_of(), r"a table torch.int64 \[40\]; expected"),
        (GOOD.float(), tokens_of(), r"a table torch.float32 \[40, 2\]; expected"),
        (spoiled(39, 1, E), tokens_of(), "the table names an expert that is not among 0 to 7"),
        (spoiled(39, 1, -1), tokens_of(), "the table names an expert that is not among 0 to 7"),
        (spoiled(5, 1, int(GOOD[5, 0])), torch.full((12,), 5), "a row of the table names an expert twice"),
    ],
)
def test_tables_and_tokens_that_do_not_fit_are_refused(
    rule: str, table: Tensor | None, tokens: Tensor | None, match: str
) -> None:
    kind = {"hashed": "hash", "hashed_sqrt_softplus": "hash_sqrt_softplus"}[rule]
    with pytest.raises(ValueError, match=f"^router '{kind}'.*{match}"):
        fixed.check_lookup(scores_of(torch.randn(12, E), table, tokens), RouterSpec(kind), 2)


@pytest.mark.parametrize(
    ("groups", "domains", "top_k", "match"),
    [
        (4, None, 1, "needs domains, and none was given"),
        (4, torch.full((12,), 4), 1, "a domain is not among 0 to 3"),
        (4, torch.full((12,), -1), 1, "a domain is not among 0 to 3"),
        (4, torch.zeros(3, dtype=torch.int64), 1, r"domains torch.int64 \[3\]; expected int64 \[12\]"),
        (3, torch.zeros(12, dtype=torch.int64), 1, "3 groups do not divide 8 experts"),
        (0, torch.zeros(12, dtype=torch.int64), 1, "0 groups do not divide 8 experts"),
    ],
)
def test_domains_that_do_not_fit_are_refused(groups: int, domains: Tensor | None, top_k: int, match: str) -> None:
    scores = scores_of(torch.randn(12, E), GOOD[:, :1], tokens_of(), domains)
    with pytest.raises(ValueError, match=f"^router 'domain_random'.*{match}"):
        fixed.check_lookup(scores, RouterSpec("domain_random", groups=groups), top_k)
