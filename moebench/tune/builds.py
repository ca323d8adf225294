"""Candidates as builds, so that the audit can compile them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moebench_kernels.build import Build

# What is audited: a file beside the list, which names it.
FILE = "from moebench.tune.builds import builds_of\n\n\ndef builds():\n    return builds_of({path!r})\n"


def builds_of(path: str) -> list[Build]:
    """One build for each [family, case, config] of a JSON file, named by its number."""
    listed = json.loads(Path(path).read_text())
    return [_build(number, *entry) for number, entry in enumerate(listed)]


def _build(number: int, family: str, case: dict[str, Any], config: dict[str, Any]) -> Build:
    from moebench.tune.case import Case
    from moebench_kernels.grouped_gemm import build as build_grouped
    from moebench_kernels.ragged_gemm import build as build_ragged
    from moebench_kernels.ragged_tiles import RaggedConfig
    from moebench_kernels.tiles import GemmConfig

    made = Case(**case)
    found: Build
    if made.weight_gradient:
        gather = made.kind.endswith("_left"), made.kind.endswith("_right")
        found = build_ragged(family, made.dtype, *gather, RaggedConfig(**config))
    else:
        found = build_grouped(
            family, made.dtype, made.block_m, made.gather, made.activation, made.transpose, config=GemmConfig(**config)
        )
    return replace(found, name=str(number), expect=())
