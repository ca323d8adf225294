"""What holds for every router of the table, from logits given: the list at the foot of the router catalogue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moebench.catalogue.gate import gate_shapes
from moebench.catalogue.routers import ROUTERS, RouterInfo, is_causal, needed_picks
from moebench.catalogue.spec import LayerSpec, RouterSpec
from moebench.point import DROP_ORDERS, Capacity
from moebench.routing import Mix, Ragged, Scores, Side, TopK, apply_capacity, capacity_slots, route
from moebench.routing.fixed import balanced_table
from moebench.routing.forms import Routing
from moebench.routing.route import side_width

T, E, D = 48, 8, 32
INFINITY = float("inf")
MODES = ["inference", "training"]
EVERY = [(kind, mode) for kind in ROUTERS for mode in MODES]


def layer_for(kind: str, mode: str = "inference", **more: Any) -> LayerSpec:
    router = RouterSpec(kind, training=mode == "training", **(ROUTERS[kind].defaults | more))
    return LayerSpec(D, 16, E, needed_picks(kind, E) or 2, router=router)


def scores_for(layer: LayerSpec, logits: Tensor, seed: int = 0) -> Scores:
    """All that the router looks at, drawn, with these logits."""
    g, kind, tokens = torch.Generator().manual_seed(seed), layer.router.kind, len(logits)
    gate, side = gate_shapes(layer), ROUTERS[kind].side
    columns = side_width(layer)
    groups = layer.router.groups
    hierarchical = kind == "hierarchical_noisy_topk"
    noisy = "noise" in gate and layer.router.training
    return Scores(
        logits,
        bias=0.02 * torch.randn(E, generator=g) if "selection_bias" in gate else None,
        noise_logits=torch.randn(tokens, E + groups * hierarchical, generator=g) if noisy else None,
        group_logits=torch.randn(tokens, groups, generator=g) if hierarchical else None,
        table=balanced_table(100, E, layer.top_k, seed) if "table" in gate else None,
        thresholds=torch.full((E,), 0.2) if "thresholds" in gate else None,
        side=Side(
            token_ids=torch.randint(100, (tokens,), generator=g) if "token_ids" in side else None,
            domains=torch.randint(groups, (tokens,), generator=g) if "domains" in side else None,
            context=torch.randn(tokens, 16, generator=g) if "context" in side else None,
            noise=torch.rand(tokens, columns, generator=g) if columns else None,
        ),
    )


def some(name: str, tokens: int = T) -> Tensor:
    z = torch.randn(tokens, E, generator=torch.Generator().manual_seed(3))
    one_hot = torch.zeros(tokens, E).scatter_(1, torch.arange(tokens).unsqueeze(1) % E, 50.0)
    half = z.masked_fill(torch.arange(E) % 2 == 0, -INFINITY)
    return {
        "random": z, "equal": torch.ones_like(z), "one hot": one_hot, "huge": z * 1e30, "infinite": z.sign() * INFINITY,
        "half -inf": half, "all -inf": torch.full_like(z, -INFINITY), "one loved": z + 40 * (torch.arange(E) == 3),
    }[name]  # fmt: skip


LOGITS = ["random", "equal", "one hot", "huge", "infinite", "half -inf", "all -inf", "one loved"]


def answer(kind: str, mode: str, logits: Tensor, **more: Any) -> tuple[LayerSpec, Routing]:
    layer = layer_for(kind, mode, **more)
    return layer, route(layer, scores_for(layer, logits))


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize(("kind", "mode"), EVERY)
def test_whatever_the_logits_a_routing_is_sound(kind: str, mode: str, logits: str) -> None:
    layer, routing = answer(kind, mode, some(logits))
    assert type(routing).__name__ == ROUTERS[kind].form
    if isinstance(routing, Mix):
        for name, value, dim in (("dispatch", routing.dispatch, 0), ("combine", routing.combine, 1)):
            assert value.isfinite().all(), name
            assert (value >= 0).all(), name
            assert (value.sum(dim=dim) - 1).abs().max() < 1e-5, name
        return
    token, expert, weight = routing.assignments()
    assert weight.isfinite().all()
    assert (weight >= 0).all()
    assert ((expert >= 0) & (expert < E)).all()
    pairs = token * E + expert
    assert len(pairs.unique()) == len(pairs), "a token has an expert twice"
    if isinstance(routing, TopK):
        assert routing.ids.shape == routing.weights.shape == (T, layer.top_k)
        assert (routing.weights[routing.ids < 0] == 0).all()
        assert routing.kept + int((routing.wanted_ids < 0).sum()) == T * layer.top_k
    if ROUTERS[kind].balance == "by construction" or (mode == "training" and kind in ("base", "batch_mask")):
        assert (routing.counts() == T * layer.top_k // E).all()


@pytest.mark.parametrize(("kind", "mode"), EVERY)
def test_weights_sum_to_what_the_table_says(kind: str, mode: str) -> None:
    info = ROUTERS[kind]
    scaled = info.weights == "scale" or info.defaults.get("normalise")
    _, routing = answer(kind, mode, some("random"), **({"scale": 2.5} if scaled else {}))
    if isinstance(routing, Mix) or not (scaled or info.weights == "1"):
        return
    token, _, weight = routing.assignments()
    total = torch.zeros(T).index_add(0, token, weight)
    took = routing.per_token() > 0
    if kind == "gshard_top2" and mode == "training":
        took &= routing.per_token() == 2  # the pair is renormalised before the second is drawn
    assert took.any()
    assert (total[took] - (2.5 if scaled else 1.0)).abs().max() < 1e-5


@pytest.mark.parametrize(("kind", "mode"), EVERY)
def test_causal_means_that_later_tokens_do_not_matter(kind: str, mode: str) -> None:
    """And where the table says no, they do."""
    layer = layer_for(kind, mode)
    scores = scores_for(layer, some("random"))
    other = some("one loved")
    changed = Scores(**{**vars(scores), "logits": torch.cat([scores.logits[: T // 2], other[T // 2 :]])})
    before, after = (first_half(route(layer, each)) for each in (scores, changed))
    same = len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert same == causal(ROUTERS[kind], mode)


def test_causal_under_a_capacity() -> None:
    """First come by position takes nobody's slot; every other order lets a later token take one. Tried here."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randn(64, E, generator=g).topk(2).indices
    weights = torch.rand(64, 2, generator=g)
    other_ids, other = ids.clone(), weights.clone()
    other_ids[32:], other[32:] = torch.tensor([0, 1]), 2.0
    for order in DROP_ORDERS:
        capacity = Capacity(0.4, order=order)
        slots = capacity_slots(capacity, 64, 2, E)
        kept, again = (apply_capacity(i, w, slots, E, order)[0][:32] for i, w in ((ids, weights), (other_ids, other)))
        assert is_causal(RouterSpec(), capacity) == torch.equal(kept, again), order
        assert is_causal(RouterSpec(), Capacity(order=order))
        assert not is_causal(RouterSpec("expert_choice"), capacity)
    assert is_causal(RouterSpec(), Capacity(0.0, "tutel", "choice"))
    assert is_causal(RouterSpec("base"), Capacity())
    assert not is_causal(RouterSpec("base", training=True), Capacity())
    assert not is_causal(RouterSpec("mine.py:f"), Capacity())


