"""The product of two tiles, as every GEMM here takes it."""

from moebench_kernels.runtime import jit, tl


@jit
def dot(a, b, total, INTERPRET: tl.constexpr):
    """total + a @ b. The interpreter holds bfloat16 as raw 16-bit integers and would multiply those: widen first."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
