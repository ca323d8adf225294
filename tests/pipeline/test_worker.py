"""The real worker, one for all these tests: what it answers, also when a kernel raises, lies or prints."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from pipeline.stand_in import Answers
from pipeline.tiny import environment

from moebench.catalogue.spec import LayerSpec
from moebench.entry import plain
from moebench.point import Problem, Variant
from moebench.remote import Remote, WorkerLost

KERNELS = Path(__file__).with_name("kernels_of_all_kinds.py")
PROBLEM = Problem("custom", LayerSpec(16, 8, 4, 2), 4, "uniform")
OPENED = {"problem": plain(PROBLEM), "precisions": ["fp32"]}


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    remote = Remote(tmp_path_factory.mktemp("worker") / "worker.log", {})
    remote.hello = remote.ask("hello", deadline_s=120, device_kind="cpu")
    yield remote
    remote.kill()


@pytest.fixture
def ask(worker):
    """Asks with a block open."""
    worker.ask("open", deadline_s=60, **OPENED)
    return lambda do, **arguments: worker.ask(do, deadline_s=60, **arguments)


def arm_of(ask, provider, index=0, **changes):
    return ask("arm", index=index, variant=plain(Variant(f"{KERNELS}:{provider}", **changes)))


def test_the_straw_answers_as_the_worker_does(worker, ask):
    """Else the tests with workers of straw would prove nothing."""
    straw = Answers()
    arm = {"index": 0, "variant": plain(Variant("torch-loop"))}
    yardstick = {"index": 1, "name": "gemm", "precision": "fp32", "flops": 4096.0}
    messages = [
        ("provider", {"name": "torch-loop"}),
        ("provider", {"name": "none.py:f"}),
        ("ceilings", {"precisions": ["fp32"], "seconds": 0.02}),
        ("open", OPENED), ("arm", arm), ("yardstick", yardstick), ("check", {"index": 0}), ("check", {"index": 1}),
        ("warm", {"index": 0, "max_seconds": 0.05, "timer": "auto", "cache": "cold"}),
        ("memory", {"index": 0}), ("state_begin", {}),
        ("burst", {"index": 0, "count": 3, "start": 0}), ("state_end", {}), ("drop", {"index": 0}),
    ]  # fmt: skip
    shapes = {"hello": (worker.hello, straw.hello("cpu"))}
    shapes |= {do: (ask(do, **arguments), getattr(straw, do)(**arguments)) for do, arguments in messages}
    for do, (real, made) in shapes.items():
        assert set(real) == set(made), do
        for name in real.keys() & made.keys():
            assert isinstance(made[name], type(real[name])) or real[name] is None, (do, name)
    assert len(shapes["burst"][0]["device_ms"]) == 3


def test_energy_without_a_meter_says_so(ask):
    ask("arm", index=0, variant=plain(Variant("torch-loop")))
    ask("warm", index=0, max_seconds=0.02, timer="auto", cache="cold")
    for found in (
        ask("idle", window_s=0.05, cool_down_s=0.0), ask("energy", index=0, window_s=0.05, cool_down_s=0.0),
    ):  # fmt: skip
        assert "source" in found
        assert "reason" in found if found["source"] == "none" else "joules" in found


@pytest.mark.parametrize(
    ("kernel", "status", "reason"),
    [
        ("raises", "failed", "ValueError: on purpose in two lines"),
        ("declines", "not_applicable", "NotImplementedError: not for this shape"),
        ("exhausts", "out_of_memory", "RuntimeError: "),
        ("python_exhausts", "out_of_memory", "MemoryError: "),
    ],
)
def test_what_raises_answers_with_its_status(ask, kernel, status, reason):
    assert "status" not in arm_of(ask, kernel)
    reply = ask("check", index=0)
    assert reply["status"] == status
    assert reply["reason"].startswith(reason)
    assert "\n" not in reply["reason"]


@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [
        ("right", None),
        ("chatty", None),
        ("not_a_number", "nan"),
        ("zeros", "rel"),
        ("wrong_shape", "shape"),
        ("nothing", "None"),
        ("writes_its_inputs", "changed its input x"),
    ],
)
def test_answers_are_judged(ask, kernel, wrong):
    arm_of(ask, kernel)
    verdict = ask("check", index=0)
    assert "status" not in verdict, verdict
    if wrong is None:
        assert verdict["wrong"] is None
        assert verdict["rel_error"] < 1e-5
    else:
        assert wrong.lower() in verdict["wrong"].lower()


def test_what_is_printed_goes_to_the_log_and_never_looks_like_a_reply(worker, ask):
    arm_of(ask, "chatty")
    ask("check", index=0)
    assert ask("drop", index=0) == {}
    said = worker.log.read_bytes()
    for text in (b'"reason": "printed"', b"garbage\n\xff", b"from a child"):
        assert text in said


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none.py:f", "there is no file 'none.py'"),
        (f"{KERNELS}:rigth", "has no 'rigth' (functions in it: right, chatty"),
        (f"{KERNELS}:not_a_function", "is a int, not a function"),
        ("torch-lop", "did you mean 'torch-loop'"),
    ],
)
def test_what_cannot_be_loaded_says_why(ask, name, reason):
    assert reason in ask("provider", name=name)["unavailable"]


def test_a_file_that_does_not_import_says_why(ask, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import no_such_library\n")
    assert "ModuleNotFoundError: No module named 'no_such_library'" in ask("provider", name=f"{path}:f")["unavailable"]
    path.write_text("def f(:\n")
    assert "SyntaxError: " in ask("provider", name=f"{path}:f")["unavailable"]


def test_a_kernels_hash_is_that_of_its_file(ask, tmp_path):
    path = tmp_path / "kernel.py"
    path.write_text("def f(x, *_): return x\n")
    first = ask("provider", name=f"{path}:f")
    assert ask("provider", name=f"{path}:f") == first
    path.write_text("def f(x, *_): return -x\n")
    assert ask("provider", name=f"{path}:f")["hash"] != first["hash"]


def test_weights_that_do_not_fit_are_refused_before_they_are_made(worker):
    huge = Problem("custom", LayerSpec(1 << 16, 1 << 16, 1 << 10, 2), 4, "uniform")
    reply = worker.ask("open", deadline_s=60, problem=plain(huge), precisions=["fp32"])
    assert reply["status"] == "out_of_memory"
    assert "the layer's weights need" in reply["reason"]


def test_what_an_interpreter_runs_is_checked_on_a_twin_and_not_timed(ask):
    reply = ask("arm", index=0, variant=plain(Variant("triton")))
    assert reply["timed"] is False
    assert "interpreter" in reply["checked_on"]


@pytest.fixture
def doomed(tmp_path):
    """A worker of one's own, with a kernel of the given name ready to be checked."""
    remotes = []

    def start(kernel):
        remotes.append(Remote(tmp_path / "worker.log", {}))
        for do, arguments in (("hello", {"device_kind": "cpu"}), ("open", OPENED)):
            remotes[0].ask(do, deadline_s=120, **arguments)
        arm_of(lambda do, **arguments: remotes[0].ask(do, deadline_s=60, **arguments), kernel)
        return remotes[0]

    yield start
    for remote in remotes:
        remote.kill()


