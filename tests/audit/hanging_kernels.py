"""A kernel that never ends compiling, with a child as ptxas would be one; both write down who they are."""

import os
import subprocess
import time

import triton
import triton.language as tl

from moebench_kernels.build import Build


class Hang:
    """A class, since Triton would follow a function to hash it."""

    def __init__(self):
        child = subprocess.Popen(["sleep", "600"])
        partial = f"{os.environ['AUDIT_TEST_PIDS']}.partial"
        with open(partial, "w") as file:
            file.write(f"{os.getpid()} {child.pid}")
        os.replace(partial, os.environ["AUDIT_TEST_PIDS"])
        time.sleep(600)


@triton.constexpr_function
def never():
    Hang()
    return 0.0


@triton.jit
def hang(x_ptr):
    tl.store(x_ptr, never())


BUILDS = [Build("hang", hang, {"x_ptr": "*fp32"}, {}, ("sm_80",))]
