"""Who may import whom: help, lists and reports start fast and work without torch; each side knows only its own."""

import ast
import json
import subprocess
import sys
from functools import cache

import pytest
from pipeline.tiny import CHECKOUT, environment, write_suite

from moebench.options import Options
from moebench.run import run_suite
from moebench.suite import load_suite

HEAVY = {"torch", "triton", "numpy", "pandas", "pyarrow", "pydantic", "scipy", "plotly", "seaborn", "matplotlib",
         "jinja2", "rich", "transformers"}  # fmt: skip
# The worker's process, and what only it imports.
WORKERS_SIDE = {
    "answer", "arm", "bench", "check", "check_stages", "expected", "oracle", "oracle_gate", "probe", "recheck",
    "rotation", "weights", "worker", "workload", "yardsticks", "layer_forms", "providers", "routing", "measure",
}  # fmt: skip
OTHER_WORKERS = {"tune.product", "tune.worker", "tracing", "tracing_hooks"}
NAMED = {"cli", "catalogue", "suite", "work", "point", "record", "analyse", "report", "run", "api", "measure.latency"}


def python(program, **more):
    """What a fresh interpreter prints for a program, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False,
        env=environment(**more),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@cache
def imported(*statements):
    """Top-level modules that statements bring in."""
    lines = ["import sys, json", *statements, "print(json.dumps(sorted(sys.modules)))"]
    return set(python("\n".join(lines)))


def heavy(modules):
    return {name.partition(".")[0] for name in modules} & HEAVY


@pytest.fixture
def no_torch(tmp_path):
    """The path of a torch and a triton that cannot be imported."""
    for name in ("torch", "triton"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is broken here')\n")
    return f"{tmp_path}:{environment()['PYTHONPATH']}"


# Without torch


def test_nothing_but_the_workers_side_imports_torch():
    """Every module that is not named as the worker's: a new one belongs on one side or the other."""
    package = CHECKOUT / "moebench"
    every = {".".join(path.relative_to(package).with_suffix("").parts) for path in package.rglob("*.py")}
    ours = {name.removesuffix(".__init__") for name in every if name.partition(".")[0] not in WORKERS_SIDE}
    free = {"latency", "steadiness", "energy_meters", "energy_summary"}
    ours = ours - {"__init__", "__main__"} - OTHER_WORKERS | {f"measure.{name}" for name in free} | {"providers"}
    assert ours >= NAMED
    found = imported(*(f"import moebench.{name}" for name in sorted(ours)))
    assert {f"moebench.{name}" for name in ours} <= found
    assert found & {"torch", "triton", "transformers"} == set()


def test_help_lists_and_reports_work_where_torch_is_broken(no_torch, tmp_path, crew):
    run_suite(load_suite([str(write_suite(tmp_path))]), Options(tmp_path / "run"))
    program = """
import json, sys
from click.testing import CliRunner
from pipeline.test_command_line import commands
from moebench.cli import main

def run(*words):
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, (words, result.output, result.exception)
    return result.stdout

for path in commands():
    run(*path, "--help")
for words in (["list", "models"], ["list", "routers"], ["list", "suites"], ["list", "hardware"],
              ["describe", "mixtral-8x7b"], ["run", "suite", "--dry-run"]):
    run(*words)
page = run("report", sys.argv[1]).strip()
assert "torch-bmm" in open(page).read()
assert "torch is broken here" in run("doctor")
run("list", "providers")
print(json.dumps("torch" in sys.modules))
"""
    program = program.replace("sys.argv[1]", repr(str(tmp_path / "run")))
    assert python(program, PYTHONPATH=f"{no_torch}:{CHECKOUT / 'tests'}") is False


def test_a_run_where_torch_is_broken_ends_in_one_line(no_torch, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "moebench", "run", "suite", "smoke", "--out", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=120, check=False, env=environment(PYTHONPATH=no_torch),
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("moebench: ")]
    assert len(said) == 1
    assert "the worker does not start: hello: the worker ended with exit code 1" in said[0]
    assert "torch is broken here" in (tmp_path / "run" / "worker.log").read_text()


