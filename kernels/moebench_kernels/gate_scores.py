"""Scores: what a logit is worth to the gate, in torch and inside its kernels.

    softmax        s = exp(z - max z) / sum over all E experts of exp(z - max z)
    sigmoid        s = 1 / (1 + exp(-z))
    sqrt_softplus  s = sqrt(log(1 + exp(z)))

All three rise with z, so without a selection bias the K largest z are the K largest s.

NaN and -inf count as the lowest finite float32 and +inf as the highest, in logits and in the bias alike:
whatever comes, scores are numbers, and a sum of two of them is brought back into the same range.
"""

import torch
from torch import Tensor

from moebench_kernels.runtime import jit, tl

SCORINGS = ("softmax", "sigmoid", "sqrt_softplus")

# DeepSeek's guard of the renormalising sum, which may be zero: a sigmoid underflows.
TINY = 1e-20

_LIMIT = torch.finfo(torch.float32).max


def bounded_torch(z: Tensor) -> Tensor:
    """NaN, -inf and all below float32's range become its lowest number; +inf and all above its highest."""
    return torch.nan_to_num(z, nan=-_LIMIT, posinf=_LIMIT, neginf=-_LIMIT).clamp(-_LIMIT, _LIMIT)


def scores_torch(z: Tensor, scoring: str) -> Tensor:
    """Finite logits [T, E], float32 or float64 -> scores of the same shape and dtype; differentiable."""
    if scoring == "softmax":
        return torch.softmax(z, dim=-1)
    if scoring == "sigmoid":
        return torch.sigmoid(z)
    # Far left the score is exp(z/2) to the last bit, where softplus would underflow and its root have no slope.
    split = -40.0
    tail = (z.clamp(max=split) / 2).exp()
    return torch.where(z < split, tail, torch.logaddexp(z.clamp(min=split), torch.zeros_like(z)).sqrt())


@jit
def bounded(z):
    """See `bounded_torch`."""
    limit = 3.4028234663852886e38
    return tl.where(z != z, -limit, tl.minimum(tl.maximum(z, -limit), limit))


@jit
def _softplus(z):
    """log(1 + exp(z)), accurate relative to itself also where it is tiny.

    With u = exp(-|z|) in (0, 1] and r = u / (2 + u) <= 1/3, log(1 + u) = 2 atanh(r): the ninth
    term of that series is below 1e-8 of the first. A GPU's quick logarithm is only exact to 2^-22 of one.
    """
    u = tl.exp(-tl.abs(z))
    r = u / (2.0 + u)
    x = r * r
    series = 1 / 13 + x * (1 / 15 + x * (1 / 17))
    series = 1 / 7 + x * (1 / 9 + x * (1 / 11 + x * series))
    series = 1.0 + x * (1 / 3 + x * (1 / 5 + x * series))
    return tl.maximum(z, 0.0) + 2.0 * r * series


@jit
def pointwise_score(z, SCORING: tl.constexpr):
    """Score of bounded logits, for the scorings that look at one logit alone."""
    if SCORING == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-z))
    # Left of -16, log(1 + u) is u within float32's rounding, and u itself may underflow; its root does not.
    return tl.where(z < -16.0, tl.exp(z * 0.5), tl.sqrt(_softplus(z)))


@jit
def pointwise_slope(z, s, SCORING: tl.constexpr):
    """d score / d logit, from the logit and its score."""
    if SCORING == "sigmoid":
        return s * (1.0 - s)
    # d sqrt(softplus) = sigmoid / (2 sqrt(softplus)); in the tail exp(z/2) / 2.
    return tl.where(z < -16.0, 0.5 * s, 0.5 / ((1.0 + tl.exp(-z)) * s))
