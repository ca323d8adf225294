"""The verdict on a compiled kernel: what is wrong with it on its target, one line a fault. No torch, no triton."""

from __future__ import annotations

from collections.abc import Sequence

from moebench.audit.limits import LIMITS, Occupancy, register_cap
from moebench.audit.readers import Facts

# What `Build.expect` may name: the instruction families that satisfy it, and the targets that have them.
EXPECTED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "mma": (("mma", "wgmma", "tcgen05"), ("sm_80", "sm_90", "sm_100")),
    "wgmma": (("wgmma",), ("sm_90",)),
    "tcgen05": (("tcgen05",), ("sm_100",)),
    "mfma": (("mfma",), ("gfx942", "gfx950")),
    "tma": (("tma_loads", "tma_stores"), ("sm_90", "sm_100")),
}


def faults_of(facts: Facts, runs: Occupancy, target: str, expect: Sequence[str]) -> list[str]:
    """Every fault in words; none when the kernel is as it should be."""
    limits = LIMITS[target]
    counts = dict(facts)
    faults = []
    if facts["spill_bytes"]:
        capped = facts["registers"] >= register_cap(target, facts["warps"])
        cap = f", the most that {facts['warps']} warp{'s' * (facts['warps'] > 1)} can have" if capped else ""
        faults.append(f"spills {facts['spill_bytes']} bytes a thread at {facts['registers']} registers{cap}")
    if facts["shared_bytes"] > limits.shared_cta_bytes:
        faults.append(f"needs {facts['shared_bytes']} bytes of shared memory; {target} has {limits.shared_cta_bytes}")
    if facts["tensor_columns"] > limits.tensor_columns:
        faults.append(f"needs {facts['tensor_columns']} columns of tensor memory; {target} has {limits.tensor_columns}")
    if facts["warps"] * limits.warp > limits.cta_threads:
        faults.append(f"has {facts['warps'] * limits.warp} threads; {target} allows {limits.cta_threads}")
    if not runs.ctas and not faults:
        faults.append(f"{facts['warps']} warps of {facts['registers']} registers a thread do not fit {target}")
    for word in expect:
        families, targets = EXPECTED[word]
        if target in targets and not any(counts[family] for family in families):
            found = facts["tensor_instructions"] or "no tensor-core instruction"
            faults.append(f"has no {word} (found: {found})" if word != "tma" else "uses no TMA")
    return faults
