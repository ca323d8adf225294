"""Verdicts between two runs: SAME, FASTER, SLOWER or UNSURE for every point, with few false alarms among many points.

A point has one value a replicate: the log of its latency over its control's, in a fresh worker. Inside a worker the
interval is narrow; from worker to worker the same code differs by more (placement, allocator, clocks). So only
the spread of replicates counts, and three of them say little about their own spread. Hence:

1. A moderated t (Smyth 2004, doi 10.2202/1544-6115.1027): each point's variance is drawn towards what all points
   show together, as strongly as they resemble each other.
2. All replicates of a run share its evening. What differs between evenings, point by point, is in no replicate's
   spread. It shows in the statistics of all points, most of which have not changed: where they scatter more than they
   should, every interval is widened by as much (Devlin and Roeder 1999, doi 10.1111/j.0006-341X.1999.00997.x). Only by
   their scatter: a shift of the whole run against its control is real.
3. SLOWER and FASTER need a false-discovery rate below 5 % over all points (Benjamini and Hochberg 1995), a shift
   beyond the minimum effect, and ranks that agree (one-sided Mann-Whitney, 5 %; of three against three: every new
   value beyond every old one), so that one odd worker makes no verdict.
4. SAME is a claim of its own: the 90 % interval within the minimum effect (two one-sided tests, Schuirmann 1987).
5. Everything else is UNSURE.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]
Positions = NDArray[np.int64]

MIN_REPLICATES = 3
MIN_EFFECT = 0.03
FALSE_DISCOVERY_RATE = 0.05
RANK_LEVEL = 0.05
POINTS_FOR_SCATTER = 20  # fewer do not tell scatter from chance
DENSEST = 0.4  # share of the points whose scatter stands for that of all that did not change
DF_A_POINT = 0.35  # the scatter of n scores varies from run to run as that of 0.35 n normal ones would (simulated)
POINTS_FOR_PRIOR = 3
LEAST_SD = 1e-6  # replicates that agree to the last digit were rounded, not known exactly


class Prior(NamedTuple):
    """What all points together say of one point's variance: `df` observations of `variance`."""

    variance: float
    df: float


class Judged(NamedTuple):
    """Verdicts, one row a point, and by how much all intervals were widened (1: not at all)."""

    rows: pd.DataFrame
    inflation: float


def judge(old: Floats, new: Floats, min_effect: float = MIN_EFFECT, groups: Positions | None = None) -> Judged:
    """Compare the replicates of two runs, point by point.

    Args:
        old, new: logs [points, replicates] of whatever is lower when better; NaN where a replicate is missing.
        min_effect: relative change that matters, 0.03 for 3 %.
        groups: [points], equal where points share a control; None: there is none.

    Returns:
        rows with `shift`, `low`, `high` (log, 95 %), `low90`, `high90`, `p_adjusted`, `verdict`, `why` ("" where
        there is a verdict), `replicates_old`, `replicates_new`.
    """
    counts = np.isfinite(old).sum(axis=1), np.isfinite(new).sum(axis=1)
    enough = np.minimum(*counts) >= MIN_REPLICATES
    shift, error, df, inflation = _shifts(old, new, enough, groups)
    rows = pd.DataFrame(_intervals(shift, error, df) | {"p_adjusted": _adjusted(shift, error, df)})
    rows["replicates_old"], rows["replicates_new"] = counts
    beyond = np.log1p(min_effect)
    found = enough & (rows["p_adjusted"].to_numpy() <= FALSE_DISCOVERY_RATE)
    slower = found & (shift > beyond) & _ranks_agree(old, new, enough)
    faster = found & (shift < -beyond) & _ranks_agree(new, old, enough)
    rows["mixed"] = found & (np.abs(shift) > beyond) & ~slower & ~faster
    same = enough & (rows["low90"].to_numpy() > -beyond) & (rows["high90"].to_numpy() < beyond)
    rows["verdict"] = np.select([slower, faster, same], ["SLOWER", "FASTER", "SAME"], "UNSURE")
    rows["why"] = [_why(row, min_effect) for row in rows.to_dict("records")]
    return Judged(rows, inflation)


