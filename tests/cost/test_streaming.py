"""Memory: a run of many points holds one block and a few bytes for each point, and loses nothing by it."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from moebench_suites.harness_cost import Straw, straw_suite

import moebench.analyse.load
from moebench.analyse.load import load_run, records_to_table, write_results
from moebench.journal import Journal, Keys
from moebench.options import Options
from moebench.run import Outcome, run_suite
from moebench.suite import load_suite

FEW, MANY = 400, 2_400
BYTES_A_POINT = 1_000  # of Python objects above the smaller run's; a record alone is some 10,000


def straw_run(folder: Path, points: int) -> Outcome:
    folder.mkdir()
    return run_suite(load_suite([str(straw_suite(folder, points))]), Options(folder / "run"), start=Short)


class Short(Straw):
    """Few samples, so that the test is quick."""

    def __init__(self, *_: object) -> None:
        super().__init__()
        self.replies["burst"] = {"device_ms": [1.0] * 2, "wall_ms": [1.0] * 2}


def peak_bytes(folder: Path, points: int) -> tuple[int, Outcome]:
    tracemalloc.start()
    try:
        outcome = straw_run(folder, points)
        return tracemalloc.get_traced_memory()[1], outcome
    finally:
        tracemalloc.stop()


def test_memory_hardly_grows_with_the_number_of_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moebench.analyse.load, "CHUNK", 100)  # else the smaller run is one chunk
    straw_run(tmp_path / "warm", FEW)  # imports and caches
    few, _ = peak_bytes(tmp_path / "few", FEW)
    many, outcome = peak_bytes(tmp_path / "many", MANY)
    assert many - few < BYTES_A_POINT * (MANY - FEW)
    assert outcome.counts == Counter(measured=MANY)
    table = load_run(outcome.path).table
    assert len(table) == MANY + 3 * MANY // 4
    assert not table.duplicated(["point_id", "replicate"]).any()


def test_streamed_and_whole_reading_agree(tmp_path: Path) -> None:
    outcome = straw_run(tmp_path / "one", 40)
    journal = Journal(outcome.path / "journal.jsonl")
    whole = list({(record.point_id, record.replicate): record for record in journal.lines()}.values())
    assert list(journal.stream()) == journal.read() == whole
    written = pd.read_parquet(outcome.path / "results.parquet")
    pd.testing.assert_frame_equal(written, records_to_table(whole))


def test_of_what_was_written_again_the_last_is_streamed(tmp_path: Path) -> None:
    journal = Journal(straw_run(tmp_path / "one", 40).path / "journal.jsonl")
    records = journal.read()
    again = [record.model_copy(update={"suite": "again"}) for record in records[5:20]]
    journal.append(again[:9])
    journal.append([record.model_copy(update={"suite": "and again"}) for record in again[4:]])
    found = journal.read()
    assert len(found) == len(records)
    assert {(record.point_id, record.suite) for record in found} == {
        (record.point_id, "and again" if 9 <= n < 20 else "again" if 5 <= n < 9 else record.suite)
        for n, record in enumerate(records)
    }
    assert len(journal.keys()) == len(records)


@pytest.mark.parametrize(("chunk", "group"), [(1, 1), (3, 2), (70, 1), (1_000, 10)])
def test_a_table_is_the_same_however_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, group: int
) -> None:
    records = Journal(straw_run(tmp_path / "one", 40).path / "journal.jsonl").read()
    monkeypatch.setattr(moebench.analyse.load, "CHUNK", chunk)
    monkeypatch.setattr(moebench.analyse.load, "ROW_GROUP", group)
    write_results(iter(records), tmp_path / "table.parquet")
    found: Any = pd.read_parquet(tmp_path / "table.parquet")
    assert list(found["point_id"]) == [record.point_id for record in records]


def test_a_table_of_nothing_has_its_columns(tmp_path: Path) -> None:
    write_results(iter(()), tmp_path / "table.parquet")
    assert len(pd.read_parquet(tmp_path / "table.parquet")) == 0


def test_keys_know_what_they_hold() -> None:
    keys = Keys((f"{number:016x}", number % 3) for number in range(1000))
    assert len(keys) == 1000
    assert all((f"{number:016x}", number % 3) in keys for number in range(1000))
    assert not any((f"{number:016x}", 1 + number % 3) in keys for number in range(1000))
    assert Keys([("a", 0), ("a", 0)]) <= Keys([("b", 0), ("a", 0)])
    assert not Keys([("a", 1)]) <= Keys([("b", 0), ("a", 0)])
    assert ("a", 0) not in Keys()
    assert Keys() <= Keys()
