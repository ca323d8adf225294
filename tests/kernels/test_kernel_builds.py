"""What holds without a GPU: every kernel compiles for one, and the package imports anywhere."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moebench_kernels
from moebench_kernels import interpreting, triton_available

HERE = Path(__file__).parent
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


def python(*arguments: str, interpret: str | None = None) -> str:
    """Standard output of a fresh interpreter that sees the kernels package only."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(moebench_kernels.__file__).parents[1]), environment.get("PYTHONPATH", "")]
    )
    if interpret is not None:
        environment["TRITON_INTERPRET"] = interpret
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built() -> list[dict]:
    """What compile_kernels.py found; Triton's cache, keyed by source, makes a second run quick."""
    return [json.loads(line) for line in python(str(HERE / "compile_kernels.py")).splitlines()]


def test_every_kernel_compiles_and_fits(built: list[dict]) -> None:
    assert not [build for build in built if "error" in build]
    for build in built:
        if build["size_one"]:
            continue  # must compile, but a real launch would take a smaller tile
        assert build["shared_bytes"] <= SHARED_LIMIT[build["capability"]], build
        # 255 is a thread's limit: below it nothing had to spill, at it nothing did if there is no stack (which alone
        # may serve a called division).
        assert build["registers"] < 255 or build["stack_bytes"] == 0, build
    assert {build["capability"] for build in built} == {80, 90}
    assert {build["dtype"] for build in built} == {"fp32", "fp16", "bf16"}


def test_large_tiles_use_hopper_tensor_cores(built: list[dict]) -> None:
    large = [
        b for b in built if b["capability"] == 90 and b["dtype"] == "bf16" and b["name"].startswith(("gemm", "ragged"))
    ]
    assert len(large) >= 4
    assert all(build["wgmma"] for build in large)


def test_no_kernel_is_left_out(built: list[dict]) -> None:
    """Each @jit kernel of the package is among the compiled ones, or among its file's builds (the audit's)."""
    source = (HERE / "compile_kernels.py").read_text()
    package = Path(moebench_kernels.__file__).parent
    kernels = [
        (line.removeprefix("def ").split("(")[0], file.read_text().partition("\ndef builds(")[2])
        for file in package.glob("*.py")
        for line in file.read_text().splitlines()
        if line.startswith("def _") and line.split("(")[0].endswith("_kernel")
    ]
    assert len(kernels) >= 10
    assert not [name for name, declared in kernels if name not in source and name not in declared]


def test_references_work_without_triton() -> None:
    text = python("-c", """
import sys
sys.modules["triton"] = None
import torch, moebench_kernels as mk
print(mk.triton_available(), mk.interpreting())
ids, weights = mk.topk_gate_torch(torch.randn(3, 4), 2)
print(mk.moe_layer_torch(torch.ones(3, 5), ids, weights, torch.ones(4, 6, 5), torch.ones(4, 5, 3)).shape)
try: mk.topk_gate(torch.randn(3, 4), 2)
except ValueError as error: print(error)
""")  # fmt: skip
    assert "(False, 'triton cannot be imported:" in text
    assert "torch.Size([3, 5])" in text
    assert "the Triton kernels cannot run: triton cannot be imported" in text


def test_the_package_never_imports_moebench() -> None:
    text = python(
        "-c", "import sys, moebench_kernels; print([m for m in sys.modules if m.split('.')[0] == 'moebench'])"
    )
    assert text.strip() == "[]"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cpu_tensors_outside_the_interpreter_are_refused() -> None:
    text = python("-c", """
import torch, moebench_kernels as mk
print(mk.triton_available(), mk.interpreting())
try: mk.topk_gate(torch.randn(3, 4), 2)
except ValueError as error: print(error)
""")  # fmt: skip
    assert "(False, 'no GPU; on a CPU set TRITON_INTERPRET=1 before anything imports triton" in text
    assert "the Triton kernels cannot run: no GPU" in text


def test_interpreting_too_late_is_said() -> None:
    text = python("-c", """
import os, triton
os.environ["TRITON_INTERPRET"] = "1"
import moebench_kernels as mk
print(mk.triton_available())
""")  # fmt: skip
    assert "(False, 'TRITON_INTERPRET changed after triton was imported" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU here")
def test_here_the_interpreter_runs() -> None:
    assert interpreting()
    assert triton_available()[0], triton_available()[1]


def test_every_public_function_is_documented() -> None:
    for name in moebench_kernels.__all__:
        value = getattr(moebench_kernels, name)
        if (
            inspect.isfunction(value)
            and not name.endswith("_torch")
            and name not in ("interpreting", "triton_available")
        ):
            assert "Raises:" in value.__doc__, name
            assert "Returns:" in value.__doc__, name