def test_a_lost_worker_names_the_message_in_flight(doomed):
    with pytest.raises(WorkerLost) as lost:
        doomed("closes_every_pipe").ask("check", deadline_s=60, index=0)
    assert (lost.value.status, lost.value.reason) == ("crashed", "check: the worker ended with signal SIGKILL")


def test_when_the_parent_goes_the_worker_goes_in_the_middle_of_what_it_runs(doomed):
    process = doomed("hangs")._process
    process.stdin.write('{"do": "check", "index": 0}\n')
    process.stdin.flush()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.stdin.close()
    assert process.wait(timeout=10) == -signal.SIGKILL


def test_when_the_parent_dies_what_a_provider_has_started_goes_too(tmp_path):
    """Nobody is left then who could end it; a `Remote`, which lives on here, would."""
    messages = [
        {"do": "hello", "device_kind": "cpu"}, {"do": "open", **OPENED},
        {"do": "arm", "index": 0, "variant": plain(Variant(f"{KERNELS}:hangs_beside_a_child"))},
        {"do": "check", "index": 0},
    ]  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "moebench.worker"], stdin=subprocess.PIPE, stdout=log, stderr=log,
            env=environment(), text=True, start_new_session=True,
        )  # fmt: skip
    worker.stdin.write("".join(json.dumps(message) + "\n" for message in messages))
    worker.stdin.flush()
    deadline = time.monotonic() + 60
    while not (children := psutil.Process(worker.pid).children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children, (tmp_path / "log").read_text()
    worker.stdin.close()
    worker.wait(timeout=10)
    gone, left = psutil.wait_procs(children, timeout=10)
    for child in left:
        child.kill()
    assert gone == children


@pytest.mark.parametrize(
    ("error", "fatal"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("shapes do not match"), False),
        (ValueError("CUDA error in a message of another kind"), False),
    ],
)
def test_what_breaks_the_device_for_everyone(error, fatal):
    from moebench.worker import breaks_device

    assert breaks_device(error) is fatal
