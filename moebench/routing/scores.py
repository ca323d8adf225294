"""Scores: all that a router may look at when it decides, and how they come from hidden states.

A router is two steps: `make` turns hidden states and gate weights into `Scores`; a rule turns Scores into a Routing.
A linear router's scores are its logits z = x W^T; the others say in `moebench.catalogue.routers` who makes theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moebench.catalogue.spec import RouterSpec


@dataclass(frozen=True)
class Side:
    """What a router may look at beside the hidden states; None where it does not.

    Attributes:
        token_ids: int64 [T] (hash, domain maps).
        domains: int64 [T]: the domain of each token (RRE), or the node it lives on (LocMoE).
        context: [T, C] (MixER).
        noise: uniform in (0, 1), [T, E] ([T, D] for jitter): all the randomness of training, None for inference.
    """

    token_ids: Tensor | None = None
    domains: Tensor | None = None
    context: Tensor | None = None
    noise: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that exist, by name."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) is not None}


NO_SIDE = Side()


@dataclass(frozen=True)
class Scores:
    """What a rule decides on. Rules compute in the dtype of the logits: float32, or float64 for an oracle.

    Attributes:
        logits: z [T, E] (Soft MoE: [T, E * slots]).
        bias: [E], added to what is chosen by, never to the weights.
        noise_logits: x W_noise [T, E]; its softplus is the standard deviation of the noise (Shazeer).
        group_logits: [T, G] of a two-level router.
        table: int64 [V, K], experts by token id.
        thresholds: [E], learned for inference (batch mask).
        side: token ids, domains, context, noise.
    """

    logits: Tensor
    bias: Tensor | None = None
    noise_logits: Tensor | None = None
    group_logits: Tensor | None = None
    table: Tensor | None = None
    thresholds: Tensor | None = None
    side: Side = NO_SIDE

    @property
    def noise(self) -> Tensor | None:
        """Uniform in (0, 1), in the logits' dtype; None for inference."""
        noise = self.side.noise
        return None if noise is None else noise.to(self.logits.dtype)


def linear(spec: RouterSpec, x: Tensor, gate: Mapping[str, Tensor], side: Side) -> Scores:
    """z = x W^T (+ b).

    Args:
        x: [T, D].
        gate: "router" [E, D]; where they exist "logit_bias" [E], "selection_bias" [E], "noise" [E, D],
            "groups" [G, D], "table" int64 [V, K], "thresholds" [E].
    """
    z = wide(x @ gate["router"].T)
    if "logit_bias" in gate:
        z = z + gate["logit_bias"].to(z)
    return Scores(
        z,
        bias=_wide_or_none(gate.get("selection_bias")),
        noise_logits=wide(x @ gate["noise"].T) if "noise" in gate and side.noise is not None else None,
        group_logits=wide(x @ gate["groups"].T) if "groups" in gate else None,
        table=gate.get("table"),
        thresholds=_wide_or_none(gate.get("thresholds")),
        side=side,
    )


def without_logits(spec: RouterSpec, x: Tensor, gate: Mapping[str, Tensor], side: Side) -> Scores:
    """For routers that only look a token up: logits [T, E] that hold zeros and cost nothing."""
    z = torch.zeros(1, dtype=wide(x[:0]).dtype, device=x.device).expand(len(x), gate["router"].shape[0])
    return Scores(z, table=gate.get("table"), side=side)


def wide(value: Tensor) -> Tensor:
    """At least float32: logits are never decided on in 16 bits."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _wide_or_none(value: Tensor | None) -> Tensor | None:
    return None if value is None else wide(value)
