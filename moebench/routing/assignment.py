"""Balanced assignment in training, plain top-k in inference: a batch-wide rule that no later token may change at test.

    base      maximise sum_t z[t, a(t)], T/E tokens an expert (`moebench.routing.auction`); weight sigmoid(z)
    sinkhorn  top-k of d1[e] * exp(z): d0, d1 make its rows sum to 1/T and its columns to 1/E; weight sigmoid(z) with
              one pick, softmax(z) over all experts with more

Choices carry no gradient; weights are those of the raw z, multiplied by spec.scale.
BASE's expert returns f(h) + h, mixed as sigmoid(z) (f(h) + h) + (1 - sigmoid(z)) h: that is h + sigmoid(z) f(h).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebench.catalogue.spec import RouterSpec
from moebench.routing.auction import balanced_assignment
from moebench.routing.forms import TopK, top_k_routing
from moebench.routing.scored import renormalised
from moebench.routing.scores import Scores

LARGEST = 1e30  # -inf counts as this much below 0: a row of it is a row of equal logits
TOLERANCE = 1e-4  # mean change of d1, as in Megatron-LM
ROUNDS = 500  # Megatron-LM has no limit
FARTHEST = 80.0  # a logit counts as no further below its token's best: e^-80 is still a normal float32


def base(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """BASE layers (arXiv 2103.16716): one expert a token, every expert floor(T/E) or ceil(T/E) tokens in training.

    Raises:
        ValueError: top_k is not 1.
    """
    if top_k != 1:
        raise ValueError(f"router 'base' picks 1, not {top_k}")
    z = scores.logits
    ids = (balanced_assignment(z) if spec.training else z.argmax(dim=1)).unsqueeze(1)
    return top_k_routing(ids, torch.sigmoid(z.gather(1, ids)) * spec.scale, z.shape[1], z)


def sinkhorn(scores: Scores, spec: RouterSpec, top_k: int) -> TopK:
    """S-BASE (arXiv 2202.01169) as Megatron-LM has it; nearly balanced, not exactly."""
    z = scores.logits.clamp(-LARGEST, LARGEST)
    # Of one token every expert has the same share: normalising leaves nothing to choose by.
    choice = sinkhorn_scores(z) if spec.training and len(z) > 1 else z.detach()
    ids = choice.topk(top_k, dim=1).indices
    weights = torch.sigmoid(z.gather(1, ids)) if top_k == 1 else torch.softmax(z, dim=1).gather(1, ids)
    return top_k_routing(ids, renormalised(weights, spec), z.shape[1], scores.logits)


@torch.no_grad()
def sinkhorn_scores(z: Tensor) -> Tensor:
    """log(d1[e] exp(z[t, e])) up to a constant a token, which no choice depends on.

    Args:
        z: [T, E], finite.

    Returns:
        [T, E]. The one new array of that size: it holds exp(z - largest), then its logarithm plus log(d1).
    """
    T, E = z.shape
    kernel = (z - z.amax(dim=1, keepdim=True)).clamp_(min=-FARTHEST).exp_()
    d1 = z.new_ones(E)
    for _ in range(ROUNDS):
        d0 = 1 / (T * (kernel @ d1))
        last, d1 = d1, 1 / (E * (kernel.T @ d0))
        # Relative where d1 is large: float32 cannot settle an expert that nobody wants to 1e-4.
        if (d1 - last).abs().mean() <= TOLERANCE * d1.mean().clamp_min(1.0):
            break
    return kernel.log_().add_(d1.log())
