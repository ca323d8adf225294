"""What holds without a GPU: the package imports anywhere, says why it cannot run, and is documented."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moebench_kernels
from moebench_kernels import interpreting, triton_available


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
            and name not in ("decode_form", "interpreting", "triton_available")  # which have nothing to refuse
        ):
            assert "Raises:" in value.__doc__, name
            assert "Returns:" in value.__doc__, name
