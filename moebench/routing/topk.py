"""TopK: each token names K experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopK:
    """K experts a token, with their weights.

    Attributes:
        ids: int64 [T, K]; -1 where an assignment was dropped for capacity.
        weights: float32 [T, K]; multiplies the expert's output; 0 where dropped.
        wanted_ids: int64 [T, K] before any dropping.
        wanted_weights: float32 [T, K] before any dropping.
        logits: float32 [T, E] that the router turns into exactly these ids, or None
            where ids and weights are given because the router is not built.
        routed_experts: E.
    """

    ids: Tensor
    weights: Tensor
    wanted_ids: Tensor
    wanted_weights: Tensor
    logits: Tensor | None
    routed_experts: int

    def counts(self) -> Tensor:
        """Kept assignments per expert, int64 [E]."""
        kept = self.ids[self.ids >= 0]
        return torch.bincount(kept, minlength=self.routed_experts)

    @property
    def kept(self) -> int:
        """Number of assignments not dropped."""
        return int((self.ids >= 0).sum())

    @property
    def drop_rate(self) -> float:
        """Share of the T*K assignments that were dropped."""
        return 1.0 - self.kept / self.ids.numel()

    @property
    def active_experts(self) -> int:
        """Distinct experts that kept a token."""
        return int((self.counts() > 0).sum())

    @property
    def load_max_over_mean(self) -> float:
        """Load of the busiest expert over the mean load of all E (of wanted assignments, as dropping hides skew)."""
        counts = torch.bincount(self.wanted_ids.flatten(), minlength=self.routed_experts).double()
        return float(counts.max() / counts.mean())
