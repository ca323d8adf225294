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


def thin(cases: list[Case], family: str, keep: int) -> list[Field]:
    """The field of each case: at most `keep` candidates by the cost model, all of them compiled for `family`.

    Raises:
        RunError: triton is missing.
    """
    fields = [_by_cost(case, family, keep) for case in cases]
    if family != "interpreter":
        _by_compiler(fields, family)
    return fields


def _by_cost(case: Case, family: str, keep: int) -> Field:
    import torch

    from moebench_kernels.tiles import candidates

    every = candidates(case.kind, case.block_m, case.n, case.k, getattr(torch, DTYPES[case.dtype]), family)
    shipped, *others = every
    others.sort(key=lambda config: estimated_ms(case, config, family))
    return Field(case, [shipped, *others[: keep - 1]], len(every))


def _by_compiler(fields: list[Field], family: str) -> None:
    listed = [(at, config) for at, each in enumerate(fields) for config in each.configs]
    entries = [[family, asdict(fields[at].case), asdict(config)] for at, config in listed]
    with tempfile.TemporaryDirectory() as folder:
        candidates, file = Path(folder) / "candidates.json", Path(folder) / "candidates.py"
        candidates.write_text(json.dumps(entries))
        file.write_text(builds.FILE.format(path=str(candidates)))
        found = audit(Request(files=(str(file),), targets=(family,), all=True))
    for each in fields:
        each.configs = []
    for row in found.rows:
        at, config = listed[int(row["build"])]
        if row["verdict"] == "ok":
            fields[at].configs.append(config)
        else:
            why = _kind_of_fault(row)
            fields[at].faults[why] = fields[at].faults.get(why, 0) + 1


def _kind_of_fault(row: Any) -> str:
    """A fault without its numbers, so that equal ones count together."""
    if row["registers"] is None:
        return "does not compile"
    return "spills" if row["spill_bytes"] else "too much shared memory"
