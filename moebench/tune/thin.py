"""From all candidates of a case to those worth racing: the cost model's best, less those the compiler faults."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moebench.audit.run import Request, audit
from moebench.tune import builds
from moebench.tune.case import DTYPES, Case
from moebench.tune.cost import estimated_ms


@dataclass
class Field:
    """The runners of one case.

    Attributes:
        case: what they compute.
        configs: worth racing; the shipped tile is the first, whatever the model says of it.
        considered: how many there were at first.
        faults: why the compiler's report put some out, with how many each.
    """

    case: Case
    configs: list[Any]
    considered: int
    faults: dict[str, int] = field(default_factory=dict)


def thin(cases: list[Case], family: str, keep: int, shared_limit: int | None = None) -> list[Field]:
    """The field of each case: at most `keep` candidates by the cost model, all of them compiled for `family`.

    Args:
        shared_limit: the device's, where it has less shared memory than its family.

    Raises:
        RunError: triton is missing.
    """
    fields = [_by_cost(case, family, keep, shared_limit) for case in cases]
    if family != "interpreter":
        _by_compiler(fields, family)
    return fields


def _by_cost(case: Case, family: str, keep: int, shared_limit: int | None) -> Field:
    every = _candidates(case, family, shared_limit)
    shipped, *others = every
    others.sort(key=lambda config: estimated_ms(case, config, family))
    return Field(case, [shipped, *others[: keep - 1]], len(every))


def _candidates(case: Case, family: str, shared_limit: int | None) -> list[Any]:
    """The tile that the library would launch, then others."""
    import torch

    from moebench_kernels.ragged_tiles import ragged_candidates
    from moebench_kernels.tiles import candidates
    from moebench_kernels.tuned_tiles import shrunk

    dtype = getattr(torch, DTYPES[case.dtype])
    if case.weight_gradient:
        every: list[Any] = ragged_candidates(case.kind, case.k, case.n, dtype, family)
        return every
    shipped, *others = candidates(case.kind, case.block_m, case.n, case.k, dtype, family)
    first = shrunk(shipped, case.block_m, dtype, family, shared_limit)
    return [first, *(other for other in others if other != first)]


def _by_compiler(fields: list[Field], family: str) -> None:
    listed = [(at, config) for at, each in enumerate(fields) for config in each.configs]
    entries = [[family, asdict(fields[at].case), asdict(config)] for at, config in listed]
    with tempfile.TemporaryDirectory() as folder:
        candidates, file = Path(folder) / "candidates.json", Path(folder) / "candidates.py"
        candidates.write_text(json.dumps(entries))
        file.write_text(builds.FILE.format(path=str(candidates)))
        found = audit(Request(files=(str(file),), targets=(family,), all=True))
    shipped = [each.configs[0] for each in fields]
    for each in fields:
        each.configs = []
    for row in found.rows:
        at, config = listed[int(row["build"])]
        if row["verdict"] == "ok" or config is shipped[at]:
            fields[at].configs.append(config)
        if row["verdict"] != "ok":
            why = _kind_of_fault(row)
            fields[at].faults[why] = fields[at].faults.get(why, 0) + 1


def _kind_of_fault(row: Any) -> str:
    """A fault without its numbers, so that equal ones count together."""
    if row["registers"] is None:
        return "does not compile"
    return "spills" if row["spill_bytes"] else "too much shared memory"
