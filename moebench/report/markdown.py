"""A short summary in Markdown: the verdicts and the CAP ratios."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from moebench.analyse import Run, headlines, load_runs
from moebench.analyse.cap import Cap
from moebench.report import findings
from moebench.report.html import joined

MOST = 50  # verdicts


def write_markdown(runs: Sequence[Path], out: Path, *, baseline: str | None = None) -> Path:
    """Write the summary of these run directories to the file `out`.

    Raises:
        ValueError: a directory is not a run, or the baseline was never measured.
    """
    loaded = load_runs(runs)
    table, systems = joined(loaded, baseline)
    parts = []
    for run, system in zip(loaded, systems, strict=True):
        rows = table[table["run_id"] == run.manifest.run_id]
        parts.append(_title(run))
        verdicts = headlines(rows)
        parts += [f"- **{escaped(verdict.problem)}**: {escaped(verdict.sentence)}" for verdict in verdicts[:MOST]]
        parts += [f"- and {len(verdicts) - MOST:,} more"] if len(verdicts) > MOST else []
        parts += ["", *_scores(system)] if system else ["", "Nothing was timed."]
        parts.append("")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    return out


def escaped(text: str) -> str:
    """Text that Markdown and the HTML inside it leave as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _title(run: Run) -> str:
    manifest = run.manifest
    counts = ", ".join(f"{count:,} {status.replace('_', ' ')}" for status, count in findings.counts(run.table))
    heading = f"# {escaped(manifest.suite)} on {escaped(manifest.device)}"
    return f"{heading}\n\n{escaped(manifest.started_at[:16].replace('T', ' '))} · {counts or 'no rows'}\n"


def _scores(system: Cap) -> list[str]:
    found = findings.score_table(system)
    lines = [f"Ratios to {escaped(system.baseline)}; over 1 is better; n is the number of problems.", ""]
    lines.append("| variant | " + " | ".join(found["axes"]) + " |")
    lines.append("|---" + "|---:" * len(found["axes"]) + "|")
    for line in found["lines"]:
        cells = [f"{cell['text']} (n={cell['n']})" if cell["text"] else "—" for cell in line["cells"]]
        lines.append(f"| {escaped(line['variant'])} | " + " | ".join(cells) + " |")
    reasons = {**found["missing"], **system.left_out}
    return [*lines, "", *(f"- {axis}: {escaped(reason)}." for axis, reason in reasons.items())]
