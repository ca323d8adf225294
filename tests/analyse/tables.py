"""Small tables of records for tests: defaults that a test overrides by name."""

from __future__ import annotations

import itertools
from statistics import median

import pandas as pd

from moebench.analyse import name_rows, records_to_table
from moebench.record import Record

_ids = itertools.count()


def record(provider: str, samples: list[float] | None = None, **over: object) -> Record:
    """A measured record with these samples (ms), one a round; without samples, what `over` says."""
    values = {
        "run_id": "r", "block_id": "b", "point_id": f"p{next(_ids)}", "suite": "s", "model": "olmoe-1b-7b",
        "provider": provider, "scope": "layer", "direction": "forward", "device": "cpu", "precision": "fp32",
        "tokens": 16, "hidden_size": 2048, "expert_ffn_size": 1024, "routed_experts": 64, "top_k": 8,
        "router": "softmax_topk", "traffic": "uniform",
    }  # fmt: skip
    if samples is not None:
        latency = median(samples)
        values |= {"status": "measured", "timer": "perf_counter", "samples_ms": samples, "latency_ms": latency}
        values |= {"sample_round": list(range(len(samples))), "tokens_per_s": 16e3 / latency, "fidelity_error": 2e-7}
    return Record(**(values | over))


def table(*records: Record) -> pd.DataFrame:
    return name_rows(records_to_table(records))
