"""What users might bring: one right kernel, and wrong ones that a check must catch. Loaded by path, never imported."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def right(x, ids, weights, w_gate_up, w_down):
    y = torch.zeros_like(x)
    for expert in range(w_down.shape[0]):
        token, pick = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ w_gate_up[expert].T).chunk(2, dim=-1)
        out = (F.silu(gate) * up) @ w_down[expert].T
        y = y.index_add(0, token, out * weights[token, pick].unsqueeze(1).to(x.dtype))
    return y


right.accepts_drops = True
right.version = "1.2"

_kept: dict = {}


def caches_output(x, *rest):
    return _kept.setdefault("output", right(x, *rest))


def caches_a_copy(x, *rest):
    if "copy" not in _kept:
        _kept["copy"] = right(x, *rest).clone()
    return _kept["copy"].clone()


def caches_plan(x, ids, *rest):
    """A plan kept by the buffer's address, which outlives its contents."""
    stale = _kept.setdefault(ids.data_ptr(), ids.clone())
    return right(x, stale, *rest)


def unwritten_buffer(x, *rest):
    if "buffer" not in _kept:
        _kept["buffer"] = torch.empty_like(x)
        _kept["buffer"].copy_(right(x, *rest))
    return _kept["buffer"]


def half_written_buffer(x, *rest):
    """Writes all rows the first time, and only the first half of them from then on."""
    buffer = _kept.setdefault("half", torch.empty_like(x))
    half = len(x) // 2 if "written" in _kept else len(x)
    _kept["written"] = True
    buffer[:half] = right(x, *rest)[:half]
    return buffer


def changes_x(x, *rest):
    y = right(x, *rest)
    x.add_(1)
    return y


def changes_ids(x, ids, *rest):
    y = right(x, ids, *rest)
    ids[0, 0] = (ids[0, 0] + 1) % 8
    return y


def changes_weights(x, ids, weights, *rest):
    y = right(x, ids, weights, *rest)
    weights.mul_(0.5)
    return y


def writes_into_x(x, *rest):
    return x.copy_(right(x, *rest))


def zeroes_w_down(x, ids, weights, w_gate_up, w_down):
    with torch.no_grad():
        w_down.zero_()
    return torch.zeros_like(x)


def swaps_rows_of_w_gate_up(x, ids, weights, w_gate_up, w_down):
    """A right answer, and then a re-layout in place, as a kernel with a weight format of its own might do."""
    y = right(x, ids, weights, w_gate_up, w_down)
    w_gate_up.copy_(w_gate_up.roll(1, dims=1).clone())
    return y


def returns_x(x, *rest):
    return x


def returns_view_of_x(x, *rest):
    return x[:]


def transposed(x, *rest):
    return right(x, *rest).T


def too_few_rows(x, *rest):
    return right(x, *rest)[:-1]


def other_dtype(x, *rest):
    return right(x, *rest).double()


def in_bf16(x, ids, weights, w_gate_up, w_down):
    """Fast and loose: bfloat16 inside, the asked dtype outside."""
    low = torch.bfloat16
    return right(x.to(low), ids, weights, w_gate_up.to(low), w_down.to(low)).to(x.dtype)


def nan_in_one_row(x, *rest):
    y = right(x, *rest).clone()
    y[len(x) // 3] = float("nan")
    return y


def infinite_element(x, *rest):
    y = right(x, *rest).clone()
    y[0, 0] = float("inf")
    return y


def drops_expert(x, ids, weights, w_gate_up, w_down):
    most = ids[ids >= 0].mode().values
    return right(x, ids.where(ids != most, -1), weights, w_gate_up, w_down)


def drops_last_pick(x, ids, weights, *rest):
    return right(x, ids[:, :-1], weights[:, :-1], *rest)


def ignores_weights(x, ids, weights, *rest):
    return right(x, ids, torch.ones_like(weights), *rest)


def weights_input(x, ids, weights, *rest):
    """The weight on the expert's input instead of its output."""
    return right(x * weights[:, :1], ids, torch.ones_like(weights), *rest)


def up_before_gate(x, ids, weights, w_gate_up, w_down):
    gate, up = w_gate_up.chunk(2, dim=1)
    return right(x, ids, weights, torch.cat([up, gate], dim=1), w_down)


def gelu_for_silu(x, ids, weights, w_gate_up, w_down):
    y = torch.zeros_like(x)
    for expert in range(w_down.shape[0]):
        token, pick = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ w_gate_up[expert].T).chunk(2, dim=-1)
        out = (F.gelu(gate) * up) @ w_down[expert].T
        y = y.index_add(0, token, out * weights[token, pick].unsqueeze(1).to(x.dtype))
    return y


def wrong_sign(x, *rest):
    y = right(x, *rest).clone()
    flat = y.view(-1)
    at = flat.abs().argsort()[flat.numel() // 2]
    flat[at] = -flat[at]
    return y


def drops_nothing(x, ids, weights, *rest):
    """Sends dropped assignments to expert 0."""
    return right(x, ids.clamp(min=0), weights.clamp(min=0.25), *rest)


drops_nothing.accepts_drops = True


def returns_tuple(x, *rest):
    return right(x, *rest), None


def returns_none(x, *rest):
    return None


def raises(x, *rest):
    raise RuntimeError("no kernel image is available")


# Right forward, wrong backward.


def _twice(value):
    """The same value, twice the gradient."""
    return 2 * value - value.detach()


def detached_output(x, *rest):
    return right(x, *rest).detach()


def detached_weights(x, ids, weights, *rest):
    return right(x, ids, weights.detach(), *rest)


def detached_x(x, *rest):
    return right(x.detach(), *rest)


def detached_w_down(x, ids, weights, w_gate_up, w_down):
    return right(x, ids, weights, w_gate_up, w_down.detach())


def scaled_dx(x, *rest):
    return right(_twice(x), *rest)


def scaled_dweights(x, ids, weights, *rest):
    return right(x, ids, _twice(weights), *rest)


def scaled_dw_gate_up(x, ids, weights, w_gate_up, w_down):
    return right(x, ids, weights, _twice(w_gate_up), w_down)


def gradient_for_idle_experts(x, ids, weights, w_gate_up, w_down):
    total = w_down.sum()
    return right(x, ids, weights, w_gate_up, w_down) + (total - total.detach())
