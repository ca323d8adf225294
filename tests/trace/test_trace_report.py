"""The report's section: the numbers are the trace's, by loops; the texts are no markup."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from report.synthetic import make_run
from trace_models import Recorded, made

from moebench.report.html import write_report
from moebench.report.traces import BANDS, by_domain, by_token, gini, heat, section, token_text, trace_sections
from moebench.trace_file import Facts, Trace, write_trace


def test_load_by_layer(recorded: Recorded) -> None:
    rows = trace_sections([recorded.file])[0]["layers"]
    assert [row["layer"] for row in rows] == [0, 1, 2]
    for row, ids in zip(rows, recorded.trace.experts, strict=True):
        loads = [Counter(ids.ravel().tolist())[e] for e in range(8)]
        mean = sum(loads) / 8
        assert row["busiest"] == loads.index(max(loads))
        assert row["max_over_mean"] == pytest.approx(max(loads) / mean)
        assert row["min_over_mean"] == pytest.approx(min(loads) / mean)
        assert row["idle_experts"] == loads.count(0)
        pairs = sum(abs(a - b) for a in loads for b in loads)
        assert row["gini"] == pytest.approx(pairs / (2 * 64 * mean))


def test_gini_at_its_ends() -> None:
    assert gini(np.array([5, 5, 5, 5])) == pytest.approx(0)
    assert gini(np.array([0, 0, 0, 9])) == pytest.approx(3 / 4)
    assert gini(np.array([3])) == pytest.approx(0)


def test_the_heat_map_has_every_cell_once_in_its_band() -> None:
    counts = np.random.default_rng(0).poisson(3, (7, 60))
    drawn: dict[tuple[int, int], int] = {}
    for band, path in heat(counts, range(7))["paths"]:
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", path):
            for column in range(int(x), int(x) + int(width)):
                assert (int(y), column) not in drawn
                drawn[int(y), column] = band
    assert len(drawn) == 7 * 60
    for (row, column), band in drawn.items():
        relative = counts[row, column] / counts[row].mean()
        assert band == (0 if relative == 0 else 1 + sum(relative > end for end in BANDS)), (row, column)


def test_many_experts_are_drawn_in_groups() -> None:
    counts = np.ones((2, 1025), dtype=np.int64)
    counts[0, 1024] = 100
    found = heat(counts, (0, 1))
    assert (found["group"], found["columns"]) == (3, 342)
    assert dict(found["paths"])[7].startswith("M341 0h1")


def test_domains_by_loops(recorded: Recorded) -> None:
    trace = recorded.trace
    part = by_domain(trace, 1)
    assert part["experts"] == list(range(8))
    every = Counter(trace.experts[1].ravel().tolist())
    for number, line in enumerate(part["lines"]):
        own = Counter(trace.experts[1][trace.domains == number].ravel().tolist())
        assert line["domain"] == trace.facts.domains[number]
        for expert, cell in enumerate(line["cells"]):
            assert cell["share"] == pytest.approx(own[expert] / 6000)
        apart = sum(abs(own[e] / 6000 - every[e] / 12000) for e in range(8)) / 2
        assert line["distance"] == pytest.approx(apart)


def test_of_many_experts_those_that_tell_domains_apart_are_shown() -> None:
    experts = np.zeros((1, 400, 1), np.uint8)
    experts[0, :, 0] = np.where(np.arange(400) % 2, 77, np.arange(400) % 20)  # odd tokens, one domain: always 77
    trace = Trace(
        Facts("m", "t", 100, 1, (5,), ("even", "odd"), "bytes", "output", "float32", "0"),
        experts,
        np.ones((1, 400, 1), np.float32),
        np.zeros(400, np.int32),
        np.zeros(400, np.int32),
        (np.arange(400) % 2).astype(np.uint16),
    )
    part = by_domain(trace, 0)
    assert 77 in part["experts"]
    assert part["selected"]
    assert part["layer"] == 5
    assert part["lines"][1]["cells"][part["experts"].index(77)]["share"] == 1


def test_tokens_by_loops(recorded: Recorded) -> None:
    trace = recorded.trace
    lines = by_token(trace, 2)["lines"]
    assert len(lines) == 12
    bounds = []
    for line in lines:
        mine = [t for t in range(len(trace.tokens)) if trace.tokens[t] == line["id"]]
        share = sum(line["expert"] in trace.experts[2, t] for t in mine) / len(mine)
        overall = sum(line["expert"] in row for row in trace.experts[2]) / len(trace.tokens)
        assert line["seen"] == len(mine) >= 10
        assert line["share"] == pytest.approx(share)
        assert line["overall"] == pytest.approx(overall)
        n, z = len(mine), 1.96
        half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        bounds.append((share + z * z / (2 * n) - half) / (1 + z * z / n) - overall)
    assert bounds == sorted(bounds, reverse=True)
    assert max(line["share"] for line in lines) > 0.8, "training made some bytes prefer an expert"


def test_tokens_too_rare_are_not_ranked() -> None:
    assert by_token(made(), 0)["lines"] == []


def test_tokens_can_be_seen() -> None:
    trace = replace(made(), texts={1: " a\n", 2: "\x1b[2J\u202e", 3: "", 4: "<b>", 5: "\ud800"})
    assert [token_text(trace, t) for t in range(6)] == ["#0", "␣a↵", "\\u001b[2J\\u202e", "#3", "<b>", "\\ud800"]


# On the page


class Tags(HTMLParser):
    """Tags in order, and whether each that opens is closed."""

    VOID = frozenset({"meta", "path", "input", "br", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def section_of(page: Path) -> str:
    text = page.read_text(encoding="utf-8").split('<script type="application/json"')[0]
    return '<section id="traces"' + text.split('<section id="traces"')[1].split("</section>")[0] + "</section>"


def test_the_section_on_the_page(recorded: Recorded, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = write_report([run], tmp_path / "page.html", traces=[recorded.file])
    text = page.read_text(encoding="utf-8")
    assert 'href="#traces"' in text
    assert "heat-legend {" in text
    found = section_of(page)
    tags = Tags()
    tags.feed(found)
    assert tags.open == []
    assert tags.seen.count("table") == 1 + 3 + 3
    for each in ("tiny-olmoe", "olmoe", "english.md (3,000 tokens)", "python.py (3,000 tokens)", "Layer 0", "Layer 2"):
        assert each in found
    for row in trace_sections([recorded.file])[0]["layers"]:
        assert f'<td class="num">{row["gini"]:.3f}</td>' in found
        assert f"{row['max_over_mean']:.2f} <small>expert {row['busiest']}</small>" in found
    assert 'role="img" aria-label="Load of every expert' in found


def test_a_page_without_a_trace_has_no_section(tmp_path: Path) -> None:
    text = write_report([make_run(tmp_path / "run")], tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'id="traces"' not in text
    assert 'href="#traces"' not in text
    assert "heat-legend" not in text


def test_hostile_texts_are_no_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}"
    many = made(T=60, model=evil, model_type=evil, tokenizer=evil, domains=(evil, "b"), dtype=evil)
    many = replace(many, tokens=np.zeros(60, np.int32), texts={0: evil[:60]})
    file = write_trace(tmp_path / "t<script>.safetensors", many)
    page = write_report([make_run(tmp_path / "run")], tmp_path / "page.html", traces=[file])
    found = section_of(page)
    tags = Tags()
    tags.feed(found)
    assert tags.open == []
    assert {"script", "img"} & set(tags.seen) == set()
    assert found.count("&lt;script&gt;alert(1)") >= 5
    assert "{{ 7*7 }}" in found
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202a-\u202e]", found)


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "t.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match=r"t\.safetensors: not a trace, or damaged"):
        write_report([make_run(tmp_path / "run")], tmp_path / "page.html", traces=[tmp_path / "t.safetensors"])
    assert not (tmp_path / "page.html").exists()


def test_a_large_trace_stays_small_on_the_page() -> None:
    """60 layers, 256 experts, 8 picks, 20,000 tokens: counted, not listed."""
    generator = np.random.default_rng(0)
    L, T, K, E = 60, 20_000, 8, 256
    first = generator.integers(0, E, (1, T, 1))
    experts = ((first + np.arange(K) * 31 + np.arange(L)[:, None, None]) % E).astype(np.uint8)
    trace = Trace(
        Facts("m", "t", E, K, tuple(range(L)), ("a", "b"), "bytes", "output", "float32", "0"),
        experts,
        np.ones((L, T, K), np.float16),
        generator.integers(0, 5000, T).astype(np.int32),
        np.zeros(T, np.int32),
        (np.arange(T) * 2 // T).astype(np.uint16),
    )
    began = time.process_time()
    found = section(trace, "large")
    assert time.process_time() - began < 10
    assert len(repr(found)) < 500_000