def _shifts(
    old: Floats, new: Floats, enough: Booleans, groups: Positions | None
) -> tuple[Floats, Floats, Floats, float]:
    """Shift of the means, its standard error and degrees of freedom, and the inflation; NaN where too few."""
    from scipy import stats

    shift, error, df = (np.full(len(old), np.nan) for _ in range(3))
    if not enough.any():
        return shift, error, df, 1.0
    a, b = old[enough], new[enough]
    n_a, n_b = np.isfinite(a).sum(axis=1), np.isfinite(b).sum(axis=1)
    mean_a, mean_b = np.nanmean(a, axis=1), np.nanmean(b, axis=1)
    squares = np.nansum((a - mean_a[:, None]) ** 2, axis=1) + np.nansum((b - mean_b[:, None]) ** 2, axis=1)
    own_df = (n_a + n_b - 2).astype(float)
    own = np.maximum(squares / own_df, LEAST_SD**2)
    prior = prior_of(own, own_df)
    weight = 1.0 if prior.df == np.inf else prior.df / (prior.df + own_df)
    moderated = weight * prior.variance + (1 - weight) * own
    both = np.minimum(prior.df + own_df, own_df.sum())
    shift[enough], df[enough] = mean_b - mean_a, both
    error[enough] = np.sqrt(moderated * (1 / n_a + 1 / n_b))
    t = shift[enough] / error[enough]
    # Quartile for quartile as wide as normal scores. Not by their probabilities: those take a t of 9 for a z of 5, and
    # what is sought is a factor on the error.
    z = t * stats.norm.ppf(0.75) / stats.t.ppf(0.75, both)
    if groups is not None and np.unique(groups[enough], return_counts=True)[1].max() > len(z) / 2:
        # What one control does between two days moves all alike and shows in no scatter; it is taken to do as much as a
        # point does. The controls of several blocks scatter themselves.
        z = z * np.sqrt(2)
    inflation = scatter(z)
    error[enough] *= inflation
    if inflation > 1:
        df[enough] = np.minimum(df[enough], DF_A_POINT * len(z))  # a scatter that is itself an estimate
    return shift, error, df, inflation


def scatter(z: Floats) -> float:
    """How much wider most normal scores lie than they should; at least 1.

    Read from the shortest interval that holds two fifths of them (the shorth of Andrews et al. 1972, with two fifths
    for a half): where one of two providers has become slower in all its points, the spread about a median would be the
    distance between the two crowds, and hide what made it.
    """
    from scipy import stats

    count = len(z)
    if count < POINTS_FOR_SCATTER:
        return 1.0
    ordered = np.sort(z)
    held = int(np.ceil(DENSEST * count))
    width = (ordered[held:] - ordered[: count - held]).min() / (2 * stats.norm.ppf((1 + held / count) / 2))
    # The shortest of many intervals is short by chance too: by simulation of 20 to 1,000 normal scores, within 2 %.
    return float(max(1.0, width / (1 - 1.1 / np.sqrt(count))))


def prior_of(variances: Floats, df: Floats) -> Prior:
    """From the moments of log variances (Smyth 2004, section 6.2): they scatter by chance, and as points differ."""
    from scipy import special

    if len(variances) < POINTS_FOR_PRIOR:
        return Prior(0.0, 0.0)
    logs = np.log(variances) - special.digamma(df / 2) + np.log(df / 2)
    excess = float(np.var(logs, ddof=1) - special.polygamma(1, df / 2).mean())
    if excess <= 0:
        return Prior(float(np.exp(logs.mean())), np.inf)
    half = _inverse_trigamma(excess)
    return Prior(float(np.exp(logs.mean() + special.digamma(half) - np.log(half))), 2 * half)


def _inverse_trigamma(value: float) -> float:
    """x with trigamma(x) = value, which falls from infinity to 0."""
    from scipy import optimize, special

    def gap(log_x: float) -> float:
        return float(np.log(special.polygamma(1, np.exp(log_x))) - np.log(value))

    return float(np.exp(optimize.brentq(gap, -20.0, 20.0)))


def _intervals(shift: Floats, error: Floats, df: Floats) -> dict[str, Floats]:
    from scipy import stats

    wide, narrow = (stats.t.isf(tail, df) * error for tail in (0.025, 0.05))
    return {
        "shift": shift, "low": shift - wide, "high": shift + wide, "low90": shift - narrow, "high90": shift + narrow,
    }  # fmt: skip


def _adjusted(shift: Floats, error: Floats, df: Floats) -> Floats:
    from scipy import stats

    p = 2 * stats.t.sf(np.abs(shift / error), df)
    known = np.isfinite(p)
    if known.any():
        p[known] = stats.false_discovery_control(p[known])
    return np.asarray(p, dtype=np.float64)


def _ranks_agree(low: Floats, high: Floats, enough: Booleans) -> Booleans:
    """Whether the values of `high` rank above those of `low`, by a one-sided exact Mann-Whitney test."""
    from scipy import stats

    agree = np.zeros(len(low), dtype=bool)
    counts = np.column_stack([np.isfinite(low).sum(axis=1), np.isfinite(high).sum(axis=1)])
    for a, b in np.unique(counts[enough], axis=0):
        rows = enough & (counts == (a, b)).all(axis=1)
        below, above = (np.sort(values[rows], axis=1)[:, :n] for values, n in ((low, a), (high, b)))  # NaN sorts last
        found = stats.mannwhitneyu(above, below, alternative="greater", axis=1, method="exact")
        agree[rows] = found.pvalue <= RANK_LEVEL
    return agree


def _why(row: Mapping[Hashable, Any], min_effect: float) -> str:
    """Why there is no verdict; empty where there is one."""
    if row["verdict"] != "UNSURE":
        return ""
    fewest = min(row["replicates_old"], row["replicates_new"])
    if fewest < MIN_REPLICATES:
        return f"{fewest} replicates on one side; {MIN_REPLICATES} are needed"
    if row["mixed"]:
        return "the change would be one, but one replicate or more disagrees"
    low, high = (float(np.expm1(row[name])) for name in ("low", "high"))
    return f"the change lies between {low:+.1%} and {high:+.1%}, and {min_effect:.0%} matters"
