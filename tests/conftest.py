"""Shared by all tests."""

import os

# Read once, when triton is first imported, which any test may do: without a GPU its kernels run in the interpreter.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
