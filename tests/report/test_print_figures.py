"""Print figures: one of each kind that has data, as PDF and PNG."""

from analyse.tables import record
from report.synthetic import make_run
from report.test_page import run_of

from moebench.report.figures import write_figures


def test_each_kind_in_both_formats(tmp_path):
    files = write_figures([make_run(tmp_path / "run", run_id="a b", tokens=(1, 16))], tmp_path / "figures")
    names = {f"a_b-{kind}.{suffix}" for kind in ("radar", "latency", "pareto", "roofline") for suffix in ("pdf", "png")}
    assert {path.name for path in files} == names
    for path in files:
        head = path.read_bytes()[:4]
        assert head == (b"%PDF" if path.suffix == ".pdf" else b"\x89PNG")
        assert path.stat().st_size > 5000


def test_hostile_names_are_drawn_as_they_are(tmp_path):
    run = make_run(tmp_path / "run", hostile=True, tokens=(1, 16), models=("$x^{", "{y}"))
    assert len(write_figures([run], tmp_path / "figures")) == 8


def test_nothing_timed_gives_no_figure_and_settings_stay(tmp_path):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    run = run_of(tmp_path / "run", record("a", status="crashed", reason="signal 11"))
    assert write_figures([run], tmp_path / "figures") == []
    assert dict(mpl.rcParams) == before
