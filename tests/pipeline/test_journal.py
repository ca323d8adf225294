"""The journal: whole blocks or nothing, whatever cuts the writing."""

import errno
import os
import resource
import subprocess
import sys

import pytest
from pipeline.tiny import environment

from moebench.journal import Journal
from moebench.record import Record

IDENTITY = {
    "run_id": "r", "block_id": "b", "suite": "s", "model": "custom", "provider": "torch-loop", "scope": "layer",
    "direction": "forward", "device": "Straw", "precision": "fp32", "tokens": 4, "hidden_size": 16,
    "expert_ffn_size": 8, "routed_experts": 4, "top_k": 2, "router": "softmax_topk", "traffic": "uniform",
}  # fmt: skip


def record(point_id, **changes):
    return Record(**{**IDENTITY, "point_id": point_id, "status": "failed", "reason": "no", **changes})


def measured(point_id, samples):
    return record(point_id, status="measured", reason=None, timer="t", latency_ms=samples[0], samples_ms=samples)


def block(*names):
    return [record(name) for name in names]


def ids(journal):
    return [each.point_id for each in journal.read()]


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "journal.jsonl")


def test_what_is_written_is_read(journal):
    written = [measured("a", [1.25, 1 / 3]), *block("b")]
    journal.append(written)
    journal.append(block("c"))
    assert journal.read() == [*written, *block("c")]
    assert Journal(journal.path).read() == journal.read()


def test_nothing_is_there_before_the_first_block(journal):
    assert journal.read() == []
    journal.append([])
    assert not journal.path.exists()


def test_text_of_any_kind_survives(journal):
    reason = 'two\nlines, \u2028 separators, \x00, "quotes", \U0001f600'
    journal.append([record("a", reason=reason)])
    assert [each.reason for each in journal.read()] == [reason]
    assert journal.path.read_bytes().count(b"\n") == 1


def test_the_last_record_of_a_point_stands(journal):
    journal.append([record("a", reason="first"), record("a", replicate=1, reason="other")])
    journal.append([record("a", reason="second")])
    assert [(each.reason, each.replicate) for each in journal.read()] == [("other", 1), ("second", 0)]


def test_a_cut_at_any_byte_of_the_last_line_loses_that_line_only_and_is_healed(journal):
    journal.append(block("a", "b"))
    whole = journal.path.read_bytes()
    start = whole.index(b"\n") + 1
    for end in (start, start + 1, (start + len(whole)) // 2, len(whole) - 1):
        journal.path.write_bytes(whole[:end])
        assert ids(journal) == ["a"]
        assert journal.path.read_bytes() == whole[:end], "reading changes nothing"
        journal.append(block("c"))
        assert ids(journal) == ["a", "c"]


def test_a_torn_line_longer_than_one_read_is_healed(journal):
    journal.append(block("a"))
    with journal.path.open("ab") as file:
        file.write(b"x" * 200_000)
    journal.append(block("b"))
    assert ids(journal) == ["a", "b"]


def test_a_journal_that_is_one_torn_line_is_healed(journal):
    journal.path.write_bytes(b'{"run_id": "')
    assert journal.read() == []
    journal.append(block("a"))
    assert ids(journal) == ["a"]


@pytest.mark.parametrize("garbage", [b"garbage", b"", b"\x00" * 64, b"\xff\xfe", b"{}", b"null", b'{"run_id": "r"}'])
def test_damage_before_the_last_line_is_named_never_skipped(journal, garbage):
    journal.append(block("a", "b", "c"))
    lines = journal.path.read_bytes().split(b"\n")
    journal.path.write_bytes(b"\n".join([lines[0], garbage, *lines[2:]]))
    with pytest.raises(ValueError, match=r"journal\.jsonl: line 2 is not a record: ") as error:
        journal.read()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_leaves_whole_blocks(journal, monkeypatch, call):
    """Where the disk fills up in the middle of a block, what stood before stays and nothing else does."""
    journal.append(block("a"))
    real = os.fsync

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            journal.append(block("b", "c"))
    else:
        limited(journal, journal.path.stat().st_size + len(record("b").model_dump_json(exclude_none=True)) + 10)
    monkeypatch.setattr(os, "fsync", real)
    assert ids(journal) == ["a"]
    assert journal.path.read_bytes().endswith(b"}\n")
    journal.append(block("d"))
    assert ids(journal) == ["a", "d"]


def limited(journal, size):
    """Append the block (b, c) in a process whose files cannot grow past `size` bytes."""
    program = (
        "import sys; from pathlib import Path\n"
        "from moebench.journal import Journal; from moebench.record import Record\n"
        "records = [Record.model_validate_json(line) for line in sys.stdin]\n"
        "try: Journal(Path(sys.argv[1])).append(records)\n"
        "except OSError as error: print(error.strerror)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(journal.path)],
        input="\n".join(each.model_dump_json() for each in block("b", "c")),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        capture_output=True, text=True, check=True, env=environment(),
    )  # fmt: skip
    assert done.stdout == "File too large\n"


def test_a_block_is_synced_whole_before_append_returns(journal, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_size), real(descriptor)))
    journal.append(block("a", "b"))
    assert synced == [journal.path.stat().st_size]
