"""Soft MoE (arXiv 2308.00951): no token is assigned; slots blend tokens, and tokens blend slots.

x' = x / sqrt(sum x^2 + 1e-6), phi' alike      L[t, s] = slot_scale * x'_t . phi'_s
dispatch = softmax of L over tokens            combine = softmax of L over slots
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moebench.catalogue.spec import RouterSpec
from moebench.routing.forms import Mix
from moebench.routing.scores import Scores, Side, wide

UNIT_EPS = 1e-6  # under the root, as in the authors' code: zero vectors stay zero
LARGEST = 1e30  # -inf counts as this much below 0: a column of it is a column of equal logits


def normalised(spec: RouterSpec, x: Tensor, gate: Mapping[str, Tensor], side: Side) -> Scores:
    """Cosines of tokens and slots, scaled.

    Args:
        x: [T, D].
        gate: "router" [S, D], a slot a row, grouped by expert; "slot_scale" [].

    Returns:
        logits [T, S], at least float32.
    """
    phi = gate["router"]
    token, slot = _inverse_norm(x), _inverse_norm(phi)
    # The product in x's own dtype, the norms in float32: rounding of 16-bit unit vectors is spared.
    cosine = wide(x @ phi.T) * token.unsqueeze(1) * slot
    return Scores(cosine * gate["slot_scale"].to(cosine), side=side)


def soft_moe(scores: Scores, spec: RouterSpec, top_k: int) -> Mix:
    """Dispatch and combine weights of S = E * spec.slots slots; top_k has no part in it (equations 1 and 2).

    Raises:
        ValueError: the slots do not fit whole experts.
    """
    z = scores.logits.clamp(-LARGEST, LARGEST)
    S = z.shape[1]
    if S % spec.slots:
        raise ValueError(f"{S} slots are not a multiple of the {spec.slots} slots an expert")
    return Mix(torch.softmax(z, dim=0), torch.softmax(z, dim=1), S // spec.slots, scores.logits)


def _inverse_norm(rows: Tensor) -> Tensor:
    return wide(rows).square().sum(dim=1).add(UNIT_EPS).rsqrt()
