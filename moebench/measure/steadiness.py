"""Steadiness: outliers among the samples of a row, and what makes the row unstable. No torch.

Everything is said and nothing removed: a reader sees from the flags how far a median can be trusted. Each flag is
raised on independent samples of one law in fewer than 1 % of rows (shown by the tests).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from statistics import median, quantiles

from moebench.measure.latency import INTERVAL_TOLERANCE

# Interquartile ranges beyond the quartiles (Tukey, Exploratory Data Analysis, 1977, chapter 2).
FENCE, OUTER_FENCE = 1.5, 3.0
MANY_OUTLIERS = 0.1  # beyond the outer fences: beyond the inner ones chance alone puts as many now and then
FEWEST = 20  # samples for a share of a tenth to mean anything
DRIFT_P = 0.005
EDGE = 0.2  # a level holds at least that share of the samples
# From this many samples on, a gap of this share of the range between the deciles parts two levels. Of independent
# samples, exponential and log-normal ones among them, fewer than 1 in 100 sets have such a gap near their middle.
GAPS = ((40, 0.35), (20, 0.6))


def outliers(samples: Sequence[float], fence: float = FENCE) -> list[int]:
    """Positions of the samples beyond Tukey's fences, `fence` interquartile ranges from the quartiles."""
    if len(samples) < 4:
        return []
    first, _, third = quantiles(samples, method="inclusive")
    reach = fence * (third - first)
    return [index for index, value in enumerate(samples) if not first - reach <= value <= third + reach]


def unsteady(samples: Sequence[float], rounds: Sequence[int], rotation: int, *, device_kind: str) -> list[str]:
    """What makes a row's samples (ms) unstable, as flags: `outliers`, `drifting`, `two_levels`.

    Args:
        rounds: the round of each sample, in order.
        rotation: sample k ran call k modulo `rotation`.
    """
    tolerance = INTERVAL_TOLERANCE[device_kind] * median(samples)
    found = {
        "outliers": len(samples) >= FEWEST and len(outliers(samples, OUTER_FENCE)) > MANY_OUTLIERS * len(samples),
        "drifting": drifts(samples, rounds, tolerance),
        "two_levels": has_two_levels(samples, rotation, tolerance),
    }
    return [flag for flag, raised in found.items() if raised]


def drifts(samples: Sequence[float], rounds: Sequence[int], tolerance: float) -> bool:
    """Whether the times move one way over the rounds: Kendall's rank correlation, and by more than `tolerance` ms.

    Medians of rounds are compared, since the samples of one burst hang together; the last third must lie
    further from the first than the interval of a row that is called known. Fewer than 6 rounds say nothing.
    """
    from scipy.stats import kendalltau

    pairs = groupby(zip(rounds, samples, strict=True), key=lambda pair: pair[0])
    middles = [median(value for _, value in group) for _, group in pairs]
    third = len(middles) // 3
    if third < 2 or abs(median(middles[-third:]) - median(middles[:third])) <= tolerance:
        return False
    return float(kendalltau(range(len(middles)), middles).pvalue) < DRIFT_P


def has_two_levels(samples: Sequence[float], rotation: int, tolerance: float) -> bool:
    """Whether the times jump between two levels, as on a core that is shared: no median describes them.

    A gap parts the samples, with a fifth of them on each side at least, wider than `tolerance` ms and than a share
    of the range between the deciles. Levels that only tell unlike draws apart are no such jump.
    """
    n = len(samples)
    share = next((share for fewest, share in GAPS if n >= fewest), None)
    if share is None:
        return False
    ordered, edge, tail = sorted(samples), math.ceil(EDGE * n), n // 10
    gap, split = max((ordered[k] - ordered[k - 1], k) for k in range(edge, n - edge + 1))
    if gap <= max(tolerance, share * (ordered[n - 1 - tail] - ordered[tail])):
        return False
    return not _told_by_draws([value >= ordered[split] for value in samples], rotation)


def _told_by_draws(upper: Sequence[bool], rotation: int) -> bool:
    """Whether each of the rotating calls keeps to one level, but for one sample in ten."""
    odd = 0
    for first in range(rotation):
        own = upper[first::rotation]
        odd += min(sum(own), len(own) - sum(own))
    return odd <= len(upper) / 10
