"""The one door to NVML (nvidia-ml-py): what is missing is None, never an exception."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def open_gpu(index: int = 0) -> tuple[Any, str | None]:
    """(NVML handle of CUDA device `index`, None), or (None, the reason why there is none).

    Found by UUID: CUDA_VISIBLE_DEVICES renumbers devices for CUDA and not for NVML.
    """
    try:
        import pynvml
    except ImportError as error:
        return None, f"nvidia-ml-py is not installed ({error})"
    import torch

    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
        return pynvml.nvmlDeviceGetHandleByUUID(uuid), None
    except (pynvml.NVMLError, RuntimeError, AssertionError) as error:  # torch asserts where it has no CUDA
        return None, f"NVML: {error}"


def ask(query: Callable[[], T]) -> T | None:
    """The answer of one NVML query; None where this device, driver or container does not support it."""
    import pynvml

    try:
        return query()
    except pynvml.NVMLError:
        return None
