"""The published runs: every folder of reports/, read, checked and put in order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from moebench.analyse import Run, load_runs
from moebench.analyse.load import RESULTS, read_results, require_records
from moebench.analyse.names import BLOCK
from moebench.record import Manifest


@dataclass(frozen=True)
class Published:
    """One published run.

    Attributes:
        when: when it began.
        counts: whether it is the newest of its suite, device and shard: tables are made of those only.
    """

    run: Run
    when: datetime
    counts: bool

    @property
    def manifest(self) -> Manifest:
        """Where and how it was made."""
        return self.run.manifest


def read_published(reports: Path) -> list[Published]:
    """Every folder under `reports`, newest first; hidden ones are left alone.

    Raises:
        ValueError: a folder is no run, was not published, is damaged or holds the rows of another run; a run stands
            there twice.
    """
    if not reports.is_dir():
        raise ValueError(f"{reports}: no such folder")
    folders = sorted(entry for entry in reports.iterdir() if entry.is_dir() and not entry.name.startswith((".", "_")))
    runs = load_runs(folders)
    for run in runs:
        if run.manifest.published is None:  # and may tell of the machine and of its owner
            raise ValueError(f"{run.path}: was not written by `moebench publish`")
        _require_own_records(run)
    dated = sorted(((_when(run), run.manifest.run_id, run) for run in runs), key=lambda each: each[:2], reverse=True)
    seen: set[tuple[object, ...]] = set()
    found = []
    for when, _, run in dated:
        key = (run.manifest.suite, run.manifest.device, run.manifest.shard)
        found.append(Published(run, when, key not in seen))
        seen.add(key)
    return found


def _when(run: Run) -> datetime:
    text = run.manifest.started_at
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{run.path / 'manifest.json'}: started_at is {text[:40]!r}, which is no date") from None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _require_own_records(run: Run) -> None:
    """Each row is a record, with no number where nothing was measured, and of this manifest's run and device."""
    path = run.path / RESULTS
    if not path.exists():
        raise ValueError(f"{run.path}: has no {RESULTS}")
    require_records(read_results(path), path)
    own = (run.table["run_id"] == run.manifest.run_id) & (run.table["device"] == run.manifest.device)
    if not own.all():
        number = 1 + int(own.to_numpy().argmin())
        raise ValueError(f"{path}: row {number} is of another run or device than manifest.json")


def counting(published: Iterable[Published], device: str, suites: Sequence[str]) -> list[Published]:
    """The runs that tables of these suites on this device are made of, newest first."""
    return [each for each in published if each.counts and each.manifest.device == device
            and each.manifest.suite in suites]  # fmt: skip


def gpus(published: Iterable[Published]) -> list[str]:
    """Names of the GPUs with a run that counts, in the order of the alphabet."""
    return sorted({each.manifest.device for each in published if each.manifest.device_kind == "cuda"})


def rows_of(published: Sequence[Published]) -> pd.DataFrame:
    """Their rows, one table with a fresh index, and `block`: rows of one number were sampled together."""
    table = pd.concat([each.run.table for each in published], ignore_index=True)
    return table.assign(block=table.groupby(BLOCK, sort=False, dropna=False).ngroup())


def commands(published: Iterable[Published]) -> list[str]:
    """What repeats these runs, each command once, oldest name first."""
    return sorted({command(each.manifest) for each in published})


def command(manifest: Manifest) -> str:
    """What repeats a run, made of its suite and options, without the folders of the machine it was made on."""
    words = [f"moebench run suite {manifest.suite}"]
    words += [f"--set {axis}={','.join(map(str, values))}" for axis, values in manifest.overrides.items()]
    words += [f"--provider {','.join(manifest.joined)}"] if manifest.joined else []
    words += ["--shard {}/{}".format(*manifest.shard)] if manifest.shard != (1, 1) else []
    words += ["--check-only"] if manifest.check_only else []
    return code(" ".join(words))


def code(text: str) -> str:
    """Text as code, in a table too: what could end the code, the cell or the block becomes a question mark."""
    return f"`{re.sub(r'[^ -~]|[`|<>]', '?', ' '.join(text.split()))}`"


def made_with(published: Sequence[Published]) -> str:
    """Date, torch, triton and commit of runs, each value once: `2026-11-27, torch 2.11, triton 3.6, commit 1a2b`."""
    manifests = [each.manifest for each in published]
    parts = [_joined(f"{each.when:%Y-%m-%d}" for each in published)]
    parts += [f"{name} {_joined(each.versions.get(name) or 'unknown' for each in manifests)}"
              for name in ("torch", "triton")]  # fmt: skip
    return ", ".join([*parts, f"commit {_joined(commit(each) for each in manifests)}"])


def commit(manifest: Manifest) -> str:
    """Ten digits of the commit; with `+ changes` where the tree had some, `as stated` where nobody looked."""
    if manifest.git_commit is None:
        return "unknown"
    state = {True: " + changes", False: "", None: " (as stated)"}[manifest.git_dirty]
    return manifest.git_commit[:10] + state


def _joined(values: Iterable[str]) -> str:
    return " and ".join(sorted(set(values)))
