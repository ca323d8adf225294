"""Users' kernels that are right, but for a call of eight tokens: there each goes wrong in a way of its own."""

import ctypes
import os
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

LATE = 8  # calls before those that hold out for a while go wrong; under any load there are more
CALLS = Counter()


def right(x, ids, weights, w_gate_up, w_down):
    y = torch.zeros_like(x)
    for expert in range(w_down.shape[0]):
        token, place = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ w_gate_up[expert].T).chunk(2, dim=-1)
        y.index_add_(0, token, weights[token, place, None].to(x.dtype) * ((F.silu(gate) * up) @ w_down[expert].T))
    return y


def at_eight(fault, after=0):
    def experts(x, ids, weights, w_gate_up, w_down):
        CALLS[fault] += x.shape[0] == 8
        if x.shape[0] == 8 and CALLS[fault] > after:
            return fault(x)
        return right(x, ids, weights, w_gate_up, w_down)

    return experts


def throwing(error):
    def fault(x):
        raise error

    return fault


def segfault(x):
    ctypes.string_at(0)


def killed_for_memory(x):
    count = Path(os.environ["FAULTS_OOM_KILLS"])  # what stands in for the kernel's counter
    count.write_text(str(int(count.read_text()) + 1))
    os.kill(os.getpid(), 9)


raises = at_eight(throwing(ValueError("on purpose")))
raises_late = at_eight(throwing(ValueError("late")), LATE)
device_memory = at_eight(throwing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")))
device_memory_by_name = at_eight(throwing(RuntimeError("CUDA error: out of memory")))
host_memory = at_eight(throwing(MemoryError()))
host_memory_for_real = at_eight(lambda x: torch.empty(1 << 60))
hangs = at_eight(lambda x: time.sleep(1e6))
segfaults = at_eight(segfault)
segfaults_late = at_eight(lambda x: ctypes.string_at(0), LATE)
is_killed_for_memory = at_eight(killed_for_memory)
not_a_number = at_eight(lambda x: torch.full_like(x, float("nan")))
one_not_a_number = at_eight(lambda x: torch.zeros_like(x).index_fill_(0, torch.tensor([3]), float("nan")))
wrong_shape = at_eight(lambda x: x[:1])
wrong_width = at_eight(lambda x: x[:, :1])
