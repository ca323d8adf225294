"""The compile audit on the page: there when the run holds one, complete, escaped, and readable on any screen."""

import json

import pytest
from report.synthetic import HOSTILE, make_run

from moebench.audit.rows import make_row
from moebench.audit.run import Audit
from moebench.audit.saved import read_audit, write_audit
from moebench.report.html import write_report

FACTS = {
    "registers": 168, "accumulators": None, "scalars": None, "spill_bytes": 0, "spilled_scalars": None,
    "stack_bytes": 0, "shared_bytes": 98304, "tensor_columns": 0, "warps": 8,
    "mma": 0, "wgmma": 16, "tcgen05": 0, "mfma": 0,
    "tensor_instructions": "HGMMA.64x256x16.F32.BF16 16", "tma_loads": 6, "tma_stores": 1, "async_copies": 0,
    "loads": 12, "wide_loads": 8,
}  # fmt: skip


def row(build, target="sm_90", expect=(), facts=None, **answer):
    listed = {"file": "f.py", "kernel": "k", "build": build, "target": target, "num_warps": 8, "num_stages": 3}
    answer = {"cached": False} | (answer or {"facts": FACTS | (facts or {}), "compile_ms": 812.0})
    return make_row(listed | {"expect": list(expect)}, answer)


def audited(folder, rows, **more):
    run = make_run(folder, **more)
    write_audit(run, Audit(rows, {"triton": "3.7.1", "ptxas": "12.8", "audit": "0123"}))
    return write_report([run], folder.parent / f"{folder.name}.html")


def body(page):
    return page.read_text(encoding="utf-8").split('<script type="application/json"')[0]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    rows = [
        row("grouped_gemm swiglu bf16 m128"),
        row(
            "grouped_gemm swiglu bf16 m128",
            "gfx942",
            facts={"wgmma": 0, "mfma": 48, "shared_bytes": 80000, "tma_loads": 0},
        ),
        row(HOSTILE, error=HOSTILE),
        row("permute bf16", expect=("tma",), facts={"tma_loads": 0, "tma_stores": 0}),
    ]
    return audited(tmp_path_factory.mktemp("audited") / "run", rows)


def test_a_page_without_an_audit_has_no_section(pages):
    assert 'id="audit"' not in body(pages["quick"])
    assert 'href="#audit"' not in body(pages["quick"])


def test_the_section_holds_every_row_and_fault(page_file):
    text = body(page_file)
    assert 'href="#audit"' in text
    section = text.split('id="audit"')[1].split("</section>")[0]
    assert "4 builds, 3 with a fault" in section
    assert "triton 3.7.1, ptxas 12.8" in section
    assert "HGMMA.64x256x16.F32.BF16 16" in section
    assert "96 of 227" in section
    assert "0.81 s" in section
    assert "needs 80000 bytes of shared memory; gfx942 has 65536" in section
    assert "uses no TMA" in section
    assert section.index("uses no TMA") < section.index(">ok<"), "what is wrong comes first"


def test_hostile_text_is_no_markup(page_file):
    text = page_file.read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert "&lt;script&gt;alert(1)" in body(page_file).split('id="audit"')[1]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"schema": 1, "rows": [', '{"schema": 1, "rows": [{}]}', '{"schema": 9, "rows": []}']
)
def test_a_damaged_audit_costs_its_section_only(tmp_path, text):
    run = make_run(tmp_path / "run")
    (run / "audit.json").write_text(text)
    section = body(write_report([run], tmp_path / "page.html")).split('id="audit"')[1].split("</section>")[0]
    assert "audit again" in section
    with pytest.raises(ValueError, match="audit again"):
        read_audit(run)


def test_an_audit_is_written_into_runs_only_and_replaced_whole(tmp_path):
    audit = Audit([row("a")], {})
    with pytest.raises(ValueError, match="not a run directory"):
        write_audit(tmp_path, audit)
    run = make_run(tmp_path / "run")
    write_audit(run, Audit([row("a"), row("b")], {}))
    path = write_audit(run, audit)
    assert len(json.loads(path.read_text())["rows"]) == 1
    assert not list(run.glob("*.partial"))


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1400, False), (390, True)])
def test_it_fits_the_screen_and_says_nothing_to_the_console(page, page_file, width, dark):
    page.open(page_file, anchor="#audit", width=width, dark=dark)
    page.settle()
    assert page.console() == []
    assert page.js("document.documentElement.scrollWidth <= innerWidth")
    assert page.js("document.querySelectorAll('#audit tbody tr:not(.why)').length") == 4
    assert page.js("document.querySelectorAll('#audit .why').length") == 3
    assert page.js("getComputedStyle(document.querySelector('#audit .status.fault')).color") != page.js(
        "getComputedStyle(document.querySelector('#audit .status.measured')).color"
    )
