"""One page in Markdown: where and how, verdicts, a table for each family, ceilings, energy, faults and flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moebench.analyse import Headline, Run, headlines, load_runs
from moebench.analyse.cap import Cap
from moebench.analyse.numbers import bytes_text, significant
from moebench.catalogue.hardware import checked_row
from moebench.record import Manifest
from moebench.report import findings
from moebench.report.family_tables import MOST_TABLES, OURS, family_tables
from moebench.report.html import joined
from moebench.report.markdown_text import LETTERS, code, escaped, left_out, short, table

__all__ = ["escaped", "page", "write_markdown"]
MOST_VERDICTS, MOST_REASONS, MOST_FLAGS, MOST_ENERGY = 12, 12, 20, 24
READING = (
    "Times are ms of one call, the median; ± is half of its 95 % interval. Bold is the fastest. Ratios pair the rounds "
    "that both arms were sampled in; over 1 is faster; a tie is an interval that holds 1. Letters are flags, see below."
)


def write_markdown(runs: Sequence[Path], out: Path, *, baseline: str | None = None) -> Path:
    """Write a page for each of these run directories to the file `out`, one after another.

    Raises:
        ValueError: a directory is not a run, or the baseline was never measured.
    """
    loaded = load_runs(runs)
    named, systems = joined(loaded, baseline)
    pages = [
        page(run, named[named["run_id"] == run.manifest.run_id], system)
        for run, system in zip(loaded, systems, strict=True)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(pages), encoding="utf-8")
    return out


def page(run: Run, rows: pd.DataFrame, system: Cap | None, figures: Mapping[str, str] | None = None) -> str:
    """The page of one run.

    Args:
        rows: of this run, from `joined`.
        system: its CAP scores, or None.
        figures: kind -> path of an image, relative to the page.
    """
    flags = findings.flags(rows)
    marks = dict(zip(dict.fromkeys(line["flag"].partition(":")[0] for line in flags), LETTERS, strict=False))
    images = [f"![{escaped(kind)} of this run]({path})" for kind, path in (figures or {}).items()]
    parts = [
        _opening(run),
        _section("Verdicts", _verdicts(rows)),
        _section("Latency", _families(run.manifest, rows, marks)),
        _section("Ceilings of this device", _ceilings(run.manifest)),
        _section("Energy", _energy(rows)),
        _section("Cost, accuracy, performance", _scores(system) if system else []),
        _section("Not timed", _troubles(rows)),
        _section("Flags", _flags(flags, marks)),
        _section("Figures", [line for image in images for line in (image, "")]),
    ]
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"


def _section(title: str, lines: list[str]) -> list[str]:
    return ["", f"## {title}", "", *lines] if lines else []


def _opening(run: Run) -> list[str]:
    manifest = run.manifest
    counts = ", ".join(f"{count:,} {status.replace('_', ' ')}" for status, count in findings.counts(run.table))
    facts = [(name, short(text)) for name, text in _facts(manifest) if text]
    return [
        f"# {short(manifest.suite)} on {short(manifest.device)}",
        "",
        *([short(manifest.question), ""] if manifest.question else []),
        f"{_when(manifest)} · {counts or 'no rows'}",
        "",
        *_doubts(manifest),
        *table(["", ""], facts, "ll"),
        "",
        "To measure it again" + (f", on commit `{manifest.git_commit}`:" if _is_hex(manifest.git_commit) else ":"),
        "",
        *code(manifest.command),
    ]


def utc(text: str) -> datetime:
    """A time as manifests hold it, in UTC.

    Raises:
        ValueError: it is none.
    """
    time = datetime.fromisoformat(text)
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def _when(manifest: Manifest) -> str:
    try:
        return f"{utc(manifest.started_at).replace(tzinfo=None).isoformat(' ', 'minutes')} UTC"
    except (ValueError, OverflowError):
        return short(manifest.started_at)


def _doubts(manifest: Manifest) -> list[str]:
    """What stands in the way of measuring the same again, loudly."""
    said = []
    if manifest.git_dirty:
        said.append("**Measured from a checkout with uncommitted changes:** its commit alone does not reproduce it.")
    if manifest.git_commit is None:
        said.append("**The commit is unknown:** moebench did not run from a checkout; providers have hashes of source.")
    elif manifest.git_dirty is None:
        said.append("**The commit is as `MOEBENCH_COMMIT` said:** whether its files were changed is not known.")
    if manifest.finished != "complete":
        said.append("**This run is not complete.**")
    return [line for text in said for line in (f"> {text}", "")]


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    """(name, text) of what a reader has to know first; "" is left out."""
    machine, shard = manifest.machine, manifest.shard
    gpu = [("driver", "driver {}"), ("cuda", "CUDA {}"), ("power_limit_w", "limit {} W"), ("max_sm_mhz", "{} MHz")]
    host = [("cpu", "{}"), ("usable_cores", "{} cores"), ("os", "{}")]
    memory = machine.get("memory_bytes")
    shown = ("moebench", "python", "torch", "triton", "transformers", "numpy")
    changes = " with uncommitted changes" if manifest.git_dirty else ""
    return [
        ("device", _listed(machine, [("gpu", "{}"), *gpu])),
        ("host", _listed(machine, host) + (f" · {bytes_text(memory)}" if isinstance(memory, int) else "")),
        ("versions", " · ".join(f"{name} {manifest.versions[name]}" for name in shown if name in manifest.versions)),
        ("commit", f"{manifest.git_commit}{changes}" if manifest.git_commit else ""),
        ("share of the suite", "" if shard == (1, 1) else "{} of {}".format(*shard)),
        ("wall time", f"{significant(sum(manifest.seconds.values()) / 60)} minutes" if manifest.seconds else ""),
    ]  # fmt: skip


def _listed(values: Mapping[str, Any], forms: Sequence[tuple[str, str]]) -> str:
    known = ((form, values[name]) for name, form in forms if values.get(name) is not None)
    return " · ".join(form.format(f"{value:g}" if isinstance(value, float) else value) for form, value in known)


def _verdicts(rows: pd.DataFrame) -> list[str]:
    """An even sample of the verdicts, in their order."""
    verdicts = headlines(rows)
    if not verdicts:
        return []
    places = np.unique(np.linspace(0, len(verdicts) - 1, MOST_VERDICTS).round().astype(int))
    shown = [verdicts[place] for place in places]
    lines = [f"- **{short(verdict.problem)}**: {short(verdict.sentence)}" for verdict in shown]
    if len(verdicts) == len(shown):
        return lines
    return [_tally(verdicts), "", *lines, *left_out(len(shown), len(verdicts), "verdicts")]


def _tally(verdicts: list[Headline]) -> str:
    """'Of 45 problems: triton wins 31, torch-grouped wins 8, 6 ties.'"""
    won = pd.Series([name for each in verdicts if each.kind == "winner" for name in each.winners], dtype=object)
    kinds = pd.Series([each.kind for each in verdicts]).value_counts()
    words = {"tie": "ties", "undecided": "without a verdict", "alone": "with one arm", "none": "not timed"}
    said = [f"{short(str(name))} wins {count:,}" for name, count in won.value_counts().head(6).items()]
    said += [f"{kinds[kind]:,} {word}" for kind, word in words.items() if kind in kinds]
    return f"Of {len(verdicts):,} problems: {', '.join(said)}."


def _families(manifest: Manifest, rows: pd.DataFrame, marks: dict[str, str]) -> list[str]:
    found, total = family_tables(rows, manifest.joined or OURS, marks)
    if not found:
        return ["Nothing was timed."]
    same = ", ".join(f"{name} {short(value)}" for name, value in findings.constants(rows) if name != "device")
    lines = [READING, *(["", f"The same for all rows: {same}."] if same else [])]
    several = rows["replicate"].nunique()
    lines += ["", f"{several} replicates in fresh processes; the middle one is shown."] if several > 1 else []
    for each in found:
        lines += ["", f"### {short(each.title)}", "", *each.lines]
    return lines + left_out(min(total, MOST_TABLES), total, "tables")


def _ceilings(manifest: Manifest) -> list[str]:
    """What the device reached when it was measured, beside its data sheet."""
    found = manifest.ceilings or {}
    sheet = None if manifest.hardware is None else checked_row("manifest.json: hardware", manifest.hardware)
    lines = [
        (f"{name} GEMM, TFLOP/s", value, sheet.peak_tflops(name) if sheet else None)
        for name, value in (found.get("gemm_tflops") or {}).items()
    ]
    bandwidth = sheet.mem_bw_gbs if sheet else None
    lines += [(f"{name}, GB/s", found.get(f"{name}_gbs"), bandwidth) for name in ("copy", "read")]
    cells = [
        [short(name), *("—" if value is None else significant(value) for value in (measured, peak)),
         f"{significant(100 * measured / peak)} %" if measured and peak else "—"]
        for name, measured, peak in lines
        if measured or peak
    ]  # fmt: skip
    source = f"data sheet ({short(sheet.name)})" if sheet else "data sheet"
    return table(["", "measured", source, "share"], cells) if cells else []


def _energy(rows: pd.DataFrame) -> list[str]:
    found = rows[rows["energy_j_per_token"].notna() & (rows["role"] == "arm")]
    if found.empty:
        return []
    scoped = found["scope"].nunique() > 1
    cells = [_energy_cells(row, scoped) for row in found.head(MOST_ENERGY).to_dict("records")]
    sources = ", ".join(map(short, found["energy_source"].dropna().unique()))
    return [
        f"Read from {sources or 'an unnamed source'}; “per token” is a token that enters one layer.",
        "",
        *table(["", "mJ per token", "lowest–highest", "net of idle", "idle W", "second source"], cells),
        *left_out(len(cells), len(found), "rows with energy"),
    ]


def _energy_cells(row: dict[Any, Any], scoped: bool) -> list[str]:
    def number(column: str, times: float = 1e3) -> str:
        return "—" if pd.isna(row[column]) else significant(times * row[column])

    name = " · ".join([row["problem"], row["variant"], *([row["scope"]] if scoped else [])])
    trials = f"{number('energy_j_per_token_low')}–{number('energy_j_per_token_high')}"
    net, idle = number("energy_net_j_per_token"), number("energy_idle_w", 1)
    return [short(name), number("energy_j_per_token"), trials, net, idle, number("energy_second_j_per_token")]


def _scores(system: Cap) -> list[str]:
    found = findings.score_table(system)
    lines = [[short(line["variant"]), *map(_score, line["cells"])] for line in found["lines"][:MOST_REASONS]]
    reasons = {**found["missing"], **system.left_out}
    return [
        f"Ratios to {short(system.baseline)}; over 1 is better; n is the number of problems.",
        "",
        *table(["variant", *found["axes"]], lines),
        *left_out(len(lines), len(found["lines"]), "variants"),
        "",
        *(f"- {axis}: {short(reason)}." for axis, reason in reasons.items()),
    ]


def _score(cell: dict[str, Any]) -> str:
    return f"{cell['text']} (n={cell['n']})" if cell["text"] else "—"


def _troubles(rows: pd.DataFrame) -> list[str]:
    """Rows that were not timed, by status and reason; those that were checked last."""
    lines = findings.troubles(rows, rows.assign(anchor=""))
    lines += [
        {**line, "status": "verified", "reason": f"not to be timed here; checked on {line['checked_on']}"}
        for line in findings.checked(rows)
    ]
    cells = [
        [escaped(line["status"].replace("_", " ")), short(line["reason"]), f"{line['rows']:,}", short(line["variants"])]
        for line in lines[:MOST_REASONS]
    ]
    head = ["status", "reason", "rows", "arms"]
    return [*table(head, cells, "llrl"), *left_out(len(cells), len(lines), "reasons")] if lines else []


def _flags(flags: list[dict[str, Any]], marks: dict[str, str]) -> list[str]:
    cells = [
        [marks.get(line["flag"].partition(":")[0], ""), short(line["flag"]), f"{line['rows']:,}", line["meaning"]]
        for line in flags[:MOST_FLAGS]
    ]
    return (
        [*table(["", "flag", "rows", "meaning"], cells, "llrl"), *left_out(len(cells), len(flags), "flags")]
        if flags
        else []
    )


def _is_hex(text: str | None) -> bool:
    return bool(text) and all(character in "0123456789abcdef" for character in text or "")
