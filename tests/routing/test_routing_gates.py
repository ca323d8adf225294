"""Gates that are not one linear map, two levels, contexts and nodes; and what every router beyond plain top-k keeps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import router_loops as loops
import torch
from router_loops import adversarial, gate_for, layer_for, same, side_for, sound, uniform
from torch import Tensor

from moebench.catalogue.routers import ROUTERS
from moebench.catalogue.spec import RouterSpec
from moebench.routing import context, projected, two_level
from moebench.routing.fixed import check_lookup
from moebench.routing.forms import TopK
from moebench.routing.route import make_scores, route
from moebench.routing.scores import Scores, Side

NO_SIDE = Side()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dot(a: Tensor, b: Tensor) -> float:
    return math.fsum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


# Cosine.


def cosine_gate(temperature: float) -> dict[str, Tensor]:
    return {
        "project": random(7, 5, seed=1),
        "router": random(4, 7, seed=2),
        "temperature": torch.tensor(temperature, dtype=torch.float64),
    }


@pytest.mark.parametrize(("temperature", "scale"), [(0.7, math.exp(0.7)), (-3.0, math.exp(-3)), (9.0, 100.0)])
def test_cosine_is_its_loop(temperature: float, scale: float) -> None:
    x, gate = random(6, 5), cosine_gate(temperature)
    got = projected.cosine(RouterSpec("cosine"), x, gate, NO_SIDE).logits
    for t in range(6):
        p = torch.tensor([dot(row, x[t]) for row in gate["project"]], dtype=torch.float64)
        for e, w in enumerate(gate["router"]):
            want = scale * dot(p, w) / math.sqrt(dot(p, p) * dot(w, w))
            assert float(got[t, e]) == pytest.approx(want, rel=1e-12, abs=1e-13)


def test_cosine_ignores_lengths_and_survives_extreme_ones() -> None:
    x, gate = random(6, 5), cosine_gate(0.7)
    want = projected.cosine(RouterSpec("cosine"), x, gate, NO_SIDE).logits.float()
    narrow = {name: value.float() for name, value in gate.items()}
    for length in (1e-30, 1.0, 1e30):
        got = projected.cosine(RouterSpec("cosine"), length * x.float(), narrow, NO_SIDE).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    nothing = projected.cosine(RouterSpec("cosine"), torch.zeros(2, 5), narrow, NO_SIDE).logits
    assert torch.equal(nothing, torch.zeros(2, 4))


# Attention.


def test_attention_is_its_loop() -> None:
    x, E = random(6, 5), 4
    gate = {name: random(E, 5, seed=seed) for seed, name in enumerate(("router", "key", "value"))}
    got = projected.attention(RouterSpec("attention"), x, gate, NO_SIDE).logits
    for t in range(6):
        q, k, v = ([dot(row, x[t]) for row in gate[name]] for name in ("router", "key", "value"))
        for i in range(E):
            p = loops.softmax([q[i] * k[j] for j in range(E)])
            want = math.fsum(p[j] * v[j] for j in range(E))
            assert float(got[t, i]) == pytest.approx(want, rel=1e-10, abs=1e-12)


def test_attention_gradients_are_finite_differences() -> None:
    gate = {name: random(3, 5, seed=seed).requires_grad_() for seed, name in enumerate(("router", "key", "value"))}
    x = random(2, 5).requires_grad_()

    def logits(x: Tensor, *maps: Tensor) -> Tensor:
        return projected.attention(RouterSpec("attention"), x, dict(zip(gate, maps, strict=True)), NO_SIDE).logits

    assert torch.autograd.gradcheck(logits, (x, *gate.values()))


# Tanh network.


def test_tanh_network_is_its_loop() -> None:
    x, E = random(6, 5), 4
    gate = {"router": random(E, 5, seed=1), "mix": random(E, E, seed=2), "noise": random(E, 5, seed=3)}
    got = projected.tanh_network(RouterSpec("noisy_topk_tanh", training=True), x, gate, Side(noise=uniform(6, E)))
    assert got.noise_logits is not None
    for t in range(6):
        hidden = torch.tensor([math.tanh(dot(row, x[t])) for row in gate["router"]], dtype=torch.float64)
        for e in range(E):
            assert float(got.logits[t, e]) == pytest.approx(dot(gate["mix"][e], hidden), rel=1e-12, abs=1e-13)
            assert float(got.noise_logits[t, e]) == pytest.approx(dot(gate["noise"][e], x[t]), rel=1e-12, abs=1e-13)


# Two levels.

# E, groups, topk_groups, top_k.
LEVELS = [(8, 4, 2, 2), (8, 4, 2, 4), (12, 3, 1, 4), (12, 3, 3, 3), (8, 1, 1, 3), (8, 8, 3, 3)]


def two_level_spec(groups: int, topk_groups: int, *, training: bool = False, scale: float = 1.0) -> RouterSpec:
    return RouterSpec("hierarchical_noisy_topk", groups=groups, topk_groups=topk_groups, training=training, scale=scale)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("case", list(adversarial()))
@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_two_levels_are_their_loop(level: tuple[int, int, int, int], case: str, training: bool) -> None:
    E, G, chosen, top_k = level
    spec = two_level_spec(G, chosen, training=training, scale=1.5)
    z, z_group = adversarial(9, E)[case], adversarial(9, G, seed=1)[case]
    u, spread = uniform(9, E + G), random(9, E + G, seed=5)
    scores = Scores(z, noise_logits=spread, group_logits=z_group, side=Side(noise=u if training else None))
    got = two_level.hierarchical(scores, spec, top_k)
    rows = zip(z.tolist(), z_group.tolist(), u.tolist(), spread.tolist(), strict=True)
    same(got, [loops.hierarchical(a, b, c if training else None, spec, top_k, d) for a, b, c, d in rows])
    assert (got.weights.sum(dim=1) - 1.5).abs().max() < 1e-12
    assert max(len(set(row)) for row in (got.ids // (E // G)).tolist()) <= chosen


def test_two_level_scores_name_experts_before_groups() -> None:
    layer = layer_for("hierarchical_noisy_topk", training=True)
    x, gate = random(5, 24), gate_for(layer)
    assert two_level.two_level_scores(layer.router, x, gate, NO_SIDE).noise_logits is None
    got = two_level.two_level_scores(layer.router, x, gate, side_for(layer, 5))
    assert got.noise_logits is not None
    assert got.group_logits is not None
    assert got.noise_logits.shape == (5, 8 + 4)
    for t in range(5):
        for column in range(12):
            row = gate["noise"][column] if column < 8 else gate["group_noise"][column - 8]
            assert float(got.noise_logits[t, column]) == pytest.approx(dot(row, x[t]), rel=1e-11, abs=1e-12)
        assert float(got.group_logits[t, 1]) == pytest.approx(dot(gate["groups"][1], x[t]), rel=1e-11, abs=1e-12)


def test_two_level_gradients_are_finite_differences() -> None:
    spec, u = two_level_spec(4, 2, training=True), uniform(3, 12)

    def weights(z: Tensor, z_group: Tensor, spread: Tensor) -> Tensor:
        scores = Scores(z, noise_logits=spread, group_logits=z_group, side=Side(noise=u))
        return two_level.hierarchical(scores, spec, 4).weights

    leaves = tuple(each.requires_grad_() for each in (random(3, 8), random(3, 4, seed=1), random(3, 12, seed=2)))
    assert torch.autograd.gradcheck(weights, leaves)


@pytest.mark.parametrize(
    ("spec", "top_k", "match"),
    [
        (two_level_spec(4, 2), 3, "3 picks do not spread evenly over 2 of 4 groups"),
        (two_level_spec(4, 5), 5, "5 picks do not spread evenly over 5 of 4 groups"),
        (two_level_spec(4, 1), 3, "3 picks in groups of 2 experts"),
        (two_level_spec(3, 1), 2, "3 groups do not divide 8 experts"),
        (two_level_spec(2, 1), 2, "group_logits of 4 groups; expected 2"),
        (two_level_spec(4, 2, training=True), 2, "needs noise in training"),
    ],
)
def test_two_levels_that_do_not_fit_are_refused(spec: RouterSpec, top_k: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        two_level.hierarchical(Scores(random(3, 8), group_logits=random(3, 4)), spec, top_k)


def test_two_levels_need_their_first() -> None:
    with pytest.raises(ValueError, match="needs group_logits, and none was given"):
        two_level.hierarchical(Scores(random(3, 8)), two_level_spec(4, 2), 2)


# Contexts.


def test_mixer_looks_at_the_context_alone() -> None:
    spec, gate = RouterSpec("mixer"), {"router": random(4, 3, seed=1), "logit_bias": random(4, seed=2)}
    ctx = random(9, 3, seed=3)
    one, other = (context.context_logits(spec, x, gate, Side(context=ctx)) for x in (random(9, 5), 100 * random(9, 5)))
    assert torch.equal(one.logits, other.logits)
    got = context.mixer(one, spec, 1)
    for t in range(9):
        z = [dot(gate["router"][e], ctx[t]) + float(gate["logit_bias"][e]) for e in range(4)]
        assert got.ids[t].tolist() == loops.best(z, 1)
    assert torch.equal(got.weights, torch.ones(9, 1, dtype=torch.float64))


@pytest.mark.parametrize("case", list(adversarial()))
def test_mixer_on_hostile_logits(case: str) -> None:
    z = adversarial()[case]
    same(context.mixer(Scores(z), RouterSpec("mixer"), 1), [(loops.best(row, 1), [1.0]) for row in z.tolist()])


def test_a_context_that_does_not_fit_is_refused() -> None:
    spec, gate = RouterSpec("mixer"), {"router": random(4, 3)}
    with pytest.raises(ValueError, match="router 'mixer' needs context, and none was given"):
        context.context_logits(spec, random(9, 5), gate, NO_SIDE)
    with pytest.raises(ValueError, match=r"context of shape \[9, 2\]; expected \[9, 3\]"):
        context.context_logits(spec, random(9, 5), gate, Side(context=random(9, 2)))
    with pytest.raises(ValueError, match="picks 1, not 2"):
        context.mixer(Scores(random(9, 4)), spec, 2)


def families(E: int = 5, each: int = 20, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Contexts around E far corners, shuffled; the losses, lowest for each family's own expert; that expert."""
    generator = torch.Generator().manual_seed(seed)
    family = torch.arange(E).repeat_interleave(each)[torch.randperm(E * each, generator=generator)]
    corner = 4 * torch.eye(E, dtype=torch.float64)
    contexts = corner[family] + 0.3 * torch.randn(E * each, E, generator=generator, dtype=torch.float64)
    owner = torch.randperm(E, generator=generator)[family]
    losses = 1 + torch.rand(E * each, E, generator=generator, dtype=torch.float64)
    losses[torch.arange(E * each), owner] = 0.1
    return contexts, losses, owner


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_fitted_gate_sends_each_family_to_the_expert_that_knows_it(seed: int, bias: bool) -> None:
    contexts, losses, owner = families(seed=seed)
    fitted = context.fit_context_gate(contexts, losses, bias=bias)
    assert torch.equal(fitted.experts, owner)
    assert (fitted.logit_bias is not None) == bias
    gate = {"router": fitted.router} | ({"logit_bias": fitted.logit_bias} if fitted.logit_bias is not None else {})
    spec = RouterSpec("mixer", logit_bias=bias)
    scores = context.context_logits(spec, contexts, gate, Side(context=contexts))
    assert torch.equal(context.mixer(scores, spec, 1).ids[:, 0], owner)


