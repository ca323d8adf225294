"""The command line: every mistake is one clear line, every exit code means one thing, every table has --json."""

import json
import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from pipeline.test_run import At
from pipeline.tiny import environment, moebench, records, write_suite

from moebench.cli import KINDS, main


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to be in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def cli(*words):
    """One command in this process; whatever is not an exit would have been a traceback."""
    result = CliRunner().invoke(main, [str(word) for word in words], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.stderr
    return result


def ours(result):
    """The lines moebench itself said on stderr."""
    prefix = "moebench: "
    return [line.removeprefix(prefix) for line in result.stderr.splitlines() if line.startswith(prefix)]


def commands(command=main, path=()):
    """Every command, as words."""
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


# Wrong words


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("run suite qick", "unknown suite 'qick'; did you mean quick?"),
        ("run suite none.toml", "'none.toml': cannot be read: No such file or directory"),
        ("run suite ./smoke", "'smoke': cannot be read"),
        ("run suite smoke --set tokns=3", "--set: unknown axis 'tokns'; did you mean tokens"),
        ("run suite smoke --set tokens=four", "--set tokens=four: found 'four'; allowed: whole numbers"),
        ("run suite smoke --set tokens=", "--set tokens=: found ''"),
        ("run suite smoke --set capacity_factor=nan", "found nan (allowed: finite numbers > 0"),
        ("run suite smoke --set top_k=9999", "--set top_k=9999: is in no point"),
        ("run suite smoke --set model=mixtral-8x77b", "unknown model 'mixtral-8x77b'; did you mean mixtral-8x7b"),
        ("run suite smoke --set traffic=zipf:nan", "traffic 'zipf:nan'"),
        ("run suite smoke --provider torch-lop", "provider 'torch-lop' is not known; did you mean 'torch-loop'?"),
        ("run suite smoke --provider torch-loop,tritn", "provider 'tritn' is not known; did you mean 'triton'?"),
        ("run suite smoke --provider kernel.py", "provider 'kernel.py' is not known"),
        ("run suite smoke --shard 3/2", "shard '3/2' is not i/n with 1 <= i <= n"),
        ("run suite smoke --shard half", "shard 'half' is not i/n"),
        ("run suite smoke --hardware none.csv", "none.csv: no such file"),
        (
            "run suite smoke --resume",
            "there is no unfinished run of smoke in moebench-runs; name its folder with --out",
        ),
        ("describe mixtral-8x77b", "unknown model 'mixtral-8x77b'; did you mean mixtral-8x7b"),
        ("describe none.json", "none.json"),
        ("describe mixtral-8x7b --precision fp9", "precision 'fp9' is not one of"),
        ("list hardware --hardware none.toml", "none.toml: no such file"),
        ("report nowhere", "nowhere: no such run directory"),
        ("report .", ".: not a run directory (it has no manifest.json)"),
    ],
)
def test_a_mistake_is_one_line(here, words, line):
    result = cli(*words.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    (said,) = ours(result)
    assert line in said
    assert list(here.iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("lst", "No such command 'lst'. Did you mean 'list'?"),
        ("run suite --jsn", "No such option '--jsn'. (Did you mean one of: '--json'"),
        ("run suite --device gpu", "'gpu' is not one of 'auto', 'cpu', 'cuda'"),
        ("run suite smoke --set tokens", "'tokens' is not AXIS=VALUE[,VALUE]"),
        ("run suite smoke --set =3", "'=3' is not AXIS=VALUE[,VALUE]"),
        ("run suite smoke --set tokens=1 --set tokens=2", "tokens is given twice"),
        ("list model", "'model' is not one of 'models', 'providers', 'routers', 'suites', 'hardware'"),
        ("describe", "Missing argument 'MODEL|config.json'"),
        ("describe mixtral-8x7b --tokens 0", "0 is not in the range 1<=x"),
        ("describe mixtral-8x7b --tokens many", "'many' is not a valid integer"),
        ("report", "Missing argument 'RUN...'"),
    ],
)
def test_a_word_that_does_not_parse_is_one_line_after_the_usage(here, words, line):
    result = cli(*words.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    (error,) = [said for said in result.stderr.splitlines() if said and not said.startswith(("Usage:", "Try ", "   "))]
    assert error.startswith("Error: ")
    assert line in error


def test_every_fault_of_a_file_has_its_line(here):
    path = write_suite(here)
    text = path.read_text().replace("tokens = [4]", 'tokens = "four"\ntokns = 4\ncapacity_factor = nan')
    path.write_text(text.replace("seconds_per_point = 0.05", "second_per_point = 1"))
    result = cli("run", "suite", "tiny.toml")
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = ours(result)
    assert line.startswith("tiny.toml: budget.second_per_point: unknown key; did you mean seconds_per_point")
    path.write_text(text)
    said = ours(cli("run", "suite", "tiny.toml"))
    assert len(said) == 3
    assert all(line.startswith("tiny.toml: sweep 1: grid") for line in said)
    path.write_text(text.partition("[[sweep]]")[0])
    assert ours(cli("run", "suite", "tiny.toml")) == ["tiny.toml: sweep: is missing"]
    path.write_text(write_suite(here).read_text().replace("tokens = [4]", "tokens = []"))
    (line,) = ours(cli("run", "suite", "tiny.toml", "--dry-run"))
    assert line.startswith("tiny.toml: sweep 1: grid.tokens: is empty")


def test_numbers_that_are_none_in_a_hardware_file(here):
    (here / "mine.csv").write_text("name,mem_bw_gbs\nmine,nan\n")
    for words in (["list", "hardware"], ["run", "suite", "smoke"]):
        result = cli(*words, "--hardware", "mine.csv")
        assert result.exit_code == 2
        (line,) = ours(result)
        assert "mine.csv" in line
        assert "nan" in line


def test_a_config_that_is_no_moe(here):
    (here / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    result = cli("describe", "config.json")
    assert result.exit_code == 2
    (line,) = ours(result)
    assert line.startswith("config.json: ")


def test_a_folder_that_is_in_use_for_something_else(here, crew):
    write_suite(here)
    (here / "file").write_text("precious")
    (here / "full").mkdir()
    (here / "full" / "thesis.tex").touch()
    for out, line in (
        ("file", "file is a file; --out names a folder"),
        ("full", "full exists and is not empty; choose another --out"),
    ):
        result = cli("run", "suite", "tiny.toml", "--out", out)
        assert (result.exit_code, ours(result)) == (2, [line])
    assert crew.workers == []
    assert cli("run", "suite", "tiny.toml", "--out", "run", "--no-report").exit_code == 0
    result = cli("run", "suite", "tiny.toml", "--out", "run")
    assert ours(result) == ["run exists and is not empty; use --resume to go on with it, or another --out"]


def test_a_provider_file_that_is_missing_and_then_mistyped_and_then_right(here, crew):
    """One folder serves all three tries: what was refused leaves nothing in the way."""
    write_suite(here)
    go = ["run", "suite", "tiny.toml", "--out", "run", "--no-report", "--provider", "kernel.py:experts"]
    result = cli(*go)
    assert (result.exit_code, ours(result)) == (2, ["provider kernel.py:experts: there is no file 'kernel.py'"])
    (here / "kernel.py").write_text("def other(x): ...\n")
    crew.cues["kernel.py:experts", "provider"] = {"unavailable": "kernel.py:experts: 'kernel.py' has no 'experts'"}
    result = cli(*go)
    assert (result.exit_code, ours(result)) == (2, ["provider kernel.py:experts: 'kernel.py' has no 'experts'"])
    crew.cues.clear()
    (here / "kernel.py").write_text("def experts(x, ids, weights, w_gate_up, w_down): ...\n")
    assert cli(*go).exit_code == 0
    assert {row.provider for row in records(here / "run")} >= {"kernel.py:experts", "torch-loop", "torch-bmm"}


# Exit codes and what is printed


def test_a_good_run_prints_where_it_is(here, crew):
    write_suite(here)
    result = cli("run", "suite", "tiny.toml", "--out", "run", "--no-report")
    assert (result.exit_code, result.stdout) == (0, "run\n")
    assert "2 measured" in result.stderr
    assert not (here / "run" / "report.html").exists()


def test_a_run_ends_with_its_report(here, crew):
    write_suite(here)
    result = cli("run", "suite", "tiny.toml")
    assert result.exit_code == 0
    page = here / result.stdout.strip()
    assert page.name == "report.html"
    assert page.parent.parent == here / "moebench-runs"
    assert page.parent.name.startswith("tiny-")
    assert "torch-bmm" in page.read_text()


def test_failed_points_are_listed_with_their_reasons(here, crew):
    crew.cues["torch-bmm", "warm"] = {"status": "failed", "reason": "ValueError: [red]no[/red]"}
    write_suite(here, tokens=[4, 8])
    result = cli("run", "suite", "tiny.toml", "--out", "run", "--no-report")
    assert result.exit_code == 1
    assert "  failed: torch-bmm (2 points): ValueError: [red]no[/red]" in result.stderr.splitlines()


def test_the_outcome_as_json(here, crew):
    crew.cues["torch-bmm", "warm"] = {"status": "failed", "reason": "no"}
    write_suite(here)
    result = cli("run", "suite", "tiny.toml", "--out", "run", "--no-report", "--json")
    assert result.exit_code == 1
    expected = {"path": "run", "report": None, "exit_code": 1, "measured": 1, "failed": 1}
    (found,) = json.loads(result.stdout)
    seconds = [found.pop(f"{name}seconds") for name in ("", "overhead_", "building_")]
    assert found == expected
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize(("message", "done"), [("hello", 0), ("ceilings", 0), ("open", 0), ("burst", 0), ("check", 5)])
def test_an_interrupted_run_prints_the_words_that_go_on(here, crew, message, done):
    about = "torch-bmm" if message in ("burst", "check") else ""
    crew.cues[about, message] = At(2 if done else 1, KeyboardInterrupt())
    write_suite(here, tokens=[4, 8])
    words = ["run", "suite", "tiny.toml", "--out", "run"]
    sys_argv, sys.argv = sys.argv, ["moebench", *words]
    try:
        result = cli(*words)
    finally:
        sys.argv = sys_argv
    assert result.exit_code == 130
    command = "moebench run suite tiny.toml --out run --resume"
    assert f"interrupted; go on with:  {command}" in result.stderr
    assert len(records(here / "run")) == done
    crew.cues.clear()
    again = cli(*command.split()[1:])
    assert again.exit_code == 0
    assert len(records(here / "run")) == 10


def test_ctrl_c_before_and_after_the_run_itself(here, crew, monkeypatch):
    write_suite(here)
    with monkeypatch.context() as patch:
        patch.setattr("moebench.suite.load_suite", At(1, KeyboardInterrupt()))
        result = cli("run", "suite", "tiny.toml", "--out", "run")
    assert (result.exit_code, ours(result)) == (130, ["interrupted"])
    with monkeypatch.context() as patch:
        patch.setattr("moebench.report.html.write_report", At(1, KeyboardInterrupt()))
        result = cli("run", "suite", "tiny.toml", "--out", "run")
    assert (result.exit_code, ours(result)) == (130, ["interrupted"])
    assert len(records(here / "run")) == 5


def test_what_ends_a_run_is_one_line(here, crew):
    from moebench.remote import WorkerLost

    write_suite(here)
    crew.cues["", "hello"] = WorkerLost("crashed", "hello: the worker ended with exit code 1")
    result = cli("run", "suite", "tiny.toml", "--out", "run")
    assert result.exit_code == 1
    said = "the worker does not start: hello: the worker ended with exit code 1; run/worker.log may say why"
    assert ours(result) == [said]


@pytest.mark.parametrize("words", [["list", "models"], ["list", "models", "--json"]])
def test_a_reader_that_leaves_hears_no_complaint(words):
    """`moebench list models | head -1`."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "moebench", *words], stdout=write, stderr=subprocess.PIPE, text=True,
        env=environment(), timeout=60, check=False,
    )  # fmt: skip
    os.close(write)
    assert done.stderr == ""


# Plans, tables and help


def test_a_dry_run_measures_nothing(here, crew):
    write_suite(here, tokens=[4, 8])
    result = cli("run", "suite", "tiny.toml", "--dry-run", "--device", "cpu")
    assert result.exit_code == 0
    assert "4 points in 2 blocks on cpu" in result.stdout
    assert "uncalibrated" in result.stdout
    assert "custom T=8 uniform forward: torch-loop, torch-bmm" in result.stdout
    (row,) = json.loads(cli("run", "suite", "tiny.toml", "--dry-run", "--device", "cpu", "--json").stdout)
    assert (row["suite"], row["points"], row["blocks"], row["basis"]) == ("tiny", 4, 2, "uncalibrated")
    assert row["seconds"] > 0
    assert crew.workers == []
    assert [entry.name for entry in here.iterdir()] == ["tiny.toml"]


def test_a_plan_rests_on_the_ceilings_of_the_newest_run(here, crew):
    write_suite(here)
    assert cli("run", "suite", "tiny.toml", "--no-report").exit_code == 0
    (row,) = json.loads(cli("run", "suite", "tiny.toml", "--dry-run", "--device", "cpu", "--json").stdout)
    assert row["basis"] == "calibrated"
    (manifest,) = here.glob("moebench-runs/*/manifest.json")
    manifest.write_text("{")
    (row,) = json.loads(cli("run", "suite", "tiny.toml", "--dry-run", "--device", "cpu", "--json").stdout)
    assert row["basis"] == "uncalibrated"


@pytest.fixture
def probed(monkeypatch):
    """What the probe process finds, without its start."""
    facts = {"state": "ready", "version": "1", "reason": None}
    found = {"facts": [["device", "cpu", "Straw"]], "providers": {"torch-loop": facts}}
    monkeypatch.setattr("moebench.listings._probe", lambda: found)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("list models", "mixtral-8x7b"),
        ("list providers", "torch-loop"),
        ("list routers", "softmax_topk"),
        ("list suites", "quick"),
        ("list hardware", "H200"),
        ("doctor", "Straw"),
        ("describe mixtral-8x7b", "46,702"),
        ("describe swin-moe-s-64:stage3", "stage3"),
    ],
)
def test_every_table_and_its_json(here, probed, words, shown):
    """A list of flat objects, all with the same keys."""
    as_text, as_json = cli(*words.split()), cli(*words.split(), "--json")
    assert as_text.exit_code == as_json.exit_code == 0
    assert shown in as_text.stdout
    assert as_text.stderr == as_json.stderr == ""
    rows = json.loads(as_json.stdout)
    assert rows
    assert all(not isinstance(value, dict) for row in rows for value in row.values())
    if not words.startswith(("list providers", "describe")):
        assert len({tuple(row) for row in rows}) == 1
    assert len(as_text.stdout.splitlines()) >= len(rows)


def test_every_kind_is_listed_in_that_test():
    assert set(KINDS) == {"models", "providers", "routers", "suites", "hardware"}


def test_text_of_a_file_is_shown_as_it_is(here):
    (here / "mine.toml").write_text('[[hardware]]\nname = "[bold]mine[/bold]"\nmem_bw_gbs = 1.0\n')
    result = cli("list", "hardware", "--hardware", "mine.toml")
    assert (result.exit_code, "[bold]mine[/bold]" in result.stdout) == (0, True), result.stderr


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_help_of_every_command_has_an_example_that_parses(path):
    result = cli(*path, "--help")
    assert result.exit_code == 0
    examples = result.stdout.partition("Example")[2].partition("Options:")[0].splitlines()[1:]
    examples = [line.partition("   ")[0].split() for line in map(str.strip, examples) if line.startswith("moebench")]
    assert examples
    for words in examples:
        assert words[0] == "moebench"
        parses(words[1:])


def parses(words):
    """The words name a command, and its options exist."""
    command, context = main, click.Context(main)
    while isinstance(command, click.Group):
        command = command.commands[words[0]]
        words = words[1:]
    command.make_context("moebench", list(words), parent=context)


def test_the_version(here):
    assert cli("--version").stdout.startswith("moebench, version ")


def test_python_m_moebench(here):
    done = moebench("--version", cwd=here)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--provider", "missing.py:f"], "provider missing.py:f: there is no file 'missing.py'"),
        (["--hardware", "missing.csv"], "missing.csv"),
    ],
)
def test_a_dry_run_looks_at_the_files_it_is_given(here, words, said):
    write_suite(here)
    result = cli("run", "suite", "tiny.toml", "--dry-run", *words)
    assert result.exit_code == 2
    assert said in result.stderr
