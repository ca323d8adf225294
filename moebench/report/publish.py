"""Publish: run directories into folders that others may read: manifest, results, one page, figures.

A folder is built beside its place and renamed into it, so that it is there whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pyarrow.parquet as pq

from moebench.analyse import Run, load_runs
from moebench.analyse.load import RESULTS, read_results, require_records
from moebench.options import Options, resume_command
from moebench.record import Manifest
from moebench.report.figures import figures, save
from moebench.report.html import joined
from moebench.report.markdown import page, utc
from moebench.report.scrub import scrubbed
from moebench.signals import stops_on_sigterm

MANIFEST, PAGE, FIGURES = "manifest.json", "report.md", "figures"
WRITTEN = {MANIFEST, RESULTS, PAGE, FIGURES, "report.html"}  # the last by `moebench report`
DPI = 120  # figures of a few 10 kB


@dataclass(frozen=True)
class Published:
    """One published folder.

    Attributes:
        path: the folder.
        cleaned: what private text was cut from.
        dirty: whether the run was measured from a checkout with uncommitted changes.
    """

    path: Path
    cleaned: list[str]
    dirty: bool


def publish(runs: Sequence[Path], into: Path, *, replace: bool = False) -> list[Published]:
    """Write each run to `<into>/<date>-<device>-<suite>/`; nothing is written before all were found fit.

    Raises:
        ValueError: a folder is no run, not complete, checked only, damaged, or published already (see `replace`).
        OSError: `into` cannot be written.
    """
    if into.exists() and not into.is_dir():
        raise ValueError(f"{into} is a file; --into names a folder")
    loaded = [_fit(run) for run in load_runs(runs)]
    places: dict[Path, Run] = {}
    for run in sorted(loaded, key=lambda run: (_started(run), run.manifest.run_id)):
        places[_place(run, into, replace, taken=set(places))] = run
    into.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(into)
    with stops_on_sigterm():
        return [_published(run, folder) for folder, run in places.items()]


def _fit(run: Run) -> Run:
    """The run, if it is one to publish."""
    manifest, results = run.manifest, run.path / RESULTS
    if manifest.check_only:
        raise ValueError(f"{run.path}: was run with --check-only, so nothing in it is measured")
    if manifest.finished != "complete" or not results.exists():
        state = "is not finished" if manifest.finished != "complete" else f"has no {RESULTS}"
        raise ValueError(f"{run.path}: {state}; go on with:  {_go_on(run)}")
    if run.table.empty:
        raise ValueError(f"{run.path}: {RESULTS} has no rows")
    require_records(read_results(results), results)
    strangers = set(run.table["run_id"]) - {manifest.run_id}
    if strangers:
        raise ValueError(f"{run.path}: {RESULTS} holds rows of another run ({min(strangers)!r:.40})")
    return run


def _go_on(run: Run) -> str:
    if not run.manifest.command.startswith("moebench "):
        return f'moebench.api.run(..., out="{run.path}", resume=True)'
    return resume_command(Options(run.path, command=run.manifest.command))


# Names


def folder_name(manifest: Manifest) -> str:
    """`<date>-<device>-<suite>`; the device once where the suite's name begins with it.

    Raises:
        ValueError: `started_at` is no time.
    """
    device, suite = _device_slug(manifest), _slug(manifest.suite, "suite")
    suite = suite.removeprefix(f"{device}-") if suite != device else ""
    return "-".join(part for part in (utc(manifest.started_at).date().isoformat(), device, suite) if part)


def _device_slug(manifest: Manifest) -> str:
    """`h200` of H200-SXM-141GB, `rtx-4090` of RTX-4090; of a device without a data-sheet row its whole name."""
    row = str((manifest.hardware or {}).get("name") or "")
    parts = _slug(row, "").split("-")
    known = parts[0] if any(map(str.isdigit, parts[0])) else "-".join(parts[:2])
    return known or _slug(manifest.device, "device")


def _slug(text: str, otherwise: str) -> str:
    """Lower-case letters, digits and single hyphens; never a path."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].strip("-") or otherwise


def _started(run: Run) -> datetime:
    try:
        return utc(run.manifest.started_at)
    except (ValueError, OverflowError):
        raise ValueError(f"{run.path / MANIFEST}: started_at: {run.manifest.started_at!r:.60} is no time") from None


def _place(run: Run, into: Path, replace: bool, taken: set[Path]) -> Path:
    """Where the run goes: a second run of that day gets a number, since it must not displace what it is compared with.

    Raises:
        ValueError: it is there already and is not to be replaced, or something else is.
    """
    base = folder_name(run.manifest)
    there = [path for path in into.glob(f"{base}*") if re.fullmatch(r"(-\d+)?", path.name.removeprefix(base))]
    own = next((path for path in sorted(there) if _run_id(path) == run.manifest.run_id), None)
    if own is not None:
        return _replaceable(run, own, replace)
    number = 1
    while (path := into / (base if number == 1 else f"{base}-{number}")) in taken or os.path.lexists(path):
        if path not in taken and _run_id(path) is None:
            raise ValueError(f"{run.path}: {path} is in the way, and it is no published run")
        number += 1
    return path


def _replaceable(run: Run, own: Path, replace: bool) -> Path:
    if not replace:
        raise ValueError(f"{run.path}: is published already as {own}; --replace writes it again")
    strangers = sorted(set(os.listdir(own)) - WRITTEN)
    if strangers:
        raise ValueError(f"{run.path}: {own} also holds {strangers[0]!r}, which --replace would lose; move it away")
    return own


def _run_id(path: Path) -> str | None:
    """Of a published folder; None of anything else."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    published = isinstance(manifest, dict) and manifest.get("published") is not None and not path.is_symlink()
    return str(manifest.get("run_id")) if published else None


# Files


def _published(run: Run, folder: Path) -> Published:
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        manifest = _write(run, partial)
        _move(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Published(folder, manifest.published or [], bool(manifest.git_dirty))


def _write(run: Run, folder: Path) -> Manifest:
    (folder / FIGURES).mkdir(parents=True)
    manifest, table = scrubbed(run.manifest, read_results(run.path / RESULTS))
    (folder / MANIFEST).write_text(json.dumps(manifest.model_dump(), indent=2) + "\n", encoding="utf-8")
    pq.write_table(table, folder / RESULTS, compression="zstd")
    _write_page(Run(table.to_pandas(), manifest, folder), folder)
    return manifest


def _write_page(run: Run, folder: Path) -> None:
    rows, (system,) = joined([run], None)
    images = {}
    for kind, figure in figures(rows, run, system):
        (path,) = save(figure, folder / FIGURES / kind, ("png",), DPI)
        images[kind] = f"{FIGURES}/{path.name}"
    if not images:
        (folder / FIGURES).rmdir()
    (folder / PAGE).write_text(page(run, rows, system, images), encoding="utf-8")


def _move(partial: Path, folder: Path) -> None:
    """Put it in its place; what stood there goes when that has worked."""
    if not os.path.lexists(folder):
        partial.rename(folder)
        return
    old = partial.with_suffix(".replaced")
    folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def _remove_leftovers(into: Path) -> None:
    """What a killed `publish` left half-written."""
    for path in into.glob(".*.partial"):
        number = path.suffixes[-2].lstrip(".") if len(path.suffixes) > 1 else ""
        if number.isdigit() and not Path(f"/proc/{number}").exists() and Path("/proc/self").exists():
            shutil.rmtree(path, ignore_errors=True)
