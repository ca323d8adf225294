"""Modes: set for a suite, read, and put back when a provider changes them."""

from __future__ import annotations

import io
import json
import os
import queue
import threading
from dataclasses import replace

import pytest
import torch

from moebench.measure.modes import apply_modes, current_modes, put_back, wanted_modes
from moebench.suite import SuiteError, load_suite
from moebench.worker import Worker, serve

ASKED = {"threads": None, "cores": None, "tf32": False, "reduced_precision_reductions": True}


@pytest.fixture(autouse=True)
def as_before():
    before = current_modes()
    yield
    apply_modes(before)
    assert current_modes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"threads": 1},
        {"threads": 2},
        {"tf32": True},
        {"tf32": False},
        {"reduced_precision_reductions": False},
        {"fp16_accumulation": True},
        {"deterministic": True},
        {"default_dtype": "float64"},
    ],
)
def test_each_mode_is_set_and_read_back(change):
    wanted = replace(current_modes(), **change)
    apply_modes(wanted)
    assert current_modes() == wanted


def test_tf32_is_one_value_for_every_switch_of_pytorch():
    for on, precision in ((True, "tf32"), (False, "ieee")):
        apply_modes(replace(current_modes(), tf32=not on))
        apply_modes(replace(current_modes(), tf32=on))
        assert torch.backends.cuda.matmul.allow_tf32 == on
        assert torch.backends.cuda.matmul.fp32_precision == precision
        assert torch.get_float32_matmul_precision() == ("high" if on else "highest")


def test_cores_hold_for_threads_that_run_already():
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        pytest.skip("one core only")
    ready, done, seen = threading.Event(), threading.Event(), []

    def wait():
        ready.set()
        done.wait(10)
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=wait)
    thread.start()
    ready.wait(10)
    apply_modes(wanted_modes(**{**ASKED, "threads": 1, "cores": [usable[-1]]}))
    done.set()
    thread.join()
    assert seen == [{usable[-1]}]
    assert os.sched_getaffinity(0) == {usable[-1]}


def test_what_cannot_be_is_one_line():
    usable = current_modes().cores
    with pytest.raises(ValueError, match=r"modes\.cores: core 4095 is not one of those usable here"):
        wanted_modes(**{**ASKED, "cores": [4095]})
    with pytest.raises(ValueError, match=r"modes\.threads: 4096 threads are more than the \d+ cores"):
        wanted_modes(**{**ASKED, "threads": 4096})
    assert wanted_modes(**{**ASKED, "cores": usable[:1]}).threads == 1, "no more threads than cores"


def test_what_has_changed_is_named_and_put_back():
    held = wanted_modes(**ASKED)
    apply_modes(held)
    assert put_back(held) == []
    torch.set_num_threads(held.threads + 1)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.set_default_dtype(torch.float64)
    assert put_back(held) == ["threads", "tf32", "default_dtype"]
    assert current_modes() == held


def test_a_worker_tells_what_a_message_changed_even_where_it_raised():
    class Meddling(Worker):
        def meddle(self, raises):
            torch.set_num_threads(torch.get_num_threads() + 1)
            if raises:
                raise RuntimeError("on purpose")
            return {}

    requests, replies = queue.Queue(), io.StringIO()
    for request in (
        {"do": "hold", **ASKED},
        {"do": "meddle", "raises": False},
        {"do": "meddle", "raises": True},
        {"do": "close"},
    ):
        requests.put(json.dumps(request))
    requests.put(None)
    serve(Meddling(), requests, replies)
    held, meddled, raised, closed = map(json.loads, replies.getvalue().splitlines())
    assert held["threads"] == torch.get_num_threads()
    assert held["modes"].startswith("tf32=off reduced_precision_reductions=on")
    assert meddled == {"changed_modes": ["threads"]}
    assert raised["status"] == "failed"
    assert raised["changed_modes"] == ["threads"]
    assert closed == {}


def suite_of(folder, name="modes.toml", modes=""):
    path = folder / name
    path.write_text(
        f'name = "modes"\nquestion = "?"\n[modes]\n{modes}\n[[sweep]]\n[sweep.grid]\nprovider = "torch-loop"\n'
        "hidden_size = 16\nexpert_ffn_size = 8\nexperts = 4\ntop_k = 2\ntokens = 4\n"
    )
    return str(path)


def test_a_suite_names_its_modes(tmp_path):
    suite = load_suite([suite_of(tmp_path, modes="threads = 1\ncores = [0]\ntf32 = true")])
    asked = {"threads": 1, "cores": [0], "tf32": True, "reduced_precision_reductions": True}
    assert suite.modes.model_dump() == asked
    assert load_suite(["smoke"]).modes.model_dump() == ASKED


@pytest.mark.parametrize(
    ("modes", "fault"),
    [
        ("threads = 0", "modes.threads: found 0; input should be greater than or equal to 1"),
        ("cores = []", "modes.cores: found []; list should have at least 1 item"),
        ("tf23 = true", "modes.tf23: unknown key; did you mean tf32?"),
    ],
)
def test_bad_modes_are_one_line(tmp_path, modes, fault):
    with pytest.raises(SuiteError) as error:
        load_suite([suite_of(tmp_path, modes=modes)])
    (line,) = error.value.faults
    assert fault in line


def test_suites_of_different_modes_are_not_one_run(tmp_path):
    files = [suite_of(tmp_path, f"{n}.toml", f"threads = {n}") for n in (1, 2)]
    with pytest.raises(SuiteError, match="modes: differ"):
        load_suite(files)
