"""Tensor descriptors, by which the hardware copies whole tiles (TMA)."""

from typing import Any

from torch import Tensor


def descriptor(tensor: Tensor, shape: list[int], block: list[int]) -> Any:
    """A TMA descriptor of a contiguous tensor seen as `shape`, or None where one would not be aligned to 16 bytes.

    Strides are those of the shape, not the tensor's: of a size of 1 the tensor's may be anything.
    """
    row = shape[-1] * tensor.element_size()
    if tensor.data_ptr() % 16 or row % 16 or min(shape) < 1 or max(shape) >= 2**31:
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor  # here: the library imports without triton

    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return TensorDescriptor(tensor, shape, strides, block)


def operand(tensor: Tensor, shape: list[int], block: list[int], wanted: bool) -> tuple[Any, bool]:
    """What a kernel takes, and whether that is a descriptor: where one is wanted and possible, else the tensor."""
    found = descriptor(tensor, shape, block) if wanted else None
    return (tensor, False) if found is None else (found, True)
