"""What the harness itself costs: a benchmark of moebench, not of a kernel.

    python -m moebench_suites.harness_cost run [NAME|FILE]    a real run: its overhead as a share and in ms a point
    python -m moebench_suites.harness_cost parent             the parent alone, to 100,000 points: ms, peak memory
    python -m moebench_suites.harness_cost worker             the worker's memory over many blocks
    python -m moebench_suites.harness_cost device             of a GPU: its readings, the profiler, a layer's draws
    python -m moebench_suites.harness_cost estimates RUN...   what `--dry-run` says against what runs took

`parent` has a worker of straw in its own process, which answers at once and has no torch: what is
left is making points, judging samples, recording, and writing the journal and the table.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

SIZES = (1_000, 10_000, 100_000)
ARMS = ("torch-loop", "torch-bmm", "torch-grouped", "torch-dense")
TEXT = """
name = "straw"
question = "What does the harness cost?"
[budget]
seconds_per_point = 0.05
[[sweep]]
[sweep.grid]
hidden_size = 16
expert_ffn_size = 8
experts = 4
top_k = 2
tokens = 4
traffic = "uniform"
provider = {arms}
seed = {seeds}
"""
Row = dict[str, Any]


class Straw:
    """Answers the worker's messages at once, as if everything went well."""

    def __init__(self, *_: object) -> None:
        self.replies: dict[str, Row] = {
            "hello": {
                "device_kind": "cpu", "device": "straw", "machine": {}, "versions": {}, "cache_bytes": 1 << 20,
                "available_bytes": 1 << 34,
            },
            "hold": {"threads": 1, "cores": [0], "modes": ""},
            "provider": {"version": "straw", "hash": "straw"},
            "ceilings": {"gemm_tflops": {"fp32": 0.1}, "copy_gbs": 10.0, "read_gbs": 12.0},
            "arm": {
                "timed": True, "prepare_ms": 1.0, "checked_on": "straw", "kept": 8.0, "active_experts": 4.0,
                "drop_rate": 0.0, "load_max_over_mean": 1.0, "executed_flops": 6144.0,
            },
            "yardstick": {"timed": True, "flops": 6144.0, "moved_bytes": 1e6},
            "check": {"rel_error": 1e-7, "max_error": 1e-7, "fidelity_error": 1e-7, "wrong": None},
            "warm": {
                "first_call_ms": 2.0, "estimate_ms": 1.0, "settled": True, "calls": 9, "timer": "straw", "why": "",
                "rotation": 4, "cache": "cold",
            },
            "memory": {"peak_memory_bytes": 1 << 20, "reason": None, "resolution_bytes": 4096},
            "burst": {"device_ms": [1.0] * 10, "wall_ms": [1.0] * 10},
            "recheck": {"wrong": None, "flags": []},
        }  # fmt: skip

    def ask(self, do: str, *, deadline_s: float, **arguments: Any) -> Row:
        """The reply to any message; to those that are told nothing, nothing."""
        return dict(self.replies.get(do, {}))

    def kill(self) -> None:
        """Nothing to end."""


