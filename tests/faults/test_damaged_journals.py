"""A journal that is torn or repeats itself is gone on with; one that is damaged is refused, and says how to mend it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from faults.fault_checks import PER_BLOCK, complete, contents, second_block
from pipeline.tiny import records

from moebench.analyse.load import load_run


@pytest.fixture
def journal(tmp_path, crew, go) -> Path:
    """Of a run that was stopped in its second block of three, gone on with and stopped in its third."""
    for stop_at in (8, 16):
        crew.cues["torch-bmm", "burst"] = lambda tokens=stop_at: stop(crew, tokens)
        assert go(resume=stop_at == 16).interrupted
    crew.cues.clear()
    path = tmp_path / "run" / "journal.jsonl"
    assert len(path.read_bytes().splitlines()) == 2 * PER_BLOCK
    return path


def stop(crew, tokens):
    if crew.asked("open")[-1].arguments["problem"]["tokens"] == tokens:
        raise KeyboardInterrupt
    return {}


def changed(line, **values):
    return json.dumps(json.loads(line) | values).encode()


def without(line, key):
    return json.dumps({name: value for name, value in json.loads(line).items() if name != key}).encode()


# What is mended without a word


MENDED = {
    "a last line cut short": lambda lines: [*lines[:-1], lines[-1][:40]],
    "a last line cut before its end": lambda lines: [*lines[:-1], lines[-1][:-1]],
    "a last line of binary garbage": lambda lines: [*lines, bytes(range(14, 256)) * 40],
    "a last line of nothing but zeros": lambda lines: [*lines, b"\x00" * 4096],
    "a line twice": lambda lines: [*lines[:3], *lines[2:], b""],
    "every line twice": lambda lines: [line for line in lines for _ in (1, 2)] + [b""],
    "a block again at the end": lambda lines: [*lines, *lines[:PER_BLOCK], b""],
}


@pytest.mark.parametrize("damage", MENDED)
def test_a_torn_or_repeated_line_costs_nothing_else(tmp_path, crew, go, journal, damage):
    before = records(journal.parent)
    lines = journal.read_bytes().splitlines()
    journal.write_bytes(b"\n".join(MENDED[damage](lines)))
    found = records(journal.parent)
    assert {repr(row) for row in found} <= {repr(row) for row in before}, "nothing is invented"
    assert len(found) >= len(before) - 1
    assert go(resume=True).exit_code == 0
    rows = complete(tmp_path / "run", blocks=3, kept=before[:PER_BLOCK])
    assert {row.status for row in rows} == {"measured"}
    if len(found) == len(before):
        assert all(row in rows for row in before)


def test_a_repeated_line_with_another_number_stands_as_last_written(tmp_path, crew, go, journal):
    """So does a block that was measured twice, which is how a half-written one is gone on with."""
    lines = journal.read_bytes().splitlines()
    again = changed(lines[0], latency_ms=7.0)
    journal.write_bytes(b"\n".join([*lines, again, b""]))
    assert go(resume=True).exit_code == 0
    rows = complete(tmp_path / "run", blocks=3)
    assert [row.latency_ms for row in rows if row.point_id == json.loads(again)["point_id"]] == [7.0]


# What is refused


GARBAGE = {
    "binary": lambda line: bytes(byte for byte in range(256) if byte != 10) * 20,
    "half a line": lambda line: line[: len(line) // 2],
    "half a line with the next one glued to it": lambda line: line[: len(line) // 2] + line,
    "two records glued": lambda line: line + line,
    "zeros": lambda line: b"\x00" * 512,
    "zeros inside": lambda line: line[:50] + b"\x00" * 8 + line[58:],
    "nothing": lambda line: b"",
    "five megabytes": lambda line: b"x" * 5_000_000,
    "deep nesting": lambda line: b"[" * 100_000,
    "a column of another schema": lambda line: changed(line, flops_per_joule=1.0),
    "a column that is missing": lambda line: without(line, "status"),
    "a number that is text": lambda line: changed(line, tokens="many"),
    "a number that is none": lambda line: line.replace(b'"latency_ms":1.0', b'"latency_ms":NaN'),
    "an unknown status": lambda line: changed(line, status="fine"),
    "a number without a measurement": lambda line: changed(line, status="failed", reason="no"),
    "a list": lambda line: b"[" + line + b"]",
    "not UTF-8": lambda line: line.replace(b"torch-", b"torch\xff\xfe"),
}


@pytest.mark.parametrize("damage", GARBAGE)
def test_damage_in_the_middle_is_named_and_mended_by_deleting_that_line(tmp_path, crew, go, journal, damage):
    lines = journal.read_bytes().splitlines()
    place = 1  # an arm of the first block
    kept = records(journal.parent)
    damaged = GARBAGE[damage](lines[place])
    assert damaged != lines[place]
    journal.write_bytes(b"\n".join([*lines[:place], damaged, *lines[place + 1 :], b""]))
    (journal.parent / "results.parquet").unlink()  # as kill -9 leaves it: a report has to read the journal
    opened, before = len(crew.asked("open")), contents(journal.parent)
    for act in (lambda: go(resume=True), lambda: load_run(journal.parent)):
        with pytest.raises(ValueError, match=f"journal.jsonl: line {place + 1} is not a record: ") as refused:
            act()
        said = str(refused.value)
        assert said.endswith("; delete its line and go on with --resume, or start in another --out")
        assert "\n" not in said
        assert len(said) < 600
    assert contents(journal.parent) == before
    assert len(crew.asked("open")) == opened, "nothing is measured"
    number = int(re.search(r"line (\d+) ", said).group(1))
    mended = [line for index, line in enumerate(journal.read_bytes().split(b"\n"), 1) if index != number]
    journal.write_bytes(b"\n".join(mended))
    assert go(resume=True).exit_code == 0
    complete(tmp_path / "run", blocks=3, kept=kept[PER_BLOCK:])


def test_a_refused_journal_leaves_the_table_of_the_session_before(tmp_path, crew, go, journal):
    lines = journal.read_bytes().splitlines()
    journal.write_bytes(b"\n".join([lines[0][:30], *lines[1:], b""]))
    table = (journal.parent / "results.parquet").read_bytes()
    with pytest.raises(ValueError, match="line 1 is not a record"):
        go(resume=True)
    assert (journal.parent / "results.parquet").read_bytes() == table


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"run_id": "0123456789ab"}, "is of another run, 0123456789ab; delete its line"),
        ({"point_id": "0123456789abcdef"}, "0123456789abcdef is not in the suite; delete its line"),
        ({"replicate": 3}, "is not in the suite; delete its line"),
    ],
)
def test_a_record_that_is_not_of_this_run_is_refused(tmp_path, crew, go, journal, values, says):
    lines = journal.read_bytes().splitlines()
    journal.write_bytes(b"\n".join([*lines[:7], changed(lines[6], **values), *lines[7:], b""]))
    before = contents(journal.parent)
    with pytest.raises(ValueError, match=says):
        go(resume=True)
    assert contents(journal.parent) == before
    journal.write_bytes(b"\n".join([*lines, b""]))
    assert go(resume=True).exit_code == 0
    assert not second_block(crew), "the second block was whole"
