"""What an exception says about the process: whether memory ran out, and whether the device can still be used."""

from __future__ import annotations

import gc

import torch

# PyTorch's allocator for the host, CUDA's libraries and Triton's launcher say so in a bare RuntimeError.
NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def lacks_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def breaks_device(error: BaseException) -> bool:
    """Whether it is a CUDA error other than lack of memory, as PyTorch words them; most of these stay."""
    return isinstance(error, RuntimeError) and "CUDA error" in str(error) and not lacks_memory(error)


def device_is_lost() -> bool:
    """Whether the GPU in use does nothing more for this process.

    An illegal address stays with the process, whoever was told of it and in what words (Triton's and cuBLAS's differ
    from PyTorch's): without this question the next arm would be blamed.
    """
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return not lacks_memory(error)
    return False


def give_back_memory() -> None:
    """What nobody holds any more back to the GPU, cycles included: PyTorch keeps what is freed, a graph's apart."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