def straw_suite(folder: Path, points: int) -> Path:
    """A suite file of so many points of tiny layers, four in a block."""
    path = folder / "straw.toml"
    path.write_text(TEXT.format(arms=json.dumps(ARMS), seeds=list(range(points // len(ARMS)))))
    return path


@click.group()
def main() -> None:
    """What the harness itself costs."""


@main.command("run")
@click.argument("source", default="quick")
@click.option("--out", type=click.Path(path_type=Path), help="Keep the run here.")
def measure_run(source: str, out: Path | None) -> None:
    """A real run of a suite, timed from outside: what of it is the harness's."""
    with tempfile.TemporaryDirectory() as folder:
        path = out or Path(folder) / "run"
        begin = time.perf_counter()
        command = [sys.executable, "-m", "moebench", "run", "suite", source, "--out", str(path)]
        subprocess.run([*command, "--no-report"], check=False)
        _print(run_rows(path, time.perf_counter() - begin))


def run_rows(path: Path, outside_s: float) -> list[Row]:
    """Each phase, the sums, and what the samples add up to: seconds, share of the wall time, ms a point.

    Args:
        path: of the run.
        outside_s: wall time of the whole command; what its manifest does not know is Python's own start and end.
    """
    from moebench.analyse.load import load_run
    from moebench.point import YARDSTICKS
    from moebench.stopwatch import OWN, WINDOWS

    run = load_run(path)
    points = int((~run.table["provider"].isin(YARDSTICKS)).sum())
    phases = dict(run.manifest.seconds)
    phases[OWN] += max(0.0, outside_s - sum(phases.values()))
    overhead = sum(spent for phase, spent in phases.items() if phase not in WINDOWS)
    sums = {"wall": outside_s, "overhead": overhead, "overhead but building": overhead - phases.get("building", 0.0)}
    # Of a very short call a sample is a mean of several: then this is less than what was spent in calls.
    sums["samples"] = float(run.table["wall_ms"].mul(run.table["samples_ms"].str.len()).sum()) / 1e3
    return [
        {"phase": name, "seconds": spent, "percent": 100 * spent / outside_s, "ms_a_point": 1e3 * spent / points}
        for name, spent in (phases | sums).items()
    ]


@main.command()
@click.option("--points", multiple=True, type=int, default=SIZES, show_default=True)
def parent(points: tuple[int, ...]) -> None:
    """The parent with a worker of straw, a fresh process for each number of points."""
    _print([_in_a_process("one-parent", number) for number in points])


@main.command(hidden=True)
@click.argument("points", type=int)
def one_parent(points: int) -> None:
    """One line of `parent`, as JSON."""
    from moebench.options import Options
    from moebench.run import run_suite
    from moebench.suite import load_suite

    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        suite = load_suite([str(straw_suite(Path(folder), points))])
        outcome = run_suite(suite, Options(Path(folder) / "run", command="harness_cost"), start=Straw)
        each_ms = (time.perf_counter() - begin) * 1e3 / points
        journal_mb = (Path(folder) / "run" / "journal.jsonl").stat().st_size / 1e6
    seconds = {f"{phase}_s": outcome.seconds[phase] for phase in ("harness", "journal", "table")}
    row = {"points": outcome.counts["measured"], "ms_a_point": each_ms, "peak_mb": _peak_mb(), "journal_mb": journal_mb}
    click.echo(json.dumps(row | seconds))


@main.command()
@click.option("--points", type=int, default=2000, show_default=True)
def worker(points: int) -> None:
    """The real worker's resident memory as blocks of tiny layers go by."""
    import psutil

    from moebench.options import Options
    from moebench.run import Progress, run_suite
    from moebench.suite import load_suite

    rows: list[Row] = []
    begin = time.perf_counter()

    def block_done(*_: object) -> None:
        resident = sum(child.memory_info().rss for child in psutil.Process().children())
        rows.append({"blocks": len(rows) + 1, "worker_mb": resident / 1e6, "seconds": time.perf_counter() - begin})

    with tempfile.TemporaryDirectory() as folder:
        suite = load_suite([str(straw_suite(Path(folder), points))])
        run_suite(suite, Options(Path(folder) / "run", device="cpu"), Progress(block_done=block_done))
    _print(rows[9 :: max(1, len(rows) // 10)])


@main.command()
@click.option("--device", "kind", type=click.Choice(("cpu", "cuda")), default="cuda", show_default=True)
@click.option("--model", default="deepseek-v3", show_default=True)
@click.option("--tokens", type=int, default=32768, show_default=True)
def device(kind: str, model: str, tokens: int) -> None:
    """What a GPU's suites spend beside measuring: a reading of its state, a profiled burst, a layer's making."""
    from moebench.measure.device import StateProbe

    probe = StateProbe(kind)
    probe.begin()
    rows = [{"what": "a reading of the state, after each burst", "ms": _mean_ms(lambda: probe.sample(0), 10)}]
    if kind == "cuda":
        rows.append({"what": "a burst of three calls under the profiler", "ms": _profiled_ms()})
    _print(rows + _layer_rows(kind, model, tokens))


def _layer_rows(kind: str, model: str, tokens: int) -> list[Row]:
    from moebench.catalogue.models import resolve_layer
    from moebench.point import Problem
    from moebench.routing.statistics import statistics
    from moebench.weights import make_weights
    from moebench.workload import make_draw

    layer = resolve_layer(model)[1].layer
    made: dict[str, Any] = {}

    def keep(name: str, make: Callable[[], Any]) -> float:
        return _mean_ms(lambda: made.__setitem__(name, make()), 1)

    weights = keep("weights", lambda: make_weights(layer, "bf16" if kind == "cuda" else "fp32", kind, 0))
    draw = keep("draw", lambda: make_draw(Problem(model, layer, tokens, "uniform"), made["weights"], 0))
    counted = keep("statistics", lambda: statistics(made["draw"].routing))
    return [
        {"what": f"weights of {model}, once a layer", "ms": weights},
        {"what": f"a draw of {tokens} tokens, five a block", "ms": draw},
        {"what": "its routing's statistics, four a block and capacity", "ms": counted},
    ]


def _profiled_ms() -> float:
    import torch

    from moebench.measure.profiler import kernel_times

    a = torch.randn(1024, 1024, device="cuda")
    kernel_times(lambda index: a @ a, [0])  # the first one starts the profiler
    return _mean_ms(lambda: kernel_times(lambda index: a @ a, [0, 1, 2]), 5)


def _mean_ms(call: Callable[[], Any], times: int) -> float:
    import torch

    begin = time.perf_counter()
    for _ in range(times):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin) / times


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
def estimates(runs: tuple[Path, ...]) -> None:
    """What `--dry-run` says of shipped suites against what complete runs of them took.

    From nominal figures; from the ceilings of that run; and corrected by what the other runs named here took.
    """
    _print(estimate_rows([json.loads((run / "manifest.json").read_text()) for run in runs]))


def estimate_rows(manifests: list[Row]) -> list[Row]:
    """Estimated over actual seconds of each run that is the whole of a shipped suite, measured in one session."""
    from moebench.earlier_runs import factors_of, is_whole
    from moebench.estimate import estimate_seconds
    from moebench.suite import load_suite, shipped

    def expected(manifest: Row, *known: Any) -> Any:
        overrides = {axis: list(map(str, values)) for axis, values in manifest["overrides"].items()}
        suite = load_suite([manifest["suite"]], overrides, add_providers=manifest["joined"])
        return estimate_seconds(suite, manifest["device_kind"], *known)

    told = [manifest for manifest in manifests if is_whole(manifest) and manifest["suite"] in shipped()]
    # By today's model, whatever it was when they ran.
    told = [manifest | {"expected_seconds": expected(manifest, manifest["ceilings"]).phases} for manifest in told]
    rows = []
    for manifest in told:
        ceilings, took = manifest["ceilings"], sum(manifest["seconds"].values())
        others = factors_of([other for other in told if other["suite"] != manifest["suite"]])
        ways = {"nominal": (None, None), "ceilings": (ceilings, None), "corrected": (ceilings, others)}
        found = {name: expected(manifest, *known).seconds / took for name, known in ways.items()}
        rows.append({"suite": manifest["suite"], "device_kind": manifest["device_kind"], "took_s": took, **found})
    return rows


def _in_a_process(command: str, points: int) -> Row:
    words = [sys.executable, "-m", "moebench_suites.harness_cost", command, str(points)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    row: Row = json.loads(done.stdout)
    return row


def _peak_mb() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) * 1024 / 1e6


def _print(rows: list[Row]) -> None:
    from moebench.terminal import print_rows

    print_rows(rows, tuple(rows[0]) if rows else ("nothing",))


if __name__ == "__main__":
    main()
