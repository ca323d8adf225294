"""The runner of the published measurements: tests before numbers, what fits into the minutes, resuming."""

import json
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from moebench_suites import measure_gpu
from moebench_suites.measure_gpu import Clock, exit_code, finished, main, measured, passed

from moebench.suite import shipped

GREEN = '<testsuites><testsuite><testcase name="a"/></testsuite></testsuites>'
TINY = """
name = "tiny"
question = "Does it go on?"
[budget]
seconds_per_point = {seconds}
[[sweep]]
[sweep.grid]
hidden_size = 16
expert_ffn_size = 16
experts = 4
top_k = 2
tokens = {tokens}
provider = "torch-loop"
"""


def of(*cases):
    return GREEN.replace('<testcase name="a"/>', "".join(cases))


@pytest.mark.parametrize(
    ("results", "green"),
    [
        (GREEN, True),
        (of('<testcase><skipped message="needs 40 GB"/></testcase>', "<testcase/>"), True),
        (of('<testcase><skipped message="no CUDA GPU"/></testcase>', "<testcase/>"), False),
        (of('<testcase><skipped message="needs a CUDA GPU"/></testcase>', "<testcase/>"), False),
        (of('<testcase><skipped message="TRITON_INTERPRET is set"/></testcase>', "<testcase/>"), False),
        (of('<testcase><skipped message="needs 40 GB"/></testcase>'), False),
        (of("<testcase><failure/></testcase>", "<testcase/>"), False),
        (of("<testcase><error/></testcase>", "<testcase/>"), False),
        (of(), False),
    ],
)
def test_green_means_that_something_ran_and_all_of_it_passed(results, green):
    assert passed(results) is green


@pytest.fixture
def pytest_runs(monkeypatch):
    """Stands for pytest: the results that its next runs write, and what it was asked."""
    asked, results = [], [GREEN, GREEN]

    def run(words, **_):
        asked.append(words)
        target = next(word for word in words if word.startswith("--junitxml=")).partition("=")[2]
        with open(target, "w") as file:
            file.write(results[len(asked) - 1])
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(measure_gpu.subprocess, "run", run)
    monkeypatch.setattr(measure_gpu, "device_name", lambda: "NVIDIA H200")
    return asked, results


def test_green_tests_are_run_once_for_one_source_and_one_device(pytest_runs, tmp_path, monkeypatch):
    asked, results = pytest_runs
    assert measure_gpu.tested(tmp_path, Clock(time.monotonic() + 60))
    assert [words[words.index("-m", 3) + 1] for words in asked] == ["gpu and not full"] * 2
    assert "tests/gpu" in asked[0]
    assert "tests/kernels" in asked[1]
    assert measure_gpu.tested(tmp_path, Clock(time.monotonic() + 60))
    assert len(asked) == 2
    monkeypatch.setattr(measure_gpu, "source_hash", lambda: "changed")
    results += [GREEN, GREEN]
    assert measure_gpu.tested(tmp_path, Clock(time.monotonic() + 60))
    assert len(asked) == 4


def test_a_red_test_is_in_the_way_of_every_number(pytest_runs, tmp_path, monkeypatch):
    _, results = pytest_runs
    results[0] = of("<testcase><failure/></testcase>")
    monkeypatch.setattr(measure_gpu, "measured", lambda *_: pytest.fail("measured all the same"))
    done = CliRunner().invoke(main, ["--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "no number is taken" in done.output
    assert not (tmp_path / "gpu-tests.json").exists()


def test_results_are_where_they_are_looked_for_from_any_folder(pytest_runs, tmp_path, monkeypatch):
    asked, _ = pytest_runs
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure_gpu, "measured", lambda *_: "complete")
    assert CliRunner().invoke(main, ["--out", "runs"]).exit_code == 0
    assert f"--junitxml={tmp_path}/runs/gpu-tests-1.xml" in asked[0]


def test_it_knows_every_suite_of_its_kind():
    assert sorted(measure_gpu.ORDER) == [name for name in shipped() if name.startswith("h200-")]


def test_a_suite_that_does_not_fit_is_not_begun_and_one_that_does_is(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY.format(seconds=0.05, tokens=4))
    words = ["--out", str(tmp_path / "runs"), "--device", "cpu", str(tmp_path / "tiny.toml")]
    short = CliRunner().invoke(main, [*words, "--minutes", "0.1"])
    assert short.exit_code == 3
    assert "not begun: it takes some" in short.output
    assert finished(tmp_path / "runs" / "tiny") is None
    done = CliRunner().invoke(main, [*words, "--minutes", "5"])
    assert done.exit_code == 0, done.output
    assert finished(tmp_path / "runs" / "tiny") == "complete"
    manifest = (tmp_path / "runs" / "tiny" / "manifest.json").read_bytes()
    assert CliRunner().invoke(main, words).exit_code == 0
    assert (tmp_path / "runs" / "tiny" / "manifest.json").read_bytes() == manifest, "a complete run is left alone"


@pytest.mark.slow
def test_a_suite_that_is_cut_off_keeps_what_it_has_and_goes_on(tmp_path, monkeypatch):
    (tmp_path / "tiny.toml").write_text(TINY.format(seconds=0.05, tokens=[1, 2]))
    monkeypatch.setattr(measure_gpu, "expected_seconds", lambda *_: 0.0)
    monkeypatch.setattr(measure_gpu, "_until", interrupted_after_a_block(tmp_path / "runs" / "tiny"))
    name, out = str(tmp_path / "tiny.toml"), tmp_path / "runs"
    assert measured(name, out, "cpu", (), Clock(time.monotonic() + 600)) == "cut off"
    assert finished(out / "tiny") == "interrupted"
    lines = (out / "tiny" / "journal.jsonl").read_text().splitlines()
    monkeypatch.undo()
    assert measured(name, out, "cpu", (), Clock(time.monotonic() + 600)) == "complete"
    assert (out / "tiny" / "journal.jsonl").read_text().splitlines()[: len(lines)] == lines


def interrupted_after_a_block(folder):
    def until(words, seconds):
        reset = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
        process = subprocess.Popen(words, preexec_fn=reset)
        while not (folder / "journal.jsonl").exists() or not (folder / "journal.jsonl").read_bytes().count(b"\n"):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        return process.wait(60)

    return until


def test_what_hangs_is_killed(monkeypatch):
    monkeypatch.setattr(measure_gpu, "CUT_OFF_S", 0.3)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    begin = time.monotonic()
    assert measure_gpu._until([sys.executable, "-c", deaf], 1.0) == 130
    assert time.monotonic() - begin < 30


def test_bad_words_are_said_once_and_end_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "moebench_suites.measure_gpu", "--device", "cpu", "--out", str(tmp_path), "no-suite"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("moebench: unknown suite 'no-suite'")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["complete", "complete"], 0),
        (["complete", "not begun: it takes some 9 s"], 3),
        (["cut off"], 3),
        (["failed: exit code 1", "cut off"], 1),
    ],
)
def test_exit_codes(states, code):
    assert exit_code(states) == code


def test_a_run_that_was_killed_is_begun(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"finished": None}))
    assert finished(tmp_path) == "begun"
    (tmp_path / "manifest.json").write_text("{")
    assert finished(tmp_path) is None
