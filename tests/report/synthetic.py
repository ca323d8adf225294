"""Synthetic runs for tests of the report: shaped like real ones, measured by nobody."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moebench.analyse import write_results
from moebench.journal import Journal
from moebench.point import STAGES
from moebench.record import Manifest, Record

D, F, E, K, LAYERS = 2048, 1024, 64, 8, 16
PEAK_TFLOPS, PEAK_GBS = 0.42, 21.0
HOSTILE = "<script>alert(1)</script></script><img src=x onerror=alert(2)>"

# latency as a multiple of the limit, by T: small, middle, large
ARMS = {
    "torch-loop": (1.6, 1.9, 1.35),
    "torch-grouped": (1.35, 1.42, 1.3),
    "torch-compile": (1.5, 1.44, 1.28),
    "torch-bmm": (2.1, 3.4, 1.9),
    "torch-dense": (6.5, 5.2, None),
    "dense-ffn": (1.2, 0.55, 1.05),
}


def make_run(
    directory: Path,
    *,
    tokens: tuple[int, ...] = (1, 16, 256),
    models: tuple[str, ...] = ("olmoe-1b-7b",),
    precisions: tuple[str, ...] = ("fp32",),
    rounds: int = 14,
    seed: int = 0,
    run_id: str = "r1",
    stages: bool = False,
    priced: bool = False,
    hostile: bool = False,
    journal: bool = False,
    records: int | None = None,
) -> Path:
    """Write a run directory like `quick` would; with `records`, that many rows, under ever other traffic."""
    directory.mkdir(parents=True, exist_ok=True)
    options = {"rounds": rounds, "stages": stages, "priced": priced, "hostile": hostile, "run_id": run_id}
    stream = _records(tokens, models, precisions, np.random.default_rng(seed), options, records)
    if journal:
        Journal(directory / "journal.jsonl").append(list(stream))
    else:
        write_results(stream, directory / "results.parquet")
    manifest = make_manifest(run_id, hostile=hostile, priced=priced)
    (directory / "manifest.json").write_text(manifest.model_dump_json())
    return directory


def grow(directory: Path, records: int) -> Path:
    """Repeat the rows of a run until there are `records`, each copy under traffic and ids of its own."""
    path = directory / "results.parquet"
    table = pq.read_table(path)
    copies = [_renamed(table, copy) for copy in range(-(-records // len(table)))]
    pq.write_table(pa.concat_tables(copies).slice(0, records), path)
    return directory


def _renamed(table: pa.Table, copy: int) -> pa.Table:
    for name in ("block_id", "point_id", "traffic"):
        values = pc.binary_join_element_wise(table[name], str(copy), "-")
        table = table.set_column(table.column_names.index(name), table.schema.field(name), values)
    return table


def make_manifest(run_id: str = "r1", *, hostile: bool = False, priced: bool = False) -> Manifest:
    return Manifest(
        run_id=run_id,
        suite=f"quick{HOSTILE}" if hostile else "quick",
        question="Which implementation of one published layer is fastest on this machine?",
        suite_hash="5e1f" * 4,
        suite_text=f'{"# " + HOSTILE if hostile else ""}\nname = "quick"\nmodel = ["olmoe-1b-7b"]\n',
        command="moebench run suite quick",
        git_commit="bd87976a2f",
        git_dirty=False,
        device="Synthetic CPU (2 cores)",
        device_kind="cpu",
        versions={"moebench": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "triton": "3.7.1"},
        machine={"cpu": HOSTILE if hostile else "Synthetic CPU", "cores": 2, "memory_bytes": 25_276_502_016},
        ceilings={"gemm_tflops": {"fp32": PEAK_TFLOPS}, "copy_gbs": PEAK_GBS * 0.82, "read_gbs": PEAK_GBS},
        cost={"usd_per_hour": 2.0, "date": "2026-01", "basis": "synthetic"} if priced else None,
        providers={
            **{name: {"version": "2.13.0", "hash": "ab" * 8} for name in ARMS},
            "triton": {"unavailable": HOSTILE} if hostile else {"version": "3.7.1", "hash": "cd" * 8},
        },
        points=30,
        started_at="2026-10-01T09:00:00+00:00",
        finished_at="2026-10-01T09:03:20+00:00",
        finished="complete",
    )


def _records(tokens, models, precisions, rng, options, wanted) -> Iterator[Record]:
    made, sweep = 0, 0
    while True:
        for model in models:
            for T in tokens:
                block = f"{options['run_id']}-b{sweep}-{model}-{T}"
                drift = np.exp(rng.normal(0, 0.02, options["rounds"]))  # what all arms of a round share
                for precision in precisions:
                    for record in _arms(T, model, precision, block, sweep, drift, rng, options):
                        yield record
                        made += 1
                        if made == wanted:
                            return
        sweep += 1
        if wanted is None:
            return


def _arms(T, model, precision, block, sweep, drift, rng, options) -> Iterator[Record]:
    work = Problem(T, precision, sweep)
    place = 0 if T <= 1 else 2 if T >= 128 else 1
    common = work.columns(model, block, options)
    block = f"{block}-{precision}"
    if options["hostile"]:
        common["model"] = f"{model}{HOSTILE}"
    for name, factors in ARMS.items():
        base = common | {"provider": name, "point_id": f"{block}-{name}", "role": "arm", "scope": "layer"}
        if name == "dense-ffn":
            base["role"] = "yardstick"
        if factors[place] is None:
            yield Record(**base, status="skipped", reason="slow arm left out at 256 tokens")
            continue
        yield _measured(base, work, factors[place], drift, rng, options)
    yield _triton(common, block, options)
    for name in ("copy", "read", "gemm"):
        base = common | {"provider": name, "point_id": f"{block}-{name}", "role": "yardstick", "scope": "layer"}
        yield _measured(base, work, 1.02, drift, rng, options)
    if options["stages"]:
        yield from _stages(common, block, work, drift, rng, options)


def _stages(common, block, work, drift, rng, options) -> Iterator[Record]:
    shares = dict(zip(STAGES, (0.04, 0.03, 0.05, 0.55, 0.28, 0.05), strict=True))
    for name in ("torch-loop", "torch-grouped"):
        for stage, share in shares.items():
            base = common | {"provider": name, "point_id": f"{block}-{name}-{stage}", "role": "arm", "scope": stage}
            yield _measured(base, work, share * ARMS[name][1], drift, rng, options)


def _triton(common, block, options) -> Record:
    base = common | {"provider": "triton", "point_id": f"{block}-triton", "role": "arm", "scope": "layer"}
    if options["hostile"]:
        return Record(**base, status="failed", reason=HOSTILE)
    twin = "reduced twin 64×32 in Triton's interpreter: same experts, top-k and routing"
    errors = {"rel_error": 2.1e-7, "max_error": 9e-7, "fidelity_error": 2.1e-7}
    return Record(**base, status="verified", checked_on=twin, **errors)


class Problem:
    """The arithmetic of one block."""

    def __init__(self, T: int, precision: str, sweep: int) -> None:
        self.T, self.sweep, self.precision = T, sweep, precision
        self.width = 4 if precision == "fp32" else 2
        self.active = E * (1 - (1 - K / E) ** T)
        self.flops = T * 2 * E * D + T * K * 6 * D * F
        self.bytes = self.active * 3 * D * F * self.width + E * D * self.width + 2 * T * D * self.width
        self.limit_ms = max(self.flops / (PEAK_TFLOPS * 1e9), self.bytes / (PEAK_GBS * 1e6))

    def columns(self, model: str, block: str, options: dict) -> dict:
        return {
            "run_id": options["run_id"],
            "block_id": block,
            "suite": "quick",
            "model": model,
            "provider_version": "2.13.0",
            "direction": "forward",
            "device": "Synthetic CPU (2 cores)",
            "precision": self.precision,
            "tokens": self.T,
            "hidden_size": D,
            "expert_ffn_size": F,
            "routed_experts": E,
            "top_k": K,
            "router": "softmax_topk",
            "traffic": "uniform" if self.sweep == 0 else f"zipf:{1 + self.sweep / 1000:.3f}",
            "drop_rate": 0.0,
            "load_max_over_mean": 1 + 6 / (1 + self.T * K / E),
            "active_experts": self.active,
        }


def _measured(base, work, factor, drift, rng, options) -> Record:
    rounds = len(drift)
    samples = work.limit_ms * factor * drift * np.exp(rng.normal(0, 0.015, rounds))
    latency = float(np.median(samples))
    spread = 1.2 * float(np.std(samples)) / np.sqrt(rounds)
    seconds = latency / 1e3
    flags = ["contended"] if rng.random() < 0.06 else []
    if options["hostile"]:
        flags.append(HOSTILE)
    noise = 2e-7 if work.precision == "fp32" else 4e-3
    timed = {"timer": "perf_counter", "latency_ms": latency, "latency_ms_low": latency - spread}
    timed |= {"latency_ms_high": latency + spread, "wall_ms": latency * 1.01, "prepare_ms": 4.0}
    timed |= {"samples_ms": samples.tolist(), "sample_round": list(range(rounds))}
    timed |= {"tokens_per_s": work.T / seconds, "tflops": work.flops / seconds / 1e12}
    timed |= {"gbytes_per_s": work.bytes / seconds / 1e9, "executed_flops": float(work.flops)}
    timed |= {"s_mbu": work.bytes / seconds / 1e9 / PEAK_GBS, "s_mfu": work.flops / seconds / 1e12 / PEAK_TFLOPS}
    timed |= {"limit_ms": work.limit_ms, "limit_fraction": work.limit_ms / latency}
    timed |= {"peak_memory_bytes": int(2e6 + work.T * D * 4 * (2 + factor * 3)), "energy_source": "none"}
    if options["priced"]:
        timed["usd_per_mtok"] = 2.0 / 3600 * seconds / work.T * 1e6
    error = noise * float(np.exp(rng.normal(0, 0.3)))
    errors = {"rel_error": error, "max_error": 5 * error, "fidelity_error": error}
    return Record(**base, status="measured", **timed, **errors, flags=flags)


if __name__ == "__main__":
    import sys

    options = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    make_run(Path(sys.argv[1]), **options)
