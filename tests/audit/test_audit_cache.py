"""Facts are kept by the hash of all that decides them: a change is compiled again, all else is not."""

import json

import pytest

from moebench.audit.cache import Cache, cache_folder
from moebench.audit.run import Request, audit

FILE = """
import triton
import triton.language as tl
from moebench_kernels.build import Build

@triton.jit
def twice(x):
    return x * 2.0

@triton.jit
def scale(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, twice(tl.load(x_ptr + at)))

@triton.jit
def other(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at))

def build(name, kernel, block, more=(), **options):
    types = {"x_ptr": "*fp32", "y_ptr": "*fp32"} | dict(more)
    return Build(name, kernel, types, {"BLOCK": block}, ("gfx942",), **options)

def builds():
    return [
        build("called", scale, 128),
        build("same", other, 128),
        build("constant", other, 256),
        build("warps", other, 512, num_warps=4),
        build("stages", other, 1024, num_stages=3),
        build("unaligned", other, 2048, unaligned=()),
        build("type", other, 4096, {"x_ptr": "*fp32"}),
        build("broken", other, 100),
    ]
"""
CHANGES = {
    "x * 2.0": "x * 3.0",  # a function that only `scale` calls
    "other, 256": "other, 64",
    "num_warps=4": "num_warps=8",
    "num_stages=3": "num_stages=2",
    "unaligned=()": "unaligned=('x_ptr',)",
    '{"x_ptr": "*fp32"})': '{"x_ptr": "*fp16"})',
}


@pytest.fixture
def looked_at(tmp_path, monkeypatch):
    """Audits a text; gives (build -> row, the builds that were really compiled)."""
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path / "cache"))

    def look(text):
        path = tmp_path / "kernels.py"
        path.write_text(text)
        rows = {row["build"]: row for row in audit(Request((str(path),), all=True)).rows}
        for row in rows.values():
            assert (row["compile_ms"] is None) == (row["cached"] or row["registers"] is None)
        return rows, {name for name, row in rows.items() if not row["cached"]}

    return look


def test_a_second_audit_compiles_only_what_changed(looked_at, tmp_path):
    first, compiled = looked_at(FILE)
    assert compiled == first.keys()
    damaged = next(path for path in (tmp_path / "cache").rglob("*.json") if '"registers"' in path.read_text())
    damaged.write_text(damaged.read_text()[:20])

    second, compiled = looked_at(FILE)
    assert len(compiled - {"broken"}) == 1, "the damaged one; what failed is never kept"
    assert "broken" in compiled
    left_out = ("compile_ms", "cached")
    for name, row in first.items():
        assert {k: v for k, v in row.items() if k not in left_out} == {
            k: v for k, v in second[name].items() if k not in left_out
        }
    assert not list((tmp_path / "cache").rglob("*.partial"))

    # Whatever decides the outcome is part of the key, and only for what it decides.
    changed = FILE
    for old, new in CHANGES.items():
        assert changed.count(old) == 1
        changed = changed.replace(old, new)
    assert looked_at(changed)[1] == {"called", "constant", "warps", "stages", "unaligned", "type", "broken"}


def test_where_facts_are_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("MOEBENCH_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "moebench" / "audit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "moebench" / "audit"
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own" / "audit"


def registers_only(found):
    return isinstance(found, dict) and found.keys() == {"registers"}


def test_a_cache_that_cannot_be_written_keeps_nothing_and_says_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "below", registers_only)
    cache.put("abc", {"registers": 1})
    assert cache.get("abc") is None


def test_only_whole_facts_come_back(tmp_path):
    cache = Cache(tmp_path, registers_only)
    assert cache.get("abc") is None
    cache.put("abc", {"registers": 1})
    assert cache.get("abc") == {"registers": 1}
    assert [path.name for path in tmp_path.rglob("*.*")] == ["abc.json"]
    for text in ("", "[]", "null", '{"registers": 1', json.dumps({"registers": 1, "more": 2}), "{}"):
        (tmp_path / "ab" / "abc.json").write_text(text)
        assert cache.get("abc") is None
