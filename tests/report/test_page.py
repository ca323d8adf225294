"""The page as a file: what it says, what it carries, and what it must never carry."""

import json
import re

import pandas as pd
import pytest
from analyse.tables import record
from report.synthetic import HOSTILE, make_manifest, make_run

from moebench.analyse import write_results
from moebench.report.findings import why_absent
from moebench.report.html import embedded_json, write_report
from moebench.report.markdown import escaped, write_markdown


def text_of(path):
    return path.read_text(encoding="utf-8").split('<script type="application/json"')[0]


def run_of(folder, *records, **manifest):
    folder.mkdir()
    write_results(records, folder / "results.parquet")
    (folder / "manifest.json").write_text(make_manifest("r").model_copy(update=manifest).model_dump_json())
    return folder


def test_it_opens_with_one_sentence_a_problem(pages):
    text = text_of(pages["quick"])
    verdicts = re.findall(r'<p class="said">(.*?)</p>', text)
    assert len(verdicts) == 3
    assert all("16 MoE layers" in verdict for verdict in verdicts)
    assert text.index('class="said"') < text.index('id="cap"') < text.index('id="rows"') < text.index('id="charts"')


def test_more_than_twelve_problems_are_folded(pages):
    text = text_of(pages["many"])
    fold = text.index('<details class="fold">')
    assert text[:fold].count('class="said"') == 12
    assert "288 more problems" in text
    assert text.count('class="said"') == 300


def test_nothing_is_loaded_from_elsewhere(pages):
    text = pages["full"].read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert re.search(r"<(script|link|img|iframe)[^>]*\s(src|href)=", text_of(pages["full"])) is None


def test_hostile_text_is_nowhere_markup(pages):
    text = pages["hostile"].read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert text.count("</script>") == 6
    assert "&lt;script&gt;alert(1)" in text


def test_embedded_json_cannot_be_left():
    value = {"a": "</script><!--<b>&\u2028", "n": [1.5, None]}
    text = str(embedded_json(value))
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == value
    with pytest.raises(ValueError, match="JSON"):
        embedded_json(float("nan"))


def test_what_is_missing_says_why(pages):
    text = text_of(pages["quick"])
    assert "no energy source was read on Synthetic CPU" in text
    assert "no price is known for Synthetic CPU" in text
    rows = pd.DataFrame({"energy_reason": [None, "RAPL is readable by root only"]})
    assert why_absent("energy", rows, []).endswith("(RAPL is readable by root only)")
    assert "slow arm left out at 256 tokens" in text


def test_an_empty_and_an_interrupted_run_say_so(tmp_path):
    run = run_of(tmp_path / "run", finished="interrupted", ceilings=None)
    text = text_of(write_report([run], tmp_path / "page.html"))
    assert "was interrupted:" in text
    assert "0 of 30 points were reached" in text
    assert "this run holds no rows yet" in text


def test_a_run_where_nothing_was_timed_has_its_reasons(tmp_path):
    run = run_of(tmp_path / "run", record("a", status="crashed", reason="signal 11"))
    text = text_of(write_report([run], tmp_path / "page.html"))
    assert "Nothing was timed: 1 crashed. First reason: signal 11" in text
    assert "No CAP scores" in text
    assert '<span class="status fault">crashed</span>' in text


def test_several_runs_stand_side_by_side_and_share_no_anchor(tmp_path):
    runs = [make_run(tmp_path / name, run_id=name) for name in ("one", "two")]
    points = [(run / "results.parquet") for run in runs]
    assert all(path.exists() for path in points)
    text = write_report(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count('data-radar="') == 2
    assert text.count('class="said"') == 6


def test_the_same_point_in_two_runs_has_two_anchors(tmp_path):
    runs = []
    for name in ("one", "two"):
        rows = [record(arm, [1.0] * 8, run_id=name, point_id=arm) for arm in ("a", "b")]
        runs.append(run_of(tmp_path / name, *rows, run_id=name))
    text = write_report(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert data["rows"]["columns"]["anchor"] == {"values": ["a", "b", "a-2", "b-2"]}
    assert set(re.findall(r'<p class="problem">.*?href="#([^"]+)"', text)) == {"a", "a-2"}


def test_another_baseline_and_an_unknown_one(tmp_path):
    run = make_run(tmp_path / "run")
    assert "ratio to <b>torch-bmm</b>" in text_of(
        write_report([run], tmp_path / "new" / "p.html", baseline="torch-bmm")
    )
    with pytest.raises(ValueError, match="baseline 'nobody'"):
        write_report([run], tmp_path / "p.html", baseline="nobody")


def test_a_failed_write_leaves_the_old_page(tmp_path):
    run = make_run(tmp_path / "run")
    page = write_report([run], tmp_path / "page.html")
    before = page.read_bytes()
    (run / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json"):
        write_report([run], page)
    assert page.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"]


def test_markdown_has_the_verdicts_and_the_scores(tmp_path):
    text = write_markdown([make_run(tmp_path / "run")], tmp_path / "run.md").read_text(encoding="utf-8")
    assert text.count("16 MoE layers") == 3
    assert "| torch-loop | 1.00× (n=1) |" in text
    assert "no price is known" in text


def test_markdown_of_hostile_text_is_no_markup(tmp_path):
    text = write_markdown([make_run(tmp_path / "run", hostile=True)], tmp_path / "r.md").read_text(encoding="utf-8")
    assert re.search(r"(?<!\\)<", text) is None
    assert escaped(HOSTILE) in text