# Losses of expert 0 in the first cluster; of expert 1 there; of both in the second: 6. By the mean, the smallest or, of
# an even number, the lower or the upper middle loss, one of these would be matched the other way round.
@pytest.mark.parametrize(
    ("zeroth", "first", "matched"),
    [([0, 0, 9, 9, 9], 6, 1), ([0, 0, 9, 9], 5, 0), ([0, 0, 9, 9], 4, 1), ([9, 1, 1, 1, 9], 3, 0)],
)
def test_clusters_are_matched_by_median_loss(zeroth: list[float], first: float, matched: int) -> None:
    N = len(zeroth)
    contexts = torch.tensor([[1.0, 0.0]] * N + [[0.0, 1.0]] * N, dtype=torch.float64)
    losses = torch.full((2 * N, 2), 6.0, dtype=torch.float64)
    losses[:N, 0], losses[:N, 1] = torch.tensor(zeroth, dtype=torch.float64), first
    assert context.fit_context_gate(contexts, losses).experts.tolist() == [matched] * N + [1 - matched] * N


def test_only_a_bias_tells_families_on_one_ray_apart() -> None:
    contexts = torch.tensor([[1.0]] * 5 + [[3.0]] * 5, dtype=torch.float64)
    losses = torch.ones(10, 2, dtype=torch.float64)
    losses[:5, 1] = losses[5:, 0] = 0.0
    fitted = context.fit_context_gate(contexts, losses, bias=True)
    assert fitted.logit_bias is not None
    chosen = (contexts @ fitted.router.T + fitted.logit_bias).argmax(dim=1)
    assert chosen.tolist() == fitted.experts.tolist() == [1] * 5 + [0] * 5
    without = context.fit_context_gate(contexts, losses)
    assert len(set((contexts @ without.router.T).argmax(dim=1).tolist())) == 1


