"""`moebench audit`: words, exit codes, JSON, bad files, hanging compilers, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from watching import gone, heed_ctrl_c, within

from moebench.audit.run import Request, audit
from moebench.cli import main

HERE = Path(__file__).parent
KERNELS = str(HERE / "audited_kernels.py")
HANGING = str(HERE / "hanging_kernels.py")


def cli(*words):
    result = CliRunner().invoke(main, ["audit", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.output
    return result


def ours(result):
    return [line.removeprefix("moebench: ") for line in result.stderr.splitlines() if line.startswith("moebench: ")]


# What it prints


def test_a_table_of_good_kernels(rows):
    result = cli(KERNELS, "--kernel", "gemm bf16", "--target", "sm_90,gfx942")
    assert result.exit_code == 0
    head, *lines, last = result.stdout.splitlines()
    assert head.split()[:3] == ["build", "target", "verdict"]
    assert [line.split()[2:4] for line in lines] == [["sm_90", "ok"], ["gfx942", "ok"]]
    assert all(line.split()[-1] == "cached" for line in lines)
    assert "HGMMA.64x128x16.F32.BF16 4" in lines[0]
    assert last == "2 builds (2 cached), all ok"


def test_a_fault_is_exit_code_1_and_one_line(rows):
    result = cli(KERNELS, "--kernel", "too much*", "--target", "sm_90")
    assert result.exit_code == 1
    assert "1 build (1 cached), 1 with a fault" in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    assert line.startswith("  too much shared on sm_90: needs ")


def test_json_is_a_list_of_flat_objects(rows):
    every = json.loads(cli(KERNELS, "--json", "--target", "sm_90", "--kernel", "COPY", "--all").stdout)
    assert [row["build"] for row in every] == ["copy wide", "copy narrow", "copy expects"]
    for row in every:
        assert not [value for value in row.values() if isinstance(value, list | dict)]
    assert every[0]["faults"] == ""
    assert "uses no TMA" in every[2]["faults"]
    assert every[0]["registers"] == rows["copy wide", "sm_90"]["registers"]


def test_without_all_it_is_one_config_of_each_kernel_and_target(rows):
    """The first of those that expect most."""
    result = cli(KERNELS, "--json", "--target", "sm_90,gfx942", "--kernel", "copy,gemm")
    assert [(row["build"], row["target"]) for row in json.loads(result.stdout)] == [
        ("gemm bf16", "sm_90"), ("gemm bf16", "gfx942"), ("tma bf16", "sm_90"),
        ("copy expects", "sm_90"), ("copy wide", "gfx942"),
    ]  # fmt: skip


# Bad words and bad files


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--target", "sm90"), "unknown target 'sm90' (allowed: sm_80, sm_90, sm_100, gfx942, gfx950)"),
        (("--target", ""), "unknown target '' (allowed: sm_80, "),
        (("none.py",), "none.py: no such file"),
        (("folder.py",), "folder.py: is a folder, not a file (allowed: a .py file)"),
        (("/dev/null",), "/dev/null: is a device or pipe, not a file (allowed: a .py file)"),
        (("text.txt",), "text.txt: is not a .py file (allowed: a Python file, named *.py)"),
        ((KERNELS, "--kernel", "conv"), "no kernel or build is like 'conv'; the kernels are: calls_python, copy, "),
        ((HANGING, "--target", "sm_90"), "no build is meant for sm_90"),
        (("--out", "."), ".: not a run directory (it has no manifest.json)"),
    ],
)
def test_a_mistake_is_one_line(rows, monkeypatch, tmp_path, words, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "text.txt").write_text("")
    result = cli(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    (said,) = ours(result)
    assert line in said


HEAD = """
import triton, triton.language as tl
from moebench_kernels.build import Build
@triton.jit
def copy(x_ptr, n, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 0.0)
TYPES = {"x_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}
ONE = {"BLOCK": 128}
"""
TARGETS = "sm_80, sm_90, sm_100, gfx942, gfx950"
BAD = {
    "empty.py": ("", "declares no kernels (allowed: a function builds() or a list BUILDS of Build)"),
    "syntax.py": ("def builds(:", "running it failed: SyntaxError: invalid syntax"),
    "raises.py": ("raise KeyError('x')", "running it failed: KeyError: 'x'"),
    "exits.py": ("import sys; sys.exit('usage')", "running it failed: SystemExit: usage"),
    "fails.py": (HEAD + "def builds(): return 1 / 0", "builds() failed: ZeroDivisionError: division by zero"),
    "nothing.py": ("BUILDS = []", "its builds are nothing (allowed: a list of moebench_kernels.build.Build)"),
    "number.py": ("BUILDS = 3", "its builds are a int (allowed: a list of moebench_kernels.build.Build)"),
    "other.py": ("BUILDS = [3]", "build number 1: is a int (allowed: moebench_kernels.build.Build)"),
    "missing.py": (
        HEAD + "BUILDS = [Build('b', copy, {'x_ptr': '*fp32'}, ONE)]",
        "build 'b': argument 'n' is neither in signature nor in constants",
    ),
    "type.py": (
        HEAD + "BUILDS = [Build('b', copy, TYPES | {'n': 'int32'}, ONE)]",
        "build 'b': argument 'n': unknown type 'int32' (allowed: constexpr, i1, ",
    ),
    "valueless.py": (
        HEAD + "BUILDS = [Build('b', copy, TYPES, {})]",
        "argument 'BLOCK' is constexpr and has no value in constants",
    ),
    "both.py": (
        HEAD + "BUILDS = [Build('b', copy, TYPES, ONE | {'n': 1})]",
        "argument 'n' has a value in constants and type 'i32' (allowed: constexpr)",
    ),
    "typed.py": (
        HEAD + "BUILDS = [Build('b', copy, TYPES | {'BLOCK': 'i32'}, {})]",
        "argument 'BLOCK' is a tl.constexpr and has type 'i32' (allowed: a value in constants)",
    ),
    "stranger.py": (
        HEAD + "BUILDS = [Build('b', copy, TYPES, ONE | {'m': 1})]",
        "constants names 'm', which is no argument of copy (x_ptr, n, BLOCK)",
    ),
    "target.py": (
        HEAD + "BUILDS = [Build('b', copy, TYPES, ONE, ('sm_91',))]",
        f"build 'b': targets: unknown target 'sm_91' (allowed: {TARGETS})",
    ),
    "text.py": (
        HEAD + "BUILDS = [Build('b', copy, TYPES, ONE, 'sm_90')]",
        f"targets: found 'sm_90' (allowed: a tuple of {TARGETS})",
    ),
    "warps.py": (
        HEAD + "BUILDS = [Build('b', copy, TYPES, ONE, num_warps=3)]",
        "num_warps: found 3 (allowed: 1, 2, 4, 8, 16, 32)",
    ),
    "stages.py": (HEAD + "BUILDS = [Build('b', copy, TYPES, ONE, num_stages=0)]", "num_stages: found 0 (allowed: "),
    "expect.py": (
        HEAD + "BUILDS = [Build('b', copy, TYPES, ONE, expect=('hmma',))]",
        "expect: found 'hmma' (allowed: mma, wgmma, tcgen05, mfma, tma)",
    ),
    "named.py": (
        HEAD + "BUILDS = [Build(5, copy, TYPES, ONE)]", "build number 1: name: found 5 (allowed: a text of one line)",
    ),
    "list.py": (
        HEAD + "BUILDS = [Build('b', copy, [1], ONE)]",
        "build 'b': signature: found [1] (allowed: a dict, argument: type)",
    ),
    "none.py": (
        HEAD + "BUILDS = [Build('b', copy, TYPES, None)]",
        "build 'b': constants: found None (allowed: a dict, argument: value)",
    ),
    "nowhere.py": (
        HEAD + "BUILDS = [Build('b', copy, TYPES, ONE, None)]",
        f"targets: found None (allowed: a tuple of {TARGETS})",
    ),
    "nothashed.py": (HEAD + "BUILDS = [Build('b', copy, TYPES, ONE, ([],))]", "targets: unknown target [] (allowed: "),
    "unexpected.py": (
        HEAD + "BUILDS = [Build('b', copy, TYPES, ONE, expect=None)]",
        "expect: found None (allowed: a tuple of ",
    ),
    "true.py": (
        HEAD + "BUILDS = [Build('b', copy, TYPES, ONE, num_warps=True)]",
        "num_warps: found True (allowed: 1, 2,",
    ),
    "float.py": (
        HEAD + "BUILDS = [Build('b', copy, TYPES, ONE, num_warps=4.0)]",
        "num_warps: found 4.0 (allowed: 1, 2,",
    ),
    "bare.py": (
        HEAD + "BUILDS = [Build('b', copy, TYPES, ONE, unaligned='n')]",
        "unaligned: found 'n' (allowed: a tuple of names of arguments)",
    ),
    "python.py": (
        HEAD + "BUILDS = [Build('b', copy.fn, TYPES, ONE)]",
        "build 'b': kernel is a function (allowed: a @triton.jit function)",
    ),
    "tuned.py": (
        HEAD + "BUILDS = [Build('b', triton.heuristics({})(copy), TYPES, ONE)]",
        "kernel is a Heuristics (allowed: a @triton.jit function; give the function below the decorator, its .fn)",
    ),
    "twice.py": (
        HEAD + "BUILDS = [Build('b', copy, TYPES, ONE, ('sm_90',))] * 2",
        "build 'b': 2 builds have this name for sm_90 (allowed: one)",
    ),
}  # fmt: skip


def test_every_fault_of_every_file_has_its_line(tmp_path):
    """All at once, since each audit costs the start of a worker."""
    texts = {name: text for name, (text, _) in BAD.items()}
    texts["zmany.py"] = HEAD + "BUILDS = [Build(f'b{i}', copy, TYPES, {}) for i in range(50)]"
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    result = cli(*(tmp_path / name for name in texts))
    assert result.exit_code == 2
    assert result.stdout == ""
    said = ours(result)
    for line, (name, (_, expected)) in zip(said, BAD.items(), strict=False):
        assert line.startswith(f"{tmp_path / name}: ")
        assert expected in line
    many = said[len(BAD) :]
    assert len(many) == 21, "a long list is cut"
    assert many[-1] == f"{tmp_path / 'zmany.py'}: and 30 more faults"


def test_a_file_that_ends_the_process_or_never_ends_is_one_line(tmp_path):
    (tmp_path / "ends.py").write_text("import os; os._exit(3)")
    with pytest.raises(ValueError, match=r"ends\.py: running it ended the process with exit code 3"):
        audit(Request((str(tmp_path / "ends.py"),)))
    (tmp_path / "sleeps.py").write_text("import time; time.sleep(600)")
    with pytest.raises(ValueError, match=r"sleeps\.py: did not finish running within 2 s"):
        audit(Request((str(tmp_path / "sleeps.py"),), load_timeout_s=2))


def test_a_files_neighbours_import_and_its_prints_harm_nothing(tmp_path):
    (tmp_path / "neighbour_of_audited.py").write_text("BLOCK = 128")
    (tmp_path / "prints.py").write_text(
        HEAD + "from neighbour_of_audited import BLOCK\nprint('{\"number\": 0}')\n"
        "def builds(): return [Build('b', copy, TYPES, {'BLOCK': BLOCK}, ('gfx950',))]"
    )
    result = cli(tmp_path / "prints.py", "--json")
    assert [row["verdict"] for row in json.loads(result.stdout)] == ["ok"]


def test_without_triton_it_says_so(tmp_path, monkeypatch):
    (tmp_path / "triton.py").write_text("raise ImportError('triton is broken here')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    result = cli(KERNELS)
    assert result.exit_code == 1
    assert ours(result) == ["triton cannot be imported: triton is broken here"]


# Compilers that never end


def test_a_hanging_compile_is_a_row_and_leaves_no_process(tmp_path, monkeypatch):
    monkeypatch.setenv("AUDIT_TEST_PIDS", str(tmp_path / "pids"))
    begin = time.monotonic()
    (row,) = audit(Request((HANGING,), timeout_s=3)).rows
    assert row["faults"] == ["did not compile within 3 s"]
    assert time.monotonic() - begin < 120
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2
    assert within(5, lambda: all(gone(pid) for pid in pids)), "the compiler and what it started"


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_and_death_leave_no_process(tmp_path, sign):
    pids = tmp_path / "pids"
    process = subprocess.Popen(
        [sys.executable, "-m", "moebench", "audit", HANGING], env={**os.environ, "AUDIT_TEST_PIDS": str(pids)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    try:
        assert within(60, pids.exists)
        process.send_signal(sign)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert within(10, lambda: all(gone(pid) for pid in pids.read_text().split()))
    if sign == signal.SIGINT:
        assert process.returncode == 130
        assert said.strip() == "moebench: interrupted"
