"""Routers in Python floats, one token at a time; and the logits, weights and side inputs their tests sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from moebench.catalogue.gate import gate_shapes
from moebench.catalogue.routers import ROUTERS, needed_picks
from moebench.catalogue.spec import LayerSpec, RouterSpec
from moebench.routing.forms import TopK
from moebench.routing.noisy import noise_width
from moebench.routing.scores import Scores, Side

Pick = tuple[list[int], list[float]]
Floats = Sequence[float]
INF = math.inf
HIDDEN, CONTEXT = 24, 16


# Small pieces.


def softmax(z: Floats) -> list[float]:
    """Over all of z; a row of -inf counts as a row of equal numbers."""
    top = max(z)
    if top == -INF:
        return [1 / len(z)] * len(z)
    powers = [math.exp(value - top) for value in z]
    return [power / math.fsum(powers) for power in powers]


def best(z: Floats, count: int) -> list[int]:
    """The `count` largest, ties to the lower place."""
    return sorted(range(len(z)), key=lambda place: (-z[place], place))[:count]


def gumbel(u: float) -> float:
    return -math.log(-math.log(u))


def normal(u: float) -> float:
    return NormalDist().inv_cdf(u)


def softplus(z: float) -> float:
    return max(z, 0.0) + math.log1p(math.exp(-abs(z))) if z > -INF else 0.0


def scaled(weights: list[float], spec: RouterSpec) -> list[float]:
    total = math.fsum(weights) + 1e-20 if spec.normalise else 1.0
    return [spec.scale * weight / total for weight in weights]


# One token of each router: z and, in training, its row u of noise.


def gshard_top2(z: Floats, u: Floats | None, spec: RouterSpec) -> Pick:
    ids = best(z, 2)
    weights = softmax([z[e] for e in ids])
    if u is not None and 2 * weights[1] <= u[0]:
        return [ids[0], -1], [weights[0], 0.0]
    return ids, weights


def gumbel_top2(z: Floats, u: Floats | None, spec: RouterSpec) -> Pick:
    first = best(z, 1)[0]
    h = z if u is None else [value + gumbel(v) for value, v in zip(z, u, strict=True)]
    second = next(e for e in best(h, 2) if e != first)
    return [first, second], softmax([z[first], z[second]])


def noisy_topk(z: Floats, u: Floats | None, spec: RouterSpec, top_k: int, spread: Floats) -> Pick:
    h = list(z) if u is None else [a + normal(b) * softplus(c) for a, b, c in zip(z, u, spread, strict=True)]
    ids = best(h, top_k)
    return ids, [spec.scale * weight for weight in softmax([h[e] for e in ids])]


def noisy_softmax_topk(z: Floats, u: Floats | None, spec: RouterSpec, top_k: int) -> Pick:
    h = list(z) if u is None else [value + normal(v) / len(z) for value, v in zip(z, u, strict=True)]
    p = softmax(h)
    ids = best(h, top_k)
    return ids, scaled([p[e] for e in ids], spec)


def gumbel_straight_through(z: Floats, u: Floats | None, spec: RouterSpec) -> Pick:
    return best(z if u is None else [value + gumbel(v) for value, v in zip(z, u, strict=True)], 1), [1.0]


def sparsemixer(z: Floats, u: Floats | None, spec: RouterSpec) -> Pick:
    """Ids and weights, the drawn picks cut to a third."""
    E = len(z)
    ids: list[int] = []
    weights: list[float] = []
    for pick in range(2):
        left = [-INF if e in ids else z[e] for e in range(E)]
        top = best([value if e not in ids else -INF for e, value in enumerate(z)], E)
        largest = next(e for e in top if e not in ids)
        near = [e for e in range(E) if e not in ids and not _far(z[e], left[largest])]
        p = dict(zip(near, softmax([z[e] for e in near]), strict=True))
        chosen, factor = largest, 1.0
        if u is not None:
            mine = u[pick * (E + 1) : (pick + 1) * (E + 1)]
            chosen = min(near, key=lambda e: (-(z[e] + gumbel(mine[e])), e))
            factor = 1 / 3 if chosen != largest and mine[E] <= 0.75 else 1.0
        ids.append(chosen)
        weights.append(factor * p[chosen])
    return ids, weights


def _far(z: float, top: float) -> bool:
    """Whether z lies more than 2 % below top; an infinite gap does, unless all are -inf."""
    if z == -INF:
        return top > -INF
    over = max(abs(z), top)
    return over > 0 and (top - z) / over > 0.02


def hierarchical(
    z: Floats, z_group: Floats, u: Floats | None, spec: RouterSpec, top_k: int, spread: Floats
) -> Pick:  # fmt: skip
    E, G = len(z), len(z_group)
    n, inside = E // G, top_k // spec.topk_groups
    h, h_group = list(z), list(z_group)
    if u is not None:
        h = [a + normal(b) * softplus(c) for a, b, c in zip(z, u[:E], spread[:E], strict=True)]
        h_group = [a + normal(b) * softplus(c) for a, b, c in zip(z_group, u[E:], spread[E:], strict=True)]
    groups = best(h_group, spec.topk_groups)
    found: dict[int, float] = {}
    for group, share in zip(groups, softmax([h_group[g] for g in groups]), strict=True):
        mine = h[group * n : (group + 1) * n]
        picks = best(mine, inside)
        for pick, weight in zip(picks, softmax([mine[i] for i in picks]), strict=True):
            found[group * n + pick] = share * weight * spec.scale
    ids = sorted(found, key=lambda e: (-found[e], e))
    return ids, [found[e] for e in ids]


# What tests are run on.


def adversarial(T: int = 12, E: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Logits float64 [T, E] by name."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(T, E, generator=generator, dtype=torch.float64)
    some = torch.rand(T, E, generator=generator) < 0.6
    hot = torch.zeros(T, E, dtype=torch.float64)
    hot[torch.arange(T), torch.arange(T) % E] = 50.0
    return {
        "random": z,
        "close": 1 + z / 100,
        "negative": -5 + z / 20,
        "equal": torch.full((T, E), 0.7, dtype=torch.float64),
        "zero": torch.zeros(T, E, dtype=torch.float64),
        "few_values": z.round(),
        "one_hot": hot,
        "huge": 1e30 * z.round(),
        "minus_infinity": z.masked_fill(some, -INF),
        "one_left": torch.where(hot > 0, z, -INF),
        "nothing_left": torch.full((T, E), -INF, dtype=torch.float64),
    }


def uniform(T: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    u = torch.rand(T, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return u.clamp(1e-6, 1 - 1e-6).to(dtype)


def same(routing: TopK, picks: Sequence[Pick]) -> None:
    """The routing is exactly these ids, and these weights to rounding."""
    for token, (ids, weights) in enumerate(picks):
        assert routing.ids[token].tolist() == ids, f"token {token}"
        got = routing.weights[token].tolist()
        assert all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-14) for a, b in zip(got, weights, strict=True)), (
            f"token {token}: {got} is not {weights}"
        )


def sound(routing: TopK, top_k: int, routed_experts: int) -> None:
    """Distinct experts, finite weights of at least 0, and 0 where there is no expert."""
    ids, weights = routing.ids, routing.weights
    assert ids.dtype == torch.int64
    assert ids.shape == weights.shape == (routing.tokens, top_k)
    assert routing.routed_experts == routed_experts
    assert int(ids.min()) >= -1
    assert int(ids.max()) < routed_experts
    assert bool(weights.isfinite().all())
    assert bool((weights >= 0).all())
    assert bool((weights[ids < 0] == 0).all())
    for row in ids.tolist():
        real = [e for e in row if e >= 0]
        assert len(set(real)) == len(real)


def layer_for(kind: str, *, E: int = 8, top_k: int | None = None, **more: object) -> LayerSpec:
    """A small layer with the router as the catalogue would have it."""
    spec = RouterSpec(**{"kind": kind, **ROUTERS[kind].defaults, **more})  # type: ignore[arg-type]
    return LayerSpec(HIDDEN, 16, E, top_k or needed_picks(kind, E) or 2, router=spec)


def gate_for(layer: LayerSpec, seed: int = 0, vocabulary: int = 64) -> dict[str, Tensor]:
    """Random gate weights, float64, and a table that fits."""
    from moebench.routing.fixed import balanced_table

    generator = torch.Generator().manual_seed(seed)
    gate = {}
    for name, shape in gate_shapes(layer).items():
        if name == "table":
            gate[name] = balanced_table(vocabulary, layer.routed_experts, layer.top_k, seed)
        else:
            gate[name] = torch.randn(shape, generator=generator, dtype=torch.float64) / 3
    return gate


def side_for(layer: LayerSpec, T: int, seed: int = 0, vocabulary: int = 64) -> Side:
    """All that a router may look at, drawn from the seed; noise in training only."""
    generator = torch.Generator().manual_seed(seed)
    width = noise_width(layer.router, layer.routed_experts, layer.hidden_size) if layer.router.training else 0
    return Side(
        token_ids=torch.randint(vocabulary, (T,), generator=generator),
        domains=torch.randint(layer.router.groups, (T,), generator=generator),
        context=torch.randn(T, CONTEXT, generator=generator, dtype=torch.float64),
        noise=uniform(T, width, seed) if width else None,
    )


def scores_of(z: Tensor, u: Tensor | None = None, **more: Tensor) -> Scores:
    return Scores(z, side=Side(noise=u), **more)
