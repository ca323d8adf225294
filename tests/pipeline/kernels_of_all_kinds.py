"""Users' kernels: two that are right, and one for each way to go wrong."""

import ctypes
import os
import subprocess
import sys
import time

import torch
import torch.nn.functional as F


def right(x, ids, weights, w_gate_up, w_down):
    y = torch.zeros_like(x)
    for expert in range(w_down.shape[0]):
        token, place = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ w_gate_up[expert].T).chunk(2, dim=-1)
        y.index_add_(
            0, token, weights[token, place].to(x.dtype).unsqueeze(1) * ((F.silu(gate) * up) @ w_down[expert].T)
        )
    return y


def chatty(x, ids, weights, w_gate_up, w_down):
    print('{"status": "failed", "reason": "printed"}')
    os.write(1, b"garbage\n\xff\n")
    sys.stdout.write("no end of line")
    subprocess.run(["echo", "from a child"], check=True)
    return right(x, ids, weights, w_gate_up, w_down)


def raises(*_):
    raise ValueError("on purpose\nin two lines")


def declines(*_):
    raise NotImplementedError("not for this shape")


def exhausts(*_):
    return torch.empty(1 << 60)


def python_exhausts(*_):
    return bytearray(1 << 60)


def hangs(*_):
    time.sleep(1e6)


def hangs_beside_a_child(*_):
    subprocess.Popen(["sleep", "1000"])
    time.sleep(1e6)


def segfaults(*_):
    ctypes.string_at(0)


def exits(*_):
    os._exit(3)


def leaves(*_):
    sys.exit("goodbye")


def killed(*_):
    os.kill(os.getpid(), 9)


def closes_every_pipe(*_):
    os.closerange(3, 1000)
    time.sleep(1e6)


def not_a_number(x, *_):
    return torch.full_like(x, float("nan"))


def zeros(x, *_):
    return torch.zeros_like(x)


def wrong_shape(x, *_):
    return x[:1]


def nothing(*_):
    return None


def writes_its_inputs(x, ids, weights, w_gate_up, w_down):
    y = right(x, ids, weights, w_gate_up, w_down)
    x.zero_()
    return y


not_a_function = 3
