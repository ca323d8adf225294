"""The race, with a worker whose tiles have times, faults and deaths that the test gives."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from moebench.remote import WorkerLost
from moebench.tune.race import race
from moebench_kernels.tiles import GemmConfig

SHIPPED, FAST, SLOW, WRONG, RAISES, KILLER = (GemmConfig(64, 32 << at, 4, 2) for at in range(6))


@dataclass
class FakeWorker:
    """Times by tile, in ms, with 1 % of noise."""

    times: dict[GemmConfig, float]
    noise: random.Random
    asked: list[str] = field(default_factory=list)
    tiles: dict[int, GemmConfig] = field(default_factory=dict)

    def ask(self, do: str, *, deadline_s: float, **arguments: Any) -> dict[str, Any]:
        self.asked.append(do)
        if do == "candidate":
            tile = GemmConfig(**arguments["config"])
            self.tiles[arguments["index"]] = tile
            if tile == WRONG:
                return {"wrong": "relative error 0.5"}
            if tile == RAISES:
                return {"status": "failed", "reason": "RuntimeError: too many resources"}
            return {"wrong": None}
        tile = self.tiles[arguments["index"]]
        if tile == KILLER:
            raise WorkerLost("crashed", "burst: the worker ended with signal SIGSEGV")
        return {"samples_ms": [self.times[tile] * self.noise.gauss(1, 0.003) for _ in range(arguments["count"])]}


def run(configs: list[GemmConfig], times: dict[GemmConfig, float]) -> tuple[Any, list[FakeWorker]]:
    started: list[FakeWorker] = []

    def start() -> FakeWorker:
        started.append(FakeWorker(times, random.Random(1)))
        return started[-1]

    return race(start, configs, device_kind="cuda"), started


def test_the_fastest_right_tile_wins() -> None:
    times = {SHIPPED: 2.0, FAST: 1.0, SLOW: 3.0, WRONG: 0.1, RAISES: 0.1}
    result, started = run([SHIPPED, FAST, SLOW, WRONG, RAISES], times)
    assert result.config == FAST
    assert result.settled
    assert abs(result.median_ms - 1.0) < 0.01
    assert abs(result.shipped_ms - 2.0) < 0.02
    assert [runner.wrong for runner in result.runners] == [
        None, None, None, "relative error 0.5", "RuntimeError: too many resources",
    ]  # fmt: skip
    assert len(started) == 1


def test_slow_tiles_leave_early_and_the_shipped_one_stays() -> None:
    result, _ = run([SHIPPED, FAST, SLOW], {SHIPPED: 2.0, FAST: 1.0, SLOW: 3.0})
    shipped, fast, slow = (len(runner.samples_ms) for runner in result.runners)
    assert result.runners[2].slow
    assert not result.runners[0].slow
    assert slow <= shipped == fast


def test_a_tie_keeps_the_shipped_tile() -> None:
    result, _ = run([SHIPPED, FAST], {SHIPPED: 1.0, FAST: 0.9999})
    assert result.config == SHIPPED


def test_a_tile_that_kills_the_worker_is_out_and_the_others_start_again() -> None:
    result, started = run([SHIPPED, KILLER, FAST], {SHIPPED: 2.0, FAST: 1.0})
    assert result.config == FAST
    assert "SIGSEGV" in result.runners[1].wrong
    assert len(started) == 2
    assert started[1].asked[:2] == ["candidate", "candidate"]
    assert all(len(runner.samples_ms) <= started[1].asked.count("burst") * 5 for runner in result.runners)


def test_no_right_tile_is_no_winner() -> None:
    result, _ = run([WRONG, RAISES], {})
    assert result.config is None
    assert result.median_ms is None
    assert result.shipped_ms is None


def test_a_failed_shipped_tile_has_no_time() -> None:
    result, _ = run([WRONG, FAST], {FAST: 1.0})
    assert result.config == FAST
    assert result.shipped_ms is None
