"""Energy from suite file to row: with the real worker, where there is a counter and where there is none."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from pipeline.stand_in import Answers
from pipeline.tiny import moebench, records, write_suite

from moebench.measure.energy_meters import Meters, RaplMeter
from moebench.options import Options
from moebench.record import PERFORMANCE
from moebench.run import run_suite
from moebench.suite import load_suite

WATTS = 100.0


class SteadyMeter:
    """Counts 100 W of the machine's own clock, ticking each millisecond."""

    name, update_period_s, wrap_s, max_watts = "steady", 0.001, float("inf"), 1000.0

    def read_j(self) -> float:
        return WATTS * (time.monotonic() // 0.001) * 0.001


class WorkerHere:
    """The real worker in this process; what holds for a whole process is left to the straw."""

    def __init__(self, *_: object) -> None:
        from moebench.worker import Worker

        self.worker, self.straw = Worker(), Answers()

    def ask(self, do: str, *, deadline_s: float, **arguments: Any) -> dict[str, Any]:
        who = self.straw if do in ("hold", "ceilings") else self.worker
        reply: dict[str, Any] = json.loads(json.dumps(getattr(who, do)(**arguments)))
        return reply

    def kill(self) -> None:
        self.worker.close()


@pytest.fixture
def metered(monkeypatch):
    monkeypatch.setattr("moebench.worker.open_meters", lambda kind: Meters(SteadyMeter(), None))


def energy_suite(tmp_path, budget=""):
    path = write_suite(tmp_path)
    path.write_text("energy = true\n" + path.read_text().replace("[budget]\n", f"[budget]\n{budget}"))
    return path


def test_joules_of_the_real_worker_reach_the_row(tmp_path, metered):
    short = "energy_window_seconds = 0.1\nenergy_trials = 2\nenergy_cool_down_seconds = 0\n"
    suite = load_suite([str(energy_suite(tmp_path, short))])
    assert run_suite(suite, Options(tmp_path / "run", device="cpu"), start=WorkerHere).exit_code == 0
    rows = {row.provider: row for row in records(tmp_path / "run")}
    for name in ("torch-loop", "torch-bmm"):
        row = rows[name]
        assert (row.energy_source, row.energy_reason) == ("steady", None)
        assert row.energy_idle_w == pytest.approx(WATTS, rel=0.1)
        assert 0 < row.energy_j_per_token_low <= row.energy_j_per_token <= row.energy_j_per_token_high
        # Of a call of some tens of microseconds, on a busy machine some milliseconds; a whole window is 0.1 s.
        assert 1e-6 < row.energy_j_per_token * row.tokens / WATTS < 0.05
        assert row.energy_second_source is None
    assert rows["gemm"].energy_source is None


def test_the_straw_has_windows_of_the_real_workers_shape(metered):
    ask = WorkerHere().ask
    tiny = {"deadline_s": 60.0, "window_s": 0.02, "cool_down_s": 0.0}
    ask("hello", deadline_s=60.0, device_kind="cpu")
    ask("yardstick", deadline_s=60.0, index=0, name="gemm", precision="fp32", flops=4096.0)
    ask("warm", deadline_s=60.0, index=0, max_seconds=0.05, timer="auto", cache="hot")
    straw = Answers()
    for real, made in (
        (ask("idle", **tiny), straw.idle(0.02, 0.0)),
        (ask("energy", index=0, **tiny), straw.energy(0, 0.02, 0.0)),
    ):
        assert real.keys() == made.keys()
        assert {name: type(value) for name, value in real.items()} == {n: type(value) for n, value in made.items()}
        assert (real["calls"] > 0) is (made["calls"] > 0)


@pytest.mark.slow
@pytest.mark.skipif(RaplMeter.find()[0] is not None, reason="this machine has a counter that can be read")
def test_a_machine_without_a_counter_says_so_in_the_row(tmp_path):
    suite = energy_suite(tmp_path)
    out = tmp_path / "run"
    done = moebench("run", "suite", suite, "--out", out, "--device", "cpu", "--no-report", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    timed = [row for row in records(out) if row.role == "arm"]
    assert len(timed) == 2
    for row in timed:
        assert (row.status, row.energy_source, row.energy_reason) == ("measured", "none", RaplMeter.find()[1])
        carried = [name for name in PERFORMANCE if name.startswith("energy_") and getattr(row, name) is not None]
        assert carried == ["energy_source", "energy_reason"]
        assert (row.usd_per_mtok, row.gco2_per_mtok) == (None, None)
