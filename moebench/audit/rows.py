"""The rows of an audit: one flat object a build and target. No torch, no triton."""

from __future__ import annotations

from typing import Any, get_type_hints

from moebench.audit.judging import faults_of
from moebench.audit.limits import LIMITS, occupancy, register_cap
from moebench.audit.readers import Facts

Row = dict[str, Any]

KINDS = get_type_hints(Facts)
FACTS = tuple(KINDS)
LIMITED = ("register_limit", "shared_limit_bytes", "ctas_per_sm", "warps_per_sm", "occupancy", "occupancy_bound")


def are_facts(found: Any) -> bool:
    """Whether what was read from a file can be judged: every fact there, of its type, no count below nothing."""
    if not isinstance(found, dict) or found.keys() != KINDS.keys():
        return False
    right = all(isinstance(found[name], kind) and not isinstance(found[name], bool) for name, kind in KINDS.items())
    return right and found["warps"] > 0 and min(value for value in found.values() if isinstance(value, int)) >= 0


def make_row(listed: Row, answer: Row) -> Row:
    """A row from what was asked for and what came back: facts, or an error."""
    row = {name: listed[name] for name in ("file", "kernel", "build", "target", "num_warps", "num_stages")}
    facts = answer.get("facts")
    if facts is None:
        row |= {"verdict": "fault", "faults": [answer["error"]], **dict.fromkeys((*FACTS, *LIMITED))}
    else:
        row |= _judged(facts, listed["target"], listed["expect"])
    return row | {"compile_ms": answer.get("compile_ms"), "cached": answer["cached"]}


def _judged(facts: Facts, target: str, expect: list[str]) -> Row:
    runs = occupancy(
        target,
        registers=facts["registers"],
        shared_bytes=facts["shared_bytes"],
        num_warps=facts["warps"],
        tensor_columns=facts["tensor_columns"],
    )
    faults = faults_of(facts, runs, target, expect)
    return {
        "verdict": "fault" if faults else "ok",
        "faults": faults,
        **facts,
        "register_limit": register_cap(target, facts["warps"]),
        "shared_limit_bytes": LIMITS[target].shared_cta_bytes,
        "ctas_per_sm": runs.ctas,
        "warps_per_sm": runs.warps,
        "occupancy": round(runs.share, 4),
        "occupancy_bound": runs.bound,
    }


def flat(row: Row) -> Row:
    """For --json: no lists inside."""
    return row | {"faults": "; ".join(row["faults"])}


# What a person reads, in a terminal and on the page.
COLUMNS = (
    "build", "target", "verdict", "registers", "spills B", "shared KiB", "CTAs", "warps", "bound by",
    "tensor cores", "TMA", "loads", "compile",
)  # fmt: skip


def shown(row: Row) -> dict[str, str]:
    """A row in words and rounded numbers, by COLUMNS; what is not known is "-"."""
    cells = dict.fromkeys(COLUMNS, "-")
    cells |= {name: row[name] for name in ("build", "target", "verdict")}
    if row["registers"] is not None:
        cells |= {
            "registers": f"{row['registers']}",
            "spills B": f"{row['spill_bytes']}",
            "shared KiB": f"{row['shared_bytes'] / 1024:.4g} of {row['shared_limit_bytes'] / 1024:.0f}",
            "CTAs": f"{row['ctas_per_sm']}",
            "warps": f"{row['warps_per_sm']} of {LIMITS[row['target']].warps}",
            "bound by": row["occupancy_bound"],
            "tensor cores": row["tensor_instructions"] or "-",
            "TMA": _tma(row),
            "loads": f"{row['loads']}, {row['wide_loads']} wide" if row["loads"] else "-",
        }
    return cells | {"compile": _compiled(row)}


def _tma(row: Row) -> str:
    parts = [f"{row[name]} {word}" for name, word in (("tma_loads", "in"), ("tma_stores", "out")) if row[name]]
    return ", ".join(parts) or "-"


def _compiled(row: Row) -> str:
    if row["cached"]:
        return "cached"
    return "-" if row["compile_ms"] is None else f"{row['compile_ms'] / 1e3:.2f} s"


def summary(rows: list[Row]) -> str:
    """One line."""
    faults = sum(row["verdict"] != "ok" for row in rows)
    cached = sum(row["cached"] for row in rows)
    kept = f" ({cached} cached)" if cached else ""
    said = f"{faults} with a fault" if faults else "all ok"
    return f"{len(rows)} build{'s' if len(rows) != 1 else ''}{kept}, {said}"


def fault_lines(rows: list[Row]) -> list[str]:
    """One line a fault."""
    return [f"  {row['build']} on {row['target']}: {fault}" for row in rows for fault in row["faults"]]
