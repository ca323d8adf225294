"""The journal of a run: a block's records are appended and fsynced together, and read back as a stream. No torch.

A torn last line (a write cut by a kill) is recognised and dropped; damage anywhere else is an error, since
silence would lose points. However long the journal is, a reader holds one record and 8 bytes for each line.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from moebench.record import Record

# Nothing is lost by it: a block of which a line is missing is measured again.
REPAIR = "delete its line and go on with --resume, or start in another --out"
Model = TypeVar("Model", bound=BaseModel)


class Key(BaseModel):
    """What makes a line one of its kind."""

    point_id: str
    replicate: int = 0


class Keys:
    """(point_id, replicate) of many records, in 8 bytes each: two fall together as rarely as two point_ids do."""

    def __init__(self, keys: Iterable[tuple[str, int]] = ()) -> None:
        self.hashes = np.unique(_hashes(keys))

    def __contains__(self, key: tuple[str, int]) -> bool:
        place = int(np.searchsorted(self.hashes, hash(key)))
        return place < len(self.hashes) and int(self.hashes[place]) == hash(key)

    def __len__(self) -> int:
        return len(self.hashes)

    def __le__(self, other: Keys) -> bool:
        return bool(np.isin(self.hashes, other.hashes).all())


class Journal:
    """journal.jsonl."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Record]:
        """What `stream` gives, at once."""
        return list(self.stream())

    def stream(self) -> Iterator[Record]:
        """Each point and replicate once, in the order written; of one that was written again, the last stands.

        Raises:
            ValueError: a line before the last is not a record.
        """
        keys = _hashes((key.point_id, key.replicate) for key in self._parsed(Key))
        stands = np.zeros(len(keys), dtype=bool)
        stands[len(keys) - 1 - np.unique(keys[::-1], return_index=True)[1]] = True
        for record, last in zip(self.lines(), stands, strict=False):  # a run may still be adding lines
            if last:
                yield record

    def keys(self) -> Keys:
        """Which points and replicates it holds.

        Raises:
            ValueError: a line before the last has no key.
        """
        return Keys((key.point_id, key.replicate) for key in self._parsed(Key))

    def lines(self) -> Iterator[Record]:
        """Every whole line, repeats too.

        Raises:
            ValueError: a line before the last is not a record.
        """
        return self._parsed(Record)

    def append(self, records: list[Record]) -> None:
        """Write the records of one block durably, all or none, after the last whole line."""
        if not records:
            return
        text = "".join(record.model_dump_json(exclude_none=True) + "\n" for record in records)
        # Unbuffered: a buffer that could not be written would be tried again on closing, behind what is taken back.
        with self.path.open("ab", buffering=0) as file:
            start = self._end_of_whole_lines()
            file.truncate(start)
            try:
                left = memoryview(text.encode())
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                # A full disk can leave half a block: take it back, so that the journal stays whole.
                file.truncate(start)
                raise

    def _parsed(self, model: type[Model]) -> Iterator[Model]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return  # torn: it can only be the last
                try:
                    parsed = model.model_validate_json(line)
                except ValidationError as error:
                    what = error.errors()[0]["msg"]
                    raise ValueError(f"{self.path}: line {number} is not a record: {what}; {REPAIR}") from None
                yield parsed

    def _end_of_whole_lines(self) -> int:
        with self.path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            while end > 0:
                start = max(0, end - 65536)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    return start + newline + 1
                end = start
        return 0


def _hashes(keys: Iterable[tuple[str, int]]) -> np.ndarray:
    return np.fromiter(map(hash, keys), dtype=np.int64)
