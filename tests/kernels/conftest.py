"""Where there is no GPU the kernels run in Triton's interpreter, which must be chosen before triton is imported."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device whose kernels are under test."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU, saying so; beside an idle one too: interpreted kernels would pass and say nothing."""
    reason = None if torch.cuda.is_available() else "needs a CUDA GPU"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        reason = reason or "TRITON_INTERPRET is set: the GPU would run nothing"
    for item in items if reason else ():
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))