# Fast starts: the number of modules stands for the time, which a loaded machine cannot tell


def test_help_imports_next_to_nothing():
    found = imported("from moebench.cli import main", "try: main(['--help'])", "except SystemExit: pass")
    plain = imported()
    assert heavy(found) == set()
    assert len(found - plain) < 100
    ours = {name for name in found if name.startswith("moebench")}
    assert ours <= {
        "moebench",
        "moebench.cli",
        "moebench.cli_audit",
        "moebench.cli_compare",
        "moebench.cli_publish",
        "moebench.cli_run",
        "moebench.cli_trace",
        "moebench.cli_tune",
        "moebench.failures",
    }


def test_what_each_command_brings_in():
    no_exit = "from moebench.cli import main\ndef go(*words):\n    try: main(list(words))\n    except SystemExit: pass"
    describe = imported(no_exit, "go('describe', 'mixtral-8x7b', '--json')")
    assert heavy(describe) == set()
    dry = imported(no_exit, "go('run', 'suite', 'smoke', '--dry-run', '--json')")
    assert heavy(dry) <= {"pydantic"}
    assert heavy(imported(no_exit, "go('list', 'routers', '--json')")) == set()


def test_a_run_without_a_report_draws_nothing(tmp_path):
    program = f"""
import json, sys
import pytest
from pipeline.stand_in import Crew
import moebench.run
from moebench.cli import main
moebench.run.Remote = Crew().start
try:
    main(["run", "suite", "smoke", "--no-report", "--json", "--out", {str(tmp_path / "run")!r}])
except SystemExit as end:
    assert end.code == 0, end.code
print(json.dumps(sorted(sys.modules)))
"""
    found = set(python(program, PYTHONPATH=f"{CHECKOUT / 'tests'}:{environment()['PYTHONPATH']}"))
    assert heavy(found) & {"plotly", "seaborn", "matplotlib", "jinja2", "torch", "triton"} == set()
    assert "pandas" in found, "the table is written"


# Each side knows only its own


@cache
def imports_of(path):
    """Every module that a file imports, inside functions too; of `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {str(node.module), *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def offenders(folder, *forbidden):
    """(file, module) of the imports under a folder that are, or are inside, something forbidden."""
    files = sorted((CHECKOUT / folder).rglob("*.py"))
    assert files
    return [
        (path.name, name)
        for path in files
        for name in sorted(imports_of(path))
        if any(name == banned or name.startswith(f"{banned}.") for banned in forbidden)
    ]


def test_kernels_never_import_moebench():
    assert offenders("kernels/moebench_kernels", "moebench") == []


def test_kernels_are_a_library_of_their_own():
    found = imported("import moebench_kernels")
    assert "moebench" not in found
    assert "torch" in found


def test_providers_never_import_meters_or_records():
    assert offenders("moebench/providers", "moebench.measure", "moebench.record", "moebench.recording") == []


def test_meters_see_callables_and_tensors_only():
    banned = ("providers", "suite", "suite_file", "sweep", "expand", "arm", "workload", "run", "record", "recording")
    assert offenders("moebench/measure", *(f"moebench.{name}" for name in banned)) == []


def test_no_stage_reaches_back():
    late = ("run", "block_run", "worker", "remote", "report", "cli", "terminal")
    early = ("catalogue", "routing", "providers", "measure", "analyse")
    assert [each for name in early for each in offenders(f"moebench/{name}", *(f"moebench.{x}" for x in late))] == []


def test_only_the_worker_knows_both_providers_and_meters():
    both = []
    for path in (CHECKOUT / "moebench").glob("*.py"):
        names = imports_of(path)
        if "moebench.providers.load" in names and any(name.startswith("moebench.measure.") for name in names):
            both.append(path.stem)
    assert sorted(both) == ["probe", "worker"]
