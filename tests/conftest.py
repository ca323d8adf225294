"""Shared by all tests."""

import os

# What a driver of a GPU leaves for its users: NVIDIA's (in a container and under WSL too), AMD's.
GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia-uvm", "/proc/driver/nvidia", "/dev/dxg", "/dev/kfd")

# Read once, when triton is first imported, which any test may do: without a GPU its kernels run in the interpreter.
if not any(os.path.exists(path) for path in GPU_FILES):
    os.environ.setdefault("TRITON_INTERPRET", "1")
