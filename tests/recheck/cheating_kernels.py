"""Users' kernels that give the right answer when they are checked, and do something else while they are timed."""

from __future__ import annotations

import threading
import time

import torch
import torch.nn.functional as F

CHECKED_CALLS = 2  # a check calls twice
BUSY_MS = 3.0

calls: dict[str, int] = {}
kept: dict = {}


def forget() -> None:
    """As in a fresh worker."""
    calls.clear()
    kept.clear()


def later(name: str) -> bool:
    """Whether the check is over."""
    calls[name] = calls.get(name, 0) + 1
    return calls[name] > CHECKED_CALLS


def right(x, ids, weights, w_gate_up, w_down):
    y = torch.zeros_like(x)
    for expert in range(w_down.shape[0]):
        token, pick = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ w_gate_up[expert].T).chunk(2, dim=-1)
        out = (F.silu(gate) * up) @ w_down[expert].T
        y = y.index_add(0, token, out * weights[token, pick].unsqueeze(1).to(x.dtype))
    return y


def busy(*given):
    """Right, and slow enough that keeping the answer pays."""
    y = right(*given)
    end = time.perf_counter() + BUSY_MS / 1e3
    while time.perf_counter() < end:
        pass
    return y


def keeps_while_unchanged(x, *rest):
    """A cache that notices every write to its input, and hands out what it keeps."""
    key = (x.data_ptr(), x._version)
    if key not in kept:
        kept[key] = busy(x, *rest)
    return kept[key]


def keeps_a_copy_while_unchanged(x, *rest):
    key = (x.data_ptr(), x._version)
    if key not in kept:
        kept[key] = busy(x, *rest)
    return kept[key].clone()


def right_at_first(x, *rest):
    return torch.zeros_like(x) if later("right_at_first") else right(x, *rest)


def changes_x_later(x, *rest):
    y = right(x, *rest)
    if later("changes_x"):
        x.add_(1)
    return y


def changes_w_down_later(x, ids, weights, w_gate_up, w_down):
    y = right(x, ids, weights, w_gate_up, w_down)
    if later("changes_w_down"):
        with torch.no_grad():
            w_down.mul_(2)
    return y


def finishes_late(x, *rest):
    """Returns at once and fills its output from another thread: on a GPU that would be another stream."""
    if not later("finishes_late"):
        return right(x, *rest)
    y = torch.zeros_like(x)

    def fill():
        time.sleep(0.001)
        y.copy_(right(x, *rest))

    threading.Thread(target=fill).start()
    return y


def grows_into_x(x, *rest):
    """A right answer behind the input, in the same memory: nothing is allocated."""
    y = right(x, *rest)
    storage, size = x.untyped_storage(), x.numel()
    if storage.nbytes() < 2 * size * x.itemsize:
        storage.resize_(2 * size * x.itemsize)
    out = x.as_strided(x.shape, x.stride(), size)
    out.copy_(y)
    return out


def one_buffer(x, *rest):
    """Honest work into the same output every time."""
    buffer = kept.setdefault(("buffer", x.shape), torch.empty_like(x))
    return buffer.copy_(right(x, *rest))


def sets_threads(x, *rest):
    torch.set_num_threads(1 if torch.get_num_threads() > 1 else 2)
    return right(x, *rest)


def turns_tf32_on(x, *rest):
    torch.backends.cuda.matmul.allow_tf32 = True
    return right(x, *rest)
