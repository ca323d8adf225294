"""The report: one HTML file that carries its data, styles and scripts, and asks the network for nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from moebench.analyse import NOISE, Cap, Headline, Run, headlines, load_runs, name_rows, ratios
from moebench.record import FAULTS
from moebench.report import findings
from moebench.report.audits import audit_sections
from moebench.report.columns import COLUMNS, DETAILS
from moebench.report.rows import anchors, pack, page_rows
from moebench.report.traces import trace_sections

HERE = Path(__file__).parent
OPEN_HEADLINES = 12  # more are folded
MOST_HEADLINES = 300


def write_report(runs: Sequence[Path], out: Path, *, baseline: str | None = None, traces: Sequence[Path] = ()) -> Path:
    """Write the CAP report of these run directories to the file `out`, with a section on recorded traces.

    Raises:
        ValueError: a directory is not a run, a file is no trace, or the baseline was never measured.
    """
    loaded = load_runs(runs)
    page = render(loaded, baseline=baseline, audits=audit_sections(runs), traces=trace_sections(traces))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return out


def render(
    runs: list[Run],
    *,
    baseline: str | None = None,
    audits: Sequence[dict[str, Any]] = (),
    traces: Sequence[dict[str, Any]] = (),
) -> str:
    """The page as text; `audits` and `traces` as `audit_sections` and `trace_sections` give them."""
    table, systems = joined(runs, baseline)
    table["anchor"] = anchors(table["point_id"])
    rows, families = page_rows(table)
    manifests = [run.manifest for run in runs]
    verdicts = headlines(table)
    providers = dict(zip(table["variant"], table["provider"], strict=True))
    data = {
        "rows": pack(rows),
        "columns": [asdict(column) for column in COLUMNS],
        "details": DETAILS,
        "faults": FAULTS,
        "noise": NOISE,
        "families": families,
        "variants": _variants(table),
        "radars": [findings.radar(system, providers) if system else None for system in systems],
        "ceilings": findings.ceilings(runs),
        "absent": {
            group: findings.why_absent(group, table[table["status"] == "measured"], manifests)
            for group in ("energy", "cost", "peak memory")
        },
    }
    text = (
        _environment()
        .get_template("page.html")
        .render(
            runs=[_run_facts(run, system) for run, system in zip(runs, systems, strict=True)],
            title=_title(runs),
            verdicts=verdicts[:MOST_HEADLINES],
            anchors=rows["anchor"].to_dict(),
            open_verdicts=OPEN_HEADLINES,
            more_verdicts=max(0, len(verdicts) - MOST_HEADLINES),
            tally=_tally(verdicts),
            rows_total=len(table),
            rows_shown=len(rows),
            families_total=table["family"].nunique(),
            families_shown=len(families),
            constants=findings.constants(table) if len(table) else [],
            absences=findings.absences(table, manifests),
            troubles=findings.troubles(table, rows),
            flags=findings.flags(table),
            audits=audits,
            traces=traces,
            data=embedded_json(data),
            plotly=_plotly(),
            style=_asset("page.css") + (_asset("traces.css") if traces else ""),
            scripts=[_asset(name) for name in ("page.js", "marks.js", "charts.js")],
        )
    )
    return str(text)


def joined(runs: list[Run], baseline: str | None) -> tuple[pd.DataFrame, list[Cap | None]]:
    """All runs as one named table with speed-ups, and each run's scores."""
    table = name_rows(pd.concat([run.table.assign(run_id=run.manifest.run_id) for run in runs], ignore_index=True))
    parts, systems = [], []
    for run in runs:
        part = table[table["run_id"] == run.manifest.run_id]
        system = findings.scores(part, baseline) if len(part) else None
        parts.append(ratios(part, system.baseline if system else ""))
        systems.append(system)
    return table.join(pd.concat(parts)), systems


def embedded_json(data: Any) -> Markup:
    """JSON that no HTML parser can leave: `<`, `>` and `&` are written as escapes."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _run_facts(run: Run, system: Cap | None) -> dict[str, Any]:
    return {
        "manifest": run.manifest,
        "facts": findings.facts(run.manifest),
        "counts": findings.counts(run.table),
        "reached": findings.reached(run.table),
        "cap": system,
        "scores": findings.score_table(system) if system else None,
    }


def _variants(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Variants in fixed order, so that a colour means the same in every chart."""
    first = table.drop_duplicates("variant")
    return [{"name": row.variant, "provider": row.provider, "role": row.role} for row in first.itertuples()]


def _tally(verdicts: list[Headline]) -> list[tuple[str, int]]:
    """How often each variant wins (ties counted for both), most first; for runs with many problems."""
    won = pd.Series([name for verdict in verdicts for name in verdict.winners], dtype=object).value_counts()
    return [(str(name), int(count)) for name, count in won.head(12).items()]


def _title(runs: list[Run]) -> str:
    suites = " + ".join(dict.fromkeys(run.manifest.suite for run in runs))
    devices = ", ".join(dict.fromkeys(run.manifest.device for run in runs))
    return f"{suites} on {devices}"


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _asset(name: str) -> Markup:
    return Markup((HERE / name).read_text(encoding="utf-8"))


@cache
def _plotly() -> Markup:
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs().replace("</script", "<\\/script"))
