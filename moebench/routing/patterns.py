"""Traffic patterns: who would choose which expert, before any router is asked."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from moebench.catalogue.spec import RouterSpec
from moebench.routing.capacity import position_in_expert
from moebench.routing.scored import in_best_groups
from moebench.traffic import Traffic

# Draws behind the Monte Carlo estimate of expected active experts; at 4,096
# token draws the estimate of a share moves by under 0.5 % between seeds.
_ACTIVE_TOKEN_DRAWS = 4096
_MAX_NOISE = 1 << 26  # float64 draws held at once: half a gigabyte


def choose_experts(
    traffic: Traffic,
    tokens: int,
    top_k: int,
    routed_experts: int,
    generator: torch.Generator,
    groups: int = 1,
    topk_groups: int = 1,
) -> Tensor:
    """K distinct experts for each token: int64 [T, K].

    `balanced`: each expert gets T*K/E assignments, rounded up or down. `uniform`: every set of K alike.
    `zipf:ALPHA`: popularity of the r-th expert ~ r^-ALPHA, drawn without replacement.
    `active:FRACTION@T`: the zipf whose expected share of active experts over T tokens is FRACTION.

    A router that is limited to `topk_groups` of `groups` groups gets experts of as many groups only: balanced ones
    are then equal to within one inside a group and in all where the numbers divide; of skewed ones each token takes
    the groups whose two most popular experts weigh most.
    """
    if traffic.pattern == "balanced":
        if groups > 1:
            return _balanced_in_groups(tokens, top_k, routed_experts // groups, groups, topk_groups, generator)
        return _balanced(tokens, top_k, routed_experts, generator)
    limits = (groups, topk_groups)
    if traffic.pattern == "uniform":
        return _skewed(0.0, tokens, top_k, routed_experts, generator, *limits)
    if traffic.pattern == "zipf":
        assert traffic.alpha is not None
        return _skewed(traffic.alpha, tokens, top_k, routed_experts, generator, *limits)
    if traffic.pattern == "active":
        assert traffic.fraction is not None
        assert traffic.at_tokens is not None
        alpha = solve_alpha(traffic.fraction, traffic.at_tokens, top_k, routed_experts)
        return _skewed(alpha, tokens, top_k, routed_experts, generator, *limits)
    raise NotImplementedError(f"traffic {traffic} has no expert pattern of its own")


def _balanced_in_groups(
    tokens: int, top_k: int, size: int, groups: int, topk_groups: int, generator: torch.Generator
) -> Tensor:
    """Every token takes the next groups in turn, as evenly many picks of each, and every group its next experts."""
    # Where K does not divide by the groups, each group of a token takes its turn at the larger share.
    used = min(topk_groups, top_k)
    pick = torch.arange(top_k) * used // top_k
    token = torch.arange(tokens).unsqueeze(1)
    group = (token * used + (pick + token) % used) % groups
    turn = position_in_expert(group, groups) % size
    experts = torch.stack([torch.randperm(size, generator=generator) for _ in range(groups)]) + (
        torch.randperm(groups, generator=generator) * size
    ).unsqueeze(1)
    return experts[group, turn][torch.randperm(tokens, generator=generator)]


def _balanced(tokens: int, top_k: int, routed_experts: int, generator: torch.Generator) -> Tensor:
    # Consecutive runs of K residues are distinct because K <= E; shuffling experts and
    # tokens keeps every count and removes the order.
    runs = torch.arange(tokens * top_k).view(tokens, top_k) % routed_experts
    experts = torch.randperm(routed_experts, generator=generator)
    return experts[runs][torch.randperm(tokens, generator=generator)]


def _skewed(
    alpha: float,
    tokens: int,
    top_k: int,
    routed_experts: int,
    generator: torch.Generator,
    groups: int = 1,
    topk_groups: int = 1,
) -> Tensor:
    popularity = _log_popularity(alpha, routed_experts)[torch.randperm(routed_experts, generator=generator)]
    limit = RouterSpec(groups=groups, topk_groups=topk_groups)
    chunks = []
    for start in range(0, tokens, 4096):
        drawn = popularity + _gumbel(min(4096, tokens - start), routed_experts, generator)
        if groups > 1:
            drawn = in_best_groups(drawn, limit, lambda each: each.topk(min(2, each.shape[-1])).values.logsumexp(-1))
        chunks.append(drawn.topk(top_k, dim=-1).indices)
    return torch.cat(chunks)


def _log_popularity(alpha: float, routed_experts: int) -> Tensor:
    return -alpha * torch.arange(1, routed_experts + 1, dtype=torch.float64).log()


def _gumbel(rows: int, routed_experts: int, generator: torch.Generator) -> Tensor:
    # The K largest of log p + Gumbel noise are a draw of K without replacement (Gumbel-top-k).
    uniform = torch.rand(rows, routed_experts, dtype=torch.float64, generator=generator)
    return -(-uniform.clamp_min(1e-300).log()).log()


@lru_cache(maxsize=64)
def solve_alpha(fraction: float, at_tokens: int, top_k: int, routed_experts: int) -> float:
    """The zipf exponent whose expected share of active experts over `at_tokens` tokens is `fraction`.

    Raises:
        ValueError: no exponent gives it (below what K distinct experts need, or above uniform routing).
    """
    if at_tokens * routed_experts > _MAX_NOISE:
        limit = _MAX_NOISE // routed_experts
        raise ValueError(f"traffic active:{fraction:g}@{at_tokens}: T is at most {limit} with {routed_experts} experts")
    generator = torch.Generator().manual_seed(0)
    batches = max(1, _ACTIVE_TOKEN_DRAWS // at_tokens)
    noise = _gumbel(batches * at_tokens, routed_experts, generator)

    def share(alpha: float) -> float:
        ids = (_log_popularity(alpha, routed_experts) + noise).topk(top_k, dim=-1).indices
        hit = torch.zeros(batches, routed_experts, dtype=torch.bool)
        hit[torch.arange(batches).repeat_interleave(at_tokens * top_k), ids.flatten()] = True
        return float(hit.double().mean())

    low, high = 0.0, 20.0
    most, least = share(low), share(high)
    # Half an expert of slack at the upper end: uniform traffic itself is a fair request.
    if not least - 0.5 / routed_experts <= fraction <= most + 0.5 / routed_experts:
        raise ValueError(
            f"traffic active:{fraction:g}@{at_tokens}: with {routed_experts} experts and top_k {top_k} the share of "
            f"active experts can be {least:.3g} to {most:.3g}"
        )
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) > fraction else (low, middle)
    return (low + high) / 2
