"""Published runs of straw: folders as `reports/` has them, with records whose truth a test knows."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from analyse.tables import record
from moebench_suites.published.runs import Published

from moebench.analyse import Run, records_to_table, write_results
from moebench.record import Manifest, Record

SCATTER = (1.0, 1.004, 0.997, 1.002, 0.999, 1.001, 0.998)
H200, H100, CPU = "NVIDIA H200", "NVIDIA H100 80GB HBM3", "some CPU"
QWEN = {
    "model": "qwen3-30b-a3b", "hidden_size": 2048, "expert_ffn_size": 768, "routed_experts": 128, "top_k": 8,
}  # fmt: skip
MIXTRAL = {
    "model": "mixtral-8x7b", "hidden_size": 4096, "expert_ffn_size": 14336, "routed_experts": 8, "top_k": 2,
}  # fmt: skip


def timed(provider: str, latency_ms: float, rounds: int = len(SCATTER), **over: object) -> Record:
    """A bf16 row of that latency; all rows scatter alike, so that their ratios are exact."""
    samples = [latency_ms * SCATTER[each % len(SCATTER)] for each in range(rounds)]
    ends = {"latency_ms_low": min(samples), "latency_ms_high": max(samples)}
    return record(provider, samples, **{"precision": "bf16", **QWEN, **ends, **over})


def untimed(provider: str, status: str = "failed", **over: object) -> Record:
    """A row without numbers."""
    why = {"checked_on": "16 tokens"} if status == "verified" else {"reason": "it raised RuntimeError: no"}
    return record(provider, **{"precision": "bf16", **QWEN, "status": status, **why, **over})


def described(suite: str, device: str = H200, started: str = "2026-11-27T10:00:00+00:00", **over: object) -> Manifest:
    """Where a run of straw was made."""
    known = {
        "run_id": f"{suite}-{device}-{started}-{over.get('shard')}", "suite": suite, "suite_hash": "0",
        "suite_text": "", "command": "moebench run suite", "git_commit": "1a2b3c4d5e6f7a8b9c0d", "git_dirty": False,
        "device": device, "started_at": started, "device_kind": "cpu" if "CPU" in device else "cuda",
        "finished": "complete", "published": [], "versions": {"torch": "2.11.0", "triton": "3.6.0"},
    }  # fmt: skip
    return Manifest(**{**known, **over})


def owned(rows: list[Record], manifest: Manifest) -> list[Record]:
    """The rows as rows of that run."""
    own = {"run_id": manifest.run_id, "device": manifest.device, "suite": manifest.suite}
    return [row.model_copy(update=own) for row in rows]


def read(suite: str, rows: list[Record], *where: str, **over: object) -> Published:
    """A run as `read_published` gives it, without its folder."""
    manifest = described(suite, *where, **over)
    run = Run(records_to_table(owned(rows, manifest)), manifest, Path("reports") / manifest.run_id)
    return Published(run, datetime.fromisoformat(manifest.started_at), counts=True)


def publish(reports: Path, suite: str, rows: list[Record], *where: str, **over: object) -> Path:
    """A folder of reports/ with these rows."""
    manifest = described(suite, *where, **over)
    name = f"{manifest.started_at[:10]}-{manifest.device.split()[1].lower()}-{suite}-{len(list(reports.glob('*')))}"
    folder = reports / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest.model_dump()))
    write_results(owned(rows, manifest), folder / "results.parquet")
    return folder
