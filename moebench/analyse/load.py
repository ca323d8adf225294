"""results.parquet and run directories: written whole or not at all, read with clear errors."""

from __future__ import annotations

import itertools
import os
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from moebench.journal import Journal
from moebench.point import SCHEMA_VERSION
from moebench.record import COLUMNS, Manifest, Record

RESULTS = "results.parquet"
CHUNK = 1_000  # records held as Python objects at a time
ROW_GROUP = 10  # chunks written together: readers like few large groups
Item = TypeVar("Item")
_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


@dataclass(frozen=True)
class Run:
    """One run directory as read.

    Attributes:
        table: one row a record; columns are `moebench.record.COLUMNS`.
        manifest: where and how the run was made.
        path: the directory.
    """

    table: pd.DataFrame
    manifest: Manifest
    path: Path


def write_results(records: Iterable[Record], path: Path) -> None:
    """Write results.parquet atomically: the old file stands until the new one is whole.

    Raises:
        OSError: the folder is read-only or full; nothing is left behind.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with pq.ParquetWriter(partial, arrow_schema()) as writer:
            for tables in _chunks(map(_arrow_table, _chunks(records, CHUNK)), ROW_GROUP):
                writer.write_table(pa.concat_tables(tables))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def records_to_table(records: Iterable[Record]) -> pd.DataFrame:
    """The table that a results.parquet of these records would give."""
    chunks = [_arrow_table(chunk) for chunk in _chunks(records, CHUNK)] or [_arrow_table([])]
    return _pandas(pa.concat_tables(chunks))


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read several run directories.

    Raises:
        ValueError: as `load_run`, or the same run is named twice.
    """
    runs = [load_run(path) for path in paths]
    seen: dict[str, Path] = {}
    for run in runs:
        if run.manifest.run_id in seen:
            raise ValueError(f"{run.path}: the same run as {seen[run.manifest.run_id]} (run_id {run.manifest.run_id})")
        seen[run.manifest.run_id] = run.path
    return runs


def load_run(path: Path) -> Run:
    """Read a run directory: results.parquet, or the journal where the run was cut short.

    Raises:
        ValueError: not a run directory, or one of its files is damaged or of another schema version.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such run directory")
    manifest = _read_manifest(path / "manifest.json")
    results, journal = path / RESULTS, path / "journal.jsonl"
    if results.exists():
        return Run(_pandas(read_results(results)), manifest, path)
    if journal.exists():
        return Run(records_to_table(Journal(journal).stream()), manifest, path)
    raise ValueError(f"{path}: holds neither {RESULTS} nor journal.jsonl")


def arrow_schema() -> pa.Schema:
    """The fixed schema of results.parquet, derived from `Record`."""
    hints = typing.get_type_hints(Record)
    return pa.schema([(name, _arrow_type(hints[name])) for name in COLUMNS])


def _arrow_type(hint: Any) -> pa.DataType:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _arrow_type(next(arg for arg in args if arg is not type(None)))
    if origin is Literal:
        return pa.string()
    if origin is list:
        return pa.list_(_arrow_type(args[0]))
    return _ARROW[hint]


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    stream = iter(items)
    while chunk := list(itertools.islice(stream, size)):
        yield chunk


def _arrow_table(records: list[Record]) -> pa.Table:
    columns = {name: [getattr(record, name) for record in records] for name in COLUMNS}
    return pa.table(columns, schema=arrow_schema())


def _pandas(table: pa.Table) -> pd.DataFrame:
    frame: pd.DataFrame = table.to_pandas()
    return frame


def _read_manifest(path: Path) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path.parent}: not a run directory (it has no {path.name})") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "whole file"
        raise ValueError(f"{path}: {key}: {first['msg']}") from None
    if manifest.schema_version != SCHEMA_VERSION:
        raise ValueError(f"{path}: schema_version is {manifest.schema_version}; this moebench reads {SCHEMA_VERSION}")
    return manifest


def require_records(table: pa.Table, path: Path) -> None:
    """Each row is a Record: none has a number without a measurement, or a gap without a reason.

    Raises:
        ValueError: one is not; names the file `path` and the row.
    """
    number = 0
    for batch in table.to_batches(max_chunksize=1000):
        for row in batch.to_pylist():
            number += 1
            try:
                Record.model_validate(row)
            except ValidationError as error:
                first = error.errors()[0]
                place = ".".join(map(str, first["loc"]))
                raise ValueError(f"{path}: row {number}: {place}{': ' if place else ''}{first['msg']}") from None


def read_results(path: Path) -> pa.Table:
    """The columns of a results.parquet, of `arrow_schema`.

    Raises:
        ValueError: it is damaged, lacks a column or holds one of another type.
    """
    try:
        table = pq.read_table(path)
        missing = [name for name in COLUMNS if name not in table.column_names]
        if missing:
            raise ValueError(f"{path}: lacks the column {', '.join(missing)}")
        return table.select(list(COLUMNS)).cast(arrow_schema())
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a readable Parquet file of results: {reason}") from None
