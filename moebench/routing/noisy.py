"""Routers that draw noise in training, and nothing in inference. z are the logits, u the noise, uniform in (0, 1).

    jittered                x (1 + 0.01 (2u - 1)), then linear
    gshard_top2             softmax over the two largest z; the second is kept if 2 w2 > u
    gumbel_top2             the first by z, the second by z + g among the others; softmax over the two z
    noisy_topk              h = z + Phi^-1(u) softplus(z_noise); softmax over the k largest h
    noisy_softmax_topk      p = softmax(z + Phi^-1(u) / E); the k largest p as they are
    gumbel_straight_through argmax(z + g); weight 1 with the slope of softmax((z + g) / tau)
    sparsemixer             per pick a softmax over the z near the largest; drawn from it in training

g = -log(-log(u)) is Gumbel noise: argmax(z + g) draws expert e with probability softmax(z)_e. All randomness is in u,
so the same u routes the same way. Ties go to the lower expert. Nothing here waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from moebench.catalogue.routers import router_info
from moebench.catalogue.spec import RouterSpec
from moebench.routing.forms import TopK, top_k_routing
from moebench.routing.scored import renormalised
from moebench.routing.scores import Scores, Side, linear, wide

JITTER = 0.01  # Switch: inputs are multiplied by U(1 - JITTER, 1 + JITTER)
TAU = 1.0  # of the straight-through softmax; published schedules anneal it, and a benchmark has no schedule
NEAR = 0.02  # twice Phi-3.5-MoE's jitter of 0.01: logits this far below the largest, relatively, are masked
MIDPOINT = 1 / 3  # factor on a drawn pick that is not the most likely one; the released code rounds it to 0.3333
MIDPOINT_RATE = 0.75  # how often such a pick gets that factor


def noise_width(spec: RouterSpec, routed_experts: int, hidden_size: int) -> int:
    """Columns of `Side.noise` that the router takes in training; 0 for a router that draws none."""
    if not router_info(spec.kind).noise:
        return 0
    other = {
        "switch_top1": hidden_size,
        "gshard_top2": 1,
        "sparsemixer": 2 * routed_experts + 2,
        "hierarchical_noisy_topk": routed_experts + spec.groups,
    }
    return other.get(spec.kind, routed_experts)


def jittered(spec: RouterSpec, x: Tensor, gate: Mapping[str, Tensor], side: Side) -> Scores:
    """Scores of a linear map of x, which training multiplies by U(0.99, 1.01) first (Switch, arXiv 2101.03961).

    Args:
        x: [T, D].
        gate: as for `linear`.
        side: noise [T, D] in training.

    Raises:
        ValueError: training without noise of D columns.
    """
    if spec.training:
        u = wide(drawn(spec, side.noise, x.shape[1]))
        # In 16 bits the factor itself would have only three or five values.
        x = (wide(x) * (1 + JITTER * (2 * u - 1))).to(x.dtype)
    return linear(spec, x, gate, side)


def gshard_top2(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """GShard (arXiv 2006.16668, algorithm 1), which renormalises the pair before it draws.

    Where the second is not kept its id is -1 and its weight 0; the first keeps its share of the pair.
    Training takes one column of noise.
    """
    expect_picks(spec, top_k, 2)
    z = finite(scores.logits)
    ids = largest(z, 2)
    weights = torch.softmax(z.gather(1, ids), dim=1)
    if spec.training:
        lost = 2 * weights[:, 1:].detach() <= drawn(spec, scores.noise, 1)
        lost = torch.cat([torch.zeros_like(lost), lost], dim=1)
        ids, weights = ids.masked_fill(lost, -1), weights.masked_fill(lost, 0)
    return top_k_routing(ids, weights, z.shape[1], scores.logits)


def gumbel_top2(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """DeepSpeed-MoE (arXiv 2201.05596): noise moves the second choice only, and no weight. Noise [T, E] in training."""
    expect_picks(spec, top_k, 2)
    z = finite(scores.logits)
    ids = largest(z, 2)
    if spec.training:
        first, best = ids[:, :1], largest(finite(z + gumbel(drawn(spec, scores.noise, z.shape[1]))), 2)
        ids = torch.cat([first, torch.where(best[:, :1] == first, best[:, 1:], best[:, :1])], dim=1)
    return top_k_routing(ids, torch.softmax(z.gather(1, ids), dim=1), z.shape[1], scores.logits)


def noisy_topk(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """Shazeer 2017 (arXiv 1701.06538, eq. 3-5), and with a tanh network's logits LLaMA-MoE (arXiv 2406.16554).

    Noise [T, E] and noise_logits [T, E] in training. LLaMA-MoE's released code adds 0.01 to the standard deviation,
    which the equation has not; it is left out here.
    """
    h = finite(scores.logits)
    if spec.training:
        u = drawn(spec, scores.noise, h.shape[1])
        h = with_normal(h, u, needed(spec, "noise_logits", scores.noise_logits))
    ids = largest(h, top_k)
    return top_k_routing(ids, torch.softmax(h.gather(1, ids), dim=1) * spec.scale, h.shape[1], scores.logits)


def noisy_softmax_topk(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """V-MoE (arXiv 2106.05974): standard deviation 1/E on the logits. Noise [T, E] in training."""
    h = finite(scores.logits)
    E = h.shape[1]
    if spec.training:
        h = finite(h + torch.special.ndtri(inside(drawn(spec, scores.noise, E))) / E)
    ids = largest(h, top_k)
    return top_k_routing(ids, renormalised(torch.softmax(h, dim=1).gather(1, ids), spec), E, scores.logits)


def gumbel_straight_through(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """Gumbel-softmax (arXiv 1611.01144, section 2.2): one-hot forward, soft backward, tau = 1.

    Noise [T, E] in training. Only the chosen expert runs, so only its entry of the one-hot vector has a
    gradient: that of p_chosen.
    """
    expect_picks(spec, top_k, 1)
    h = finite(scores.logits)
    if spec.training:
        h = finite(h + gumbel(drawn(spec, scores.noise, h.shape[1])))
    ids = largest(h, 1)
    p = torch.softmax(h / TAU, dim=1).gather(1, ids)
    return top_k_routing(ids, 1 + (p - p.detach()), h.shape[1], scores.logits)


def sparsemixer(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """SparseMixer-v2 as Phi-3.5-MoE has it (arXiv 2409.12136; transformers' phimoe in inference).

    Each pick has its own softmax p, over the logits that lie near the largest one left: (max - z) / max(|z|, max) is at
    most 0.02. Inference takes the largest. Training draws from p, with E + 1 columns of noise a pick: the last one
    decides three times in four to cut the weight of a pick that is not the largest to a third. Its gradient stays that
    of p. Between "not chosen" and "chosen" the two factors are the points of Heun's third-order rule, so the loss is
    differentiated where the rule wants it.

    Returns weights that do not sum to 1: each is the pick's own p.
    """
    expect_picks(spec, top_k, 2)
    z = finite(scores.logits)
    E = z.shape[1]
    u = drawn(spec, scores.noise, 2 * E + 2).split(E + 1, dim=1) if spec.training else (None, None)
    first, w1 = _pick_near(z, z, u[0])
    second, w2 = _pick_near(z, z.scatter(1, first, -torch.inf), u[1])
    return top_k_routing(torch.cat([first, second], 1), torch.cat([w1, w2], 1), E, scores.logits)


def _pick_near(z: Tensor, left: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor]:
    """(id, weight), [T, 1] each, of one pick among the logits left; u [T, E + 1] draws it, None takes the largest."""
    with torch.no_grad():
        best = largest(left, 1)
        top = left.gather(1, best)
        # 0 / 0, where all logits are 0, is NaN and so not far. In place: new memory costs more than the sums.
        far = (top - z).div_(z.abs().clamp_(min=top)) > NEAR
    near = left.masked_fill(far, -torch.inf)
    p = torch.softmax(near, dim=1)
    if u is None:
        return best, p.gather(1, best)
    chosen = largest(near + gumbel(u[:, :-1]), 1)
    weight = p.gather(1, chosen)
    cut = (chosen != best) & (u[:, -1:] <= MIDPOINT_RATE)
    # Forward MIDPOINT times the weight, backward the weight's own gradient.
    return chosen, torch.where(cut, weight - (1 - MIDPOINT) * weight.detach(), weight)


def with_normal(z: Tensor, u: Tensor, noise_logits: Tensor) -> Tensor:
    """z + Phi^-1(u) softplus(noise_logits), all [T, E]; finite."""
    return finite(torch.addcmul(z, torch.special.ndtri(inside(u)), F.softplus(finite(noise_logits).to(z))))


def gumbel(u: Tensor) -> Tensor:
    """-log(-log(u)): Gumbel noise from uniform."""
    return inside(u).log_().neg_().log_().neg_()


def inside(u: Tensor) -> Tensor:
    """u away from 0 and 1, where its quantiles are infinite; a copy."""
    eps = torch.finfo(u.dtype).eps
    return u.clamp(eps, 1 - eps)


def finite(z: Tensor) -> Tensor:
    """Infinities as the largest finite numbers: a row of -inf has no softmax, and -inf is to mark what is taken."""
    limit = torch.finfo(z.dtype)
    return z.clamp(limit.min, limit.max)


def largest(values: Tensor, count: int) -> Tensor:
    """Places of the `count` largest of each row [R, E], falling, ties to the lower place: int64 [R, count].

    On a CPU core a stable sort of rows of 4096 takes forty times as long.
    """
    values = values.detach()
    found = values.topk(min(count + 1, values.shape[1]), dim=1)
    ids = found.indices[:, :count]
    if values.is_cuda:  # to ask whether there are ties would be to wait
        ids = _first_largest(values, count)
    elif count < values.shape[1]:
        tied = found.values[:, -2] == found.values[:, -1]
        if bool(tied.any()):
            ids = ids.index_put((tied.nonzero()[:, 0],), _first_largest(values[tied], count))
    ids = ids.sort(dim=1).values
    return ids.gather(1, values.gather(1, ids).sort(dim=1, descending=True, stable=True).indices)


def _first_largest(values: Tensor, count: int) -> Tensor:
    """The same in any order: torch.topk leaves open which of equal values it takes, and a stable sort costs more."""
    E = values.shape[1]
    last = values.topk(count, dim=1).values[:, -1:]
    # Unique keys: what is above the last value counts E more than its ties, and lower places count more.
    key = torch.arange(E, 0, -1, dtype=torch.int32, device=values.device) + E * (values > last).to(torch.int32)
    return (key * (values >= last)).topk(count, dim=1).indices


def drawn(spec: RouterSpec, noise: Tensor | None, columns: int) -> Tensor:
    """The first columns of the noise.

    Raises:
        ValueError: there is none, or too little.
    """
    found = needed(spec, "noise", noise)
    if found.shape[1] < columns:
        raise ValueError(f"router {spec.kind!r} draws {columns} columns of noise; {found.shape[1]} were given")
    return found[:, :columns]


def needed(spec: RouterSpec, name: str, value: Tensor | None) -> Tensor:
    """The value.

    Raises:
        ValueError: it is None.
    """
    if value is None:
        state = " in training" if "noise" in name else ""
        raise ValueError(f"router {spec.kind!r} needs {name}{state}, and none was given")
    return value


def expect_picks(spec: RouterSpec, top_k: int, picks: int) -> None:
    """Raise ValueError unless the router is asked for the one top_k it is defined for."""
    if top_k != picks:
        raise ValueError(f"router {spec.kind!r} picks {picks}, not {top_k}")