def causal(info: RouterInfo, mode: str) -> bool:
    return info.causal == "yes" or (info.causal == "inference" and mode == "inference")


def first_half(routing: Routing) -> list[Tensor]:
    half = T // 2
    if isinstance(routing, Mix):
        return [routing.dispatch[:half], routing.combine[:half]]
    if isinstance(routing, Ragged):
        kept = routing.token < half
        return [routing.token[kept], routing.expert[kept], routing.weight[kept]]
    return [routing.ids[:half], routing.weights[:half]]


@pytest.mark.parametrize(("kind", "mode"), EVERY)
def test_the_same_noise_gives_the_same_routing(kind: str, mode: str) -> None:
    layer = layer_for(kind, mode)
    first, again = (first_half(route(layer, scores_for(layer, some("random"), seed=7))) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    if side_width(layer) and kind != "switch_top1":  # whose noise is in its make
        logits = some("equal" if kind == "sparsemixer" else "random")  # which draws among near ties only
        seen = [first_half(route(layer, scores_for(layer, logits, seed=seed)))[0] for seed in (7, 8)]
        assert not torch.equal(*seen)


@pytest.mark.parametrize("kind", [kind for kind in ROUTERS if "selection_bias" in ROUTERS[kind].gate])
def test_a_selection_bias_moves_choices_and_no_weights(kind: str) -> None:
    layer = layer_for(kind, normalise=False)
    scores = scores_for(layer, some("random"))
    plain, pushed = (
        route(layer, Scores(**{**vars(scores), "bias": bias}))
        for bias in (torch.zeros(E), 10.0 * (torch.arange(E) == 5))
    )
    assert isinstance(plain, TopK)
    assert isinstance(pushed, TopK)
    assert (pushed.ids[:, 0] == 5).all()
    both = plain.ids == 5
    assert both.any()
    at = both.any(dim=1)
    assert torch.equal(plain.weights[both], pushed.weights[at, 0])


@pytest.mark.parametrize("kind", ["group_limited", "group_limited_sum2", "sigmoid_bias", "softmax_bias"])
def test_no_token_leaves_its_best_groups(kind: str) -> None:
    layer = LayerSpec(D, 16, 16, 4, router=RouterSpec(kind, groups=4, topk_groups=2))
    z = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    found = route(layer, Scores(z, bias=torch.zeros(16) if "bias" in kind else None))
    assert isinstance(found, TopK)
    groups = [set(row) for row in (found.ids // 4).tolist()]
    assert max(map(len, groups)) == 2
    free = z.topk(4).indices // 4
    assert max(len(set(row)) for row in free.tolist()) > 2  # without the limit they would leave them


@pytest.mark.parametrize("kind", ROUTERS)
def test_nan_is_refused_and_counted(kind: str) -> None:
    layer = layer_for(kind)
    z = some("random").clone()
    z[3, 1] = z[5, 0] = float("nan")
    with pytest.raises(ValueError, match=rf"^router '{kind}': the logits of 2 of 48 tokens hold NaN$"):
        route(layer, scores_for(layer, z))


def test_what_does_not_fit_is_one_line() -> None:
    z = some("random")
    cases = [
        (layer_for("softmax_topk"), z[:, :5], r"logits of shape \[48, 5\]; expected \[T, 8\]"),
        (layer_for("softmax_topk"), z.long(), "logits are torch.int64; expected a float dtype"),
        (LayerSpec(D, 16, E, 3, router=RouterSpec("switch_top1")), z, "router 'switch_top1' picks 1, not 3"),
        (LayerSpec(D, 16, E, 2, router=RouterSpec("dense_softmax")), z, "router 'dense_softmax' picks 8, not 2"),
        (layer_for("group_limited", groups=3), z, "2 of 3 groups do not fit 8 experts"),
        (layer_for("group_limited", topk_groups=9), z, "9 of 4 groups do not fit 8 experts"),
        (layer_for("noisy_topk", "training"), z, "draws noise in training, and none was given"),
    ]
    for layer, logits, words in cases:
        with pytest.raises(ValueError, match=words) as error:
            route(layer, logits)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="top_k is 9, more than the 8 routed experts"):
        LayerSpec(D, 16, E, 9)
    with pytest.raises(ValueError, match="router 'nobody' is not known"):
        route(LayerSpec(D, 16, E, 2, router=RouterSpec("nobody")), z)


@pytest.mark.parametrize("kind", [kind for kind in ROUTERS if ROUTERS[kind].form != "Mix" and kind != "frozen_random"])
def test_float64_decides_in_float64(kind: str) -> None:
    """So that a rule can be its own oracle."""
    layer = layer_for(kind)
    found = route(layer, scores_for(layer, some("random").double()))
    assert not isinstance(found, Mix)
    assert found.assignments()[2].dtype == torch.float64