def test_the_fit_is_least_squares() -> None:
    """The residual is orthogonal to the contexts: no W does better."""
    contexts, losses, owner = families()
    fitted = context.fit_context_gate(contexts, losses)
    residual = contexts @ fitted.router.T - torch.nn.functional.one_hot(owner, 5).double()
    assert (contexts.T @ residual).abs().max() < 1e-9


def test_each_expert_gets_one_cluster_even_if_one_expert_is_best_everywhere() -> None:
    contexts, losses, _ = families()
    losses[:, 2] = 0.0
    assert set(context.fit_context_gate(contexts, losses).experts.tolist()) == set(range(5))


def test_clusters_are_by_mean_absolute_distance() -> None:
    """(1.8, 8) is nearer to (0, 0) in absolute distance, 9.8 to 10.2, and nearer to (6, 2) in squared, 67 to 54."""
    corners = torch.tensor([[0.0, 0.0], [6.0, 2.0]], dtype=torch.float64).repeat_interleave(100, dim=0)
    contexts = torch.cat([corners, torch.tensor([[1.8, 8.0]], dtype=torch.float64)])
    losses = torch.ones(201, 2, dtype=torch.float64)
    losses[:100, 0] = losses[100:200, 1] = 0.0
    assert context.fit_context_gate(contexts, losses).experts.tolist() == [0] * 100 + [1] * 100 + [0]


