"""The run directory: who may write it, how it begins, resumes and ends. No torch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from moebench.catalogue.hardware import checked_row
from moebench.journal import Journal
from moebench.point import SCHEMA_VERSION
from moebench.record import Manifest

MANIFEST, JOURNAL, RESULTS, LOCK, LOG = "manifest.json", "journal.jsonl", "results.parquet", "lock", "worker.log"
OWN_FILES = {MANIFEST, JOURNAL, RESULTS, LOCK, LOG, "report.html"}


class RunDirectoryError(ValueError):
    """The folder cannot be used; the message says why and what to do."""


class RunDirectory:
    """One folder, one writer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = Journal(path / JOURNAL)

    @property
    def log(self) -> Path:
        """Where workers' stderr goes."""
        return self.path / LOG

    @property
    def results(self) -> Path:
        """The tidy table."""
        return self.path / RESULTS

    @contextlib.contextmanager
    def opened(self, *, resume: bool) -> Iterator[Manifest | None]:
        """Create or enter the folder and lock it; gives the manifest to resume from, or None for a fresh start.

        Raises:
            RunDirectoryError: it holds something else, is in use, or cannot be written.
        """
        self._make()
        if not resume and not all(self._is_leftover(entry.name) for entry in self.path.iterdir()):
            hint = "use --resume to go on with it, or another --out" if self._is_run() else "choose another --out"
            raise RunDirectoryError(f"{self.path} exists and is not empty; {hint}")
        if resume and self._is_run():
            self._read_manifest()  # what is refused for what it says is left without a lock file
        with self._lock():
            strangers = sorted(entry.name for entry in self.path.iterdir() if not self._is_own(entry.name))
            if resume and not self._is_run() and strangers:
                raise RunDirectoryError(f"{self.path} is not a run directory (it holds {strangers[0]!r})")
            yield self._read_manifest() if self._is_run() else None

    def write_manifest(self, manifest: Manifest) -> None:
        """Durably, whole or not at all."""
        text = json.dumps(manifest.model_dump(), indent=2) + "\n"
        partial = self.path / f"{MANIFEST}.partial"
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path / MANIFEST)

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise RunDirectoryError(f"{self.path} is a file; --out names a folder") from None
        except OSError as error:
            raise RunDirectoryError(f"{self.path} cannot be created: {error.strerror}") from None

    def _is_run(self) -> bool:
        return (self.path / MANIFEST).exists()

    @staticmethod
    def _is_own(name: str) -> bool:
        return name in OWN_FILES or name.endswith(".partial")

    @staticmethod
    def _is_leftover(name: str) -> bool:
        """Whether a run that was refused before it had a manifest leaves such a file; it holds nothing to lose."""
        return name in (LOCK, LOG) or name.endswith(".partial")

    def _read_manifest(self) -> Manifest:
        try:
            manifest = Manifest.model_validate_json((self.path / MANIFEST).read_bytes())
        except ValueError as error:
            first = str(error).splitlines()[0]
            raise RunDirectoryError(f"{self.path / MANIFEST} is damaged ({first}); start in another --out") from None
        if manifest.schema_version != SCHEMA_VERSION:
            schemas = f"of schema {manifest.schema_version}, and this moebench goes on with {SCHEMA_VERSION}"
            raise RunDirectoryError(f"{self.path / MANIFEST} is {schemas}; start in another --out")
        if manifest.published is not None:
            raise RunDirectoryError(f"{self.path} is a published copy, which has no journal; resume the run itself")
        if manifest.machine.get("available_bytes") is None:  # which says how blocks were split
            raise RunDirectoryError(f"{self.path / MANIFEST} lacks machine.available_bytes; start in another --out")
        if manifest.hardware is not None:
            checked_row(f"{self.path / MANIFEST}: hardware", manifest.hardware)
        return manifest

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunDirectoryError(f"{self.path} cannot be written: {error.strerror}") from None
        try:
            self._claim(descriptor)
            yield
        finally:
            os.close(descriptor)

    def _claim(self, descriptor: int) -> None:
        try:
            # Held by the process, so a killed run leaves no stale lock behind.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunDirectoryError(f"{self.path} is being written by another run") from None


def newest_unfinished(folder: Path, prefix: str) -> Path | None:
    """The newest run directory under `folder` whose name starts with `prefix` and that is not complete."""
    for path in sorted(folder.glob(f"{prefix}-*"), reverse=True):
        manifest = path / MANIFEST
        if path.is_dir() and (not manifest.exists() or b'"finished": "complete"' not in manifest.read_bytes()):
            return path
    return None
