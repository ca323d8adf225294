"""Faults: what an exception says about the process, on a GPU that is not there."""

import pytest
import torch

from moebench.measure import faults

ILLEGAL = "Triton Error [CUDA]: an illegal memory access was encountered"


@pytest.fixture
def gpu(monkeypatch):
    """Says what `synchronize` is to raise, and what was asked of it."""
    asked, raises = [], []

    def synchronize():
        asked.append("synchronize")
        if raises:
            raise raises[0]

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append("empty_cache"))
    return asked, raises


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (torch.OutOfMemoryError("Tried to allocate 4 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError(ILLEGAL), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_ran_out(error, lacks):
    assert faults.lacks_memory(error) is lacks


@pytest.mark.parametrize(
    ("raised", "lost"),
    [
        (None, False),  # the launch was refused (a descriptor, shared memory): the device goes on
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
    ],
)
def test_the_device_itself_is_asked_whether_it_is_lost(gpu, raised, lost):
    """Whatever words the error had: Triton's are not PyTorch's."""
    assert not faults.breaks_device(RuntimeError(ILLEGAL))
    asked, raises = gpu
    raises += [raised] if raised else []
    assert faults.device_is_lost() is lost
    assert asked == ["synchronize"]


def test_without_a_gpu_in_use_nothing_is_lost_or_given_back(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    asked, _ = gpu
    faults.give_back_memory()
    assert faults.device_is_lost() is False
    assert asked == []


def test_memory_in_cycles_goes_back_too(gpu):
    class Held:
        pass

    gone = []
    held = Held()
    held.itself = held
    Held.__del__ = lambda self: gone.append(1)
    del held
    asked, _ = gpu
    faults.give_back_memory()
    assert gone == [1]
    assert asked == ["empty_cache"]