def test_a_fit_of_repeated_contexts_leaves_clusters_empty() -> None:
    contexts = torch.ones(6, 3, dtype=torch.float64)
    losses = torch.ones(6, 4, dtype=torch.float64)
    losses[:, 3] = 0
    fitted = context.fit_context_gate(contexts, losses)
    assert set(fitted.experts.tolist()) == {3}
    assert bool(fitted.router.isfinite().all())
    assert context.fit_context_gate(contexts[:1], losses[:1, :1]).experts.tolist() == [0]


@pytest.mark.parametrize(
    ("contexts", "losses", "match"),
    [
        (random(4, 3), random(5, 2), r"context \[4, 3\], losses \[5, 2\]; expected"),
        (random(2, 3), random(2, 4), "N >= E"),
        (random(4), random(4, 2), "expected"),
        (random(4, 3) * math.inf, random(4, 2), "must be finite"),
        (random(4, 3), random(4, 2) * math.nan, "must be finite"),
    ],
)
def test_a_fit_of_what_does_not_fit_is_refused(contexts: Tensor, losses: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        context.fit_context_gate(contexts, losses)


# Locality.


def local_pick(z: list[float], node: int, spec: RouterSpec, top_k: int) -> loops.Pick:
    size = len(z) // spec.groups
    h = [value + (context.LOCALITY_BIAS if e // size == node else 0.0) for e, value in enumerate(z)]
    ids = loops.best(h, top_k)
    p = loops.softmax(z)
    return ids, loops.scaled([p[e] for e in ids], spec)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("case", [name for name in adversarial() if name not in ("nothing_left", "one_left")])
def test_locality_is_its_loop(case: str, normalise: bool) -> None:
    spec = RouterSpec("locality_bias", groups=4, normalise=normalise)
    z = adversarial()[case]
    nodes = torch.arange(12) % 4
    got = context.locality_bias(Scores(z, side=Side(domains=nodes)), spec, 3)
    same(got, [local_pick(row, node, spec, 3) for row, node in zip(z.tolist(), nodes.tolist(), strict=True)])


@pytest.mark.parametrize("case", list(adversarial()))
def test_locality_stays_sound_in_float32(case: str) -> None:
    z = adversarial()[case].float()
    spec = RouterSpec("locality_bias", groups=4)
    sound(context.locality_bias(Scores(z, side=Side(domains=torch.arange(12) % 4)), spec, 3), 3, 8)


def test_locality_keeps_more_tokens_at_home_and_no_weight_changes() -> None:
    spec, z, nodes = RouterSpec("locality_bias", groups=4), random(4000, 8), torch.arange(4000) % 4
    got = context.locality_bias(Scores(z, side=Side(domains=nodes)), spec, 2)
    at_home = (got.ids // 2 == nodes.unsqueeze(1)).double().mean()
    without = (z.topk(2).indices // 2 == nodes.unsqueeze(1)).double().mean()
    assert at_home > without + 0.1
    assert torch.equal(got.weights, z.softmax(dim=1).gather(1, got.ids))


@pytest.mark.parametrize(
    ("groups", "nodes", "match"),
    [
        (4, None, "needs domains, and none was given"),
        (3, torch.zeros(5, dtype=torch.int64), "3 groups do not divide 8 experts"),
        (4, torch.full((5,), 4), "a domain is not among 0 to 3"),
        (4, torch.full((5,), -1), "a domain is not among 0 to 3"),
        (4, torch.zeros(4, dtype=torch.int64), r"domains torch.int64 \[4\]; expected int64 \[5\]"),
        (4, torch.zeros(5), r"domains torch.float32 \[5\]; expected int64 \[5\]"),
    ],
)
def test_nodes_that_do_not_fit_are_refused(groups: int, nodes: Tensor | None, match: str) -> None:
    scores = Scores(random(5, 8), side=Side(domains=nodes))
    with pytest.raises(ValueError, match=match):
        check_lookup(scores, RouterSpec("locality_bias", groups=groups), 2)


# What every one of them keeps, through the catalogue's own table.

KINDS = [
    "switch_top1", "gshard_top2", "gumbel_top2", "noisy_topk", "noisy_topk_tanh", "noisy_softmax_topk", "sparsemixer",
    "locality_bias", "cosine", "attention", "hierarchical_noisy_topk", "gumbel_straight_through", "mixer",
    "frozen_random", "hash", "hash_sqrt_softplus", "domain_random",
]  # fmt: skip


def through_the_table(kind: str, *, training: bool, seed: int = 0, tokens: int = 50, turned: int = 50) -> TopK:
    """The router on random hidden states; those from `turned` on are others, with other side inputs."""
    layer = layer_for(kind, training=training)
    x, side = random(tokens, 24, seed=seed), side_for(layer, tokens, seed)
    other_x, other = random(tokens, 24, seed=seed + 99), side_for(layer, tokens, seed + 99)
    mixed = {
        name: torch.cat([value[:turned], other.tensors()[name][turned:]]) for name, value in side.tensors().items()
    }
    x = torch.cat([x[:turned], other_x[turned:]])
    routing = route(layer, make_scores(layer, x, gate_for(layer), replace(side, **mixed)))
    assert isinstance(routing, TopK)
    return routing


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", KINDS)
def test_properties_of_every_router(kind: str, training: bool) -> None:
    got, info = through_the_table(kind, training=training), ROUTERS[kind]
    layer = layer_for(kind, training=training)
    sound(got, layer.top_k, layer.routed_experts)
    total = got.weights.sum(dim=1)
    whole = (got.ids >= 0).all(dim=1)
    if info.weights in ("1", "scale"):  # GShard's tokens without a second keep the first one's share
        assert (total[whole] - 1).abs().max() < 1e-12
    if not training or kind != "gshard_top2":
        assert bool(whole.all())
    again = through_the_table(kind, training=training)
    assert torch.equal(got.ids, again.ids)
    assert torch.equal(got.weights, again.weights)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_token_looks_at_later_ones(kind: str, training: bool) -> None:
    assert ROUTERS[kind].causal == "yes"
    whole, turned = through_the_table(kind, training=training), through_the_table(kind, training=training, turned=20)
    assert torch.equal(whole.ids[:20], turned.ids[:20])
    torch.testing.assert_close(whole.weights[:20], turned.weights[:20], rtol=1e-12, atol=0)
    assert not torch.equal(whole.ids[20:], turned.ids[20:])
