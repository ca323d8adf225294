"""Runs with known truth: what two runs of one suite would hold, at the noise of a quiet GPU and of a shared CPU.

`python tests/compare/simulated_runs.py` prints the table of docs/compare.md; the tests use the same functions.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moebench.analyse.load import Run, records_to_table
from moebench.analyse.verdicts import Judged, judge
from moebench.record import Manifest, Record

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Noise:
    """Everything that moves a time though nothing has changed: relative, standard deviations where not said otherwise.

    Attributes:
        sample: of one sample, heavy-tailed (Student's t with `tails` degrees of freedom).
        outliers, outlier_size: probability and size of a sample that takes longer.
        drift: step of a random walk from round to round, common to the arms of a block.
        worker: shift of all arms of a fresh worker.
        placement: shift of one arm in one worker (where its memory lies, what its library tuned), heavy-tailed too.
        day: shift of one arm between the days of the two runs, control included.
        bursts: probability that another process disturbs a block for a third of its rounds, by a factor of up to
            `burst_size`.
    """

    sample: float
    tails: float
    outliers: float
    outlier_size: float
    drift: float
    worker: float
    placement: float
    day: float = 0.0
    bursts: float = 0.0
    burst_size: float = 1.0


QUIET_GPU = Noise(
    sample=0.005, tails=4, outliers=0.01, outlier_size=0.05, drift=0.001, worker=0.01, placement=0.004, bursts=0.01,
    burst_size=1.3,
)  # fmt: skip
SHARED_CPU = Noise(
    sample=0.07, tails=3, outliers=0.05, outlier_size=0.5, drift=0.01, worker=0.1, placement=0.03, bursts=0.3,
    burst_size=8.0,
)  # fmt: skip
LEVELS = {"quiet GPU": QUIET_GPU, "shared CPU": SHARED_CPU}


@dataclass(frozen=True)
class Plan:
    """The size of a run: blocks of arms beside one control."""

    blocks: int = 10
    arms: int = 20
    replicates: int = 3
    rounds: int = 12
    burst: int = 3

    @property
    def points(self) -> int:
        return self.blocks * self.arms


def log_samples(noise: Noise, plan: Plan, rng: np.random.Generator, day: Floats) -> Floats:
    """[replicates, blocks, arms + control, rounds, samples of a burst] of one run; the control is the last arm."""
    shape = (plan.replicates, plan.blocks, plan.arms + 1, plan.rounds, plan.burst)
    total = np.zeros(shape) + day[None, :, :, None, None]
    total += noise.worker * rng.standard_normal(shape[:1])[:, None, None, None, None]
    total += noise.placement * heavy(rng, 5, shape[:3])[..., None, None]
    total += (noise.drift * rng.standard_normal((*shape[:2], plan.rounds))).cumsum(-1)[:, :, None, :, None]
    total += noise.sample * heavy(rng, noise.tails, shape)
    total += np.log1p(noise.outlier_size) * (rng.random(shape) < noise.outliers)
    return total + disturbance(noise, plan, rng)


def disturbance(noise: Noise, plan: Plan, rng: np.random.Generator) -> Floats:
    """A stretch of rounds in which another process takes its share; it does not hit all arms alike."""
    hit = rng.random((plan.replicates, plan.blocks)) < noise.bursts
    begin = rng.integers(0, plan.rounds, hit.shape)[..., None]
    inside = (np.arange(plan.rounds) - begin) % plan.rounds < plan.rounds // 3
    size = np.log(rng.uniform(1.0, noise.burst_size, hit.shape))
    share = rng.uniform(0.5, 1.0, (*hit.shape, plan.arms + 1, 1, 1))
    return (size * hit)[..., None, None, None] * inside[:, :, None, :, None] * share


def heavy(rng: np.random.Generator, df: float, shape: tuple[int, ...]) -> Floats:
    """Student's t, scaled to a standard deviation of 1."""
    values: Floats = rng.standard_t(df, shape) * np.sqrt((df - 2) / df)
    return values


def two_runs(noise: Noise, plan: Plan, rng: np.random.Generator, changes: Floats) -> tuple[Floats, Floats]:
    """Log samples of two runs; `changes` [points]: the true log shift of each point in the second one."""
    cells = (plan.blocks, plan.arms + 1)
    old = log_samples(noise, plan, rng, noise.day * rng.standard_normal(cells))
    new = log_samples(noise, plan, rng, noise.day * rng.standard_normal(cells))
    new[:, :, :-1] += changes.reshape(plan.blocks, plan.arms)[None, :, :, None, None]
    return old, new


def replicate_values(samples: Floats) -> Floats:
    """[points, replicates]: log ratio to the control as `moebench.analyse.ratios` takes it, median of the rounds."""
    rounds = np.median(samples, axis=-1)
    ratio = np.median(rounds[:, :, :-1] - rounds[:, :, -1:], axis=-1)
    values: Floats = ratio.reshape(len(ratio), -1).T
    return values


def run_of(samples: Floats, run_id: str) -> Run:
    """The same run as one that has been read."""
    manifest = Manifest(
        run_id=run_id, suite="simulated", suite_hash="0", suite_text="", command="simulated", device="Simulated",
        device_kind="cpu", started_at="2026-01-01T00:00:00+00:00", finished="complete",
    )  # fmt: skip
    return Run(records_to_table(records_of(samples, run_id)), manifest, Path(run_id))


def records_of(samples: Floats, run_id: str) -> list[Record]:
    """The same run as records."""

    replicates, blocks, width, rounds, burst = samples.shape
    order = np.repeat(np.arange(rounds), burst).tolist()
    records = []
    for r, b, a in np.ndindex(replicates, blocks, width):
        times = np.exp(samples[r, b, a]).flatten().tolist()
        control = a == width - 1
        records.append(
            Record(
                run_id=run_id, block_id=f"b{b}", point_id=f"b{b}a{a}", suite="simulated", model="custom",
                provider="gemm" if control else f"arm{a}", provider_version="1", provider_hash="0",
                role="yardstick" if control else "arm", scope="layer", direction="forward", device="Simulated",
                precision="fp32", tokens=b + 1, hidden_size=64, expert_ffn_size=32, routed_experts=8, top_k=2,
                router="softmax_topk", traffic="uniform", status="measured", timer="cpu_wall", replicate=r,
                latency_ms=float(np.median(times)), samples_ms=times, sample_round=order,
            )
        )  # fmt: skip
    return records


def judged(noise: Noise, plan: Plan, rng: np.random.Generator, changes: Floats) -> Judged:
    """The verdicts on two simulated runs."""
    old, new = two_runs(noise, plan, rng, changes)
    beside = np.repeat(np.arange(plan.blocks), plan.arms)  # each block's points share its control
    return judge(replicate_values(old), replicate_values(new), groups=beside)


@dataclass(frozen=True)
class Rates:
    """Shares over many pairs of runs.

    Attributes:
        alarms: pairs with any SLOWER among points that have not changed.
        found, same, unsure: of the points that were slowed, those called SLOWER, SAME and UNSURE.
        still: of the points that have not changed, those called SAME.
    """

    alarms: float
    found: float
    same: float
    unsure: float
    still: float


def rates(noise: Noise, plan: Plan, slowed: int, change: float, pairs: int, seed: int = 0) -> Rates:
    """Simulate pairs of runs in which the first `slowed` points of a random order take `change` longer."""
    rng = np.random.default_rng(seed)
    alarms, found, same, still = 0, 0.0, 0.0, 0.0
    for _ in range(pairs):
        hit = np.zeros(plan.points, dtype=bool)
        hit[rng.permutation(plan.points)[:slowed]] = True
        verdict = judged(noise, plan, rng, np.where(hit, np.log1p(change), 0.0)).rows["verdict"].to_numpy()
        alarms += bool((verdict[~hit] == "SLOWER").any())
        found += float((verdict[hit] == "SLOWER").mean()) if slowed else 0.0
        same += float((verdict[hit] == "SAME").mean()) if slowed else 0.0
        still += float((verdict[~hit] == "SAME").mean()) if slowed < plan.points else 0.0
    return Rates(
        alarms / pairs, found / pairs, same / pairs, 1 - (found + same) / pairs if slowed else 0.0, still / pairs
    )


CHANGES = ((0, 0.0), (1, 0.05), (10, 0.05), (100, 0.05), (200, 0.05), (1, 0.10), (1, 0.30), (10, 0.01))
DAYS = ((2, Plan(), 0, 0.0), (2, Plan(), 1, 0.05), (5, Plan(), 0, 0.0), (2, Plan(blocks=1, arms=5), 0, 0.0))


def scenarios() -> list[tuple[str, str, Noise, Plan, int, float]]:
    """What the table of docs/compare.md shows: level, what differs, and how it is made."""
    found = []
    for level, noise in LEVELS.items():
        for slowed, change in CHANGES:
            found.append((level, "3 replicates, 200 points", noise, Plan(), slowed, change))
        found.append((level, "3 replicates, 20 points", noise, Plan(blocks=1), 1, 0.05))
        found.append((level, "3 replicates, 4 points", noise, Plan(blocks=1, arms=4), 1, 0.05))
        found.append((level, "10 replicates, 200 points", noise, Plan(replicates=10), 1, 0.05))
        for size, plan, slowed, change in DAYS:
            what = f"{plan.points} points, days differ by {size} x placement"
            found.append((level, what, replace(noise, day=size * noise.placement), plan, slowed, change))
    return found


def markdown(pairs: int) -> str:
    """The table."""
    head = (
        "| noise | runs | slowed | any SLOWER among the unchanged | slowed: SLOWER | UNSURE | SAME | unchanged: SAME |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for level, runs, noise, plan, slowed, change in scenarios():
        r = rates(noise, plan, slowed, change, pairs)
        what = f"{slowed} by {change:.0%}" if slowed else "none"
        shares = [f"{value:.1%}" for value in (r.found, r.unsure, r.same)] if slowed else ["", "", ""]
        still = f"{r.still:.1%}" if slowed < plan.points else ""
        alarms = f"{r.alarms:.1%}" if slowed < plan.points else ""
        lines.append(f"| {level} | {runs} | {what} | {alarms} | {' | '.join(shares)} | {still} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(int(sys.argv[1]) if len(sys.argv) > 1 else 2000))
