"""Capacity: how many assignments an expert takes, and which are dropped beyond it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moebench.point import DROPLESS


def capacity_slots(capacity_factor: float | str, tokens: int, top_k: int, routed_experts: int) -> int | None:
    """C = ceil(factor * K * T / E) slots an expert (Switch, arXiv 2101.03961, top-k form); None when dropless."""
    if capacity_factor == DROPLESS:
        return None
    return max(1, math.ceil(float(capacity_factor) * top_k * tokens / routed_experts - 1e-9))


def apply_capacity(ids: Tensor, weights: Tensor, slots: int | None, routed_experts: int) -> tuple[Tensor, Tensor]:
    """Drop what is over capacity, first come first served by token position, first choices of a token first.

    Args:
        ids: int64 [T, K].
        weights: float [T, K].
        slots: C, or None for dropless.

    Returns:
        ids with -1 and weights with 0 where dropped; the weights of what is kept are unchanged.
    """
    if slots is None:
        return ids, weights
    keep = position_in_expert(ids, routed_experts) < slots
    return ids.masked_fill(~keep, -1), weights * keep


def position_in_expert(ids: Tensor, routed_experts: int) -> Tensor:
    """How many earlier assignments (in token order) went to the same expert: int64 [T, K]."""
    flat = ids.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.zeros(routed_experts, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    first = counts.cumsum(0) - counts
    position = torch.empty_like(flat)
    position[order] = torch.arange(flat.numel(), device=ids.device) - first[flat[order]]
    return position.view_as(ids)
