"""What a layer keeps between forward and backward, counted, against the form in which every stage keeps its own.

For T tokens of D values of b bytes, K experts of hidden size F each, m maps (2 when gated):

    ours              T*D*b + T*K*mF*b + routing                     x, the pre-activation
    every stage       T*K*(D + mF + 2F + D)*b + routing, more    permuted x, pre-activation, act(gate), hidden, y rows
    like ScatterMoE   T*D*b + T*K*(mF + F + D)*b                     x, pre-activation, hidden, y rows
    like MegaBlocks   T*K*(D + mF + F + D)*b                         permuted x, pre-activation, hidden, y rows

The first two are counted here; the last two are arithmetic on designs of that kind, no measurement of those libraries.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_loops import assert_close, random_ids
from torch import Tensor
from torch.nn import functional

from moebench_kernels import moe_layer, routing_plan

T, E, K, D, F = 48, 4, 2, 32, 16


def kept_bytes(function: Callable[[], Tensor], parameters: list[Tensor]) -> tuple[Tensor, int]:
    """The result, and the bytes of the distinct storages that autograd saved for it, but for the parameters'."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # or a freed storage's address might come twice
        return tensor

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()
    for parameter in parameters:
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return y, sum(storages.values())


def every_stage(x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """The layer from torch's own parts: sort, gather, two grouped products, SwiGLU, weigh, scatter back."""
    order = ids.flatten().argsort(stable=True)
    token = order // ids.shape[1]
    ends = torch.bincount(ids.flatten(), minlength=len(w_gate_up)).cumsum(0).int()
    z = functional.grouped_mm(x[token], w_gate_up.mT, offs=ends)
    gate, up = z.chunk(2, dim=-1)
    answers = functional.grouped_mm(functional.silu(gate) * up, w_down.mT, offs=ends)
    weighed = answers * weights.flatten()[order][:, None].to(answers.dtype)
    return torch.zeros_like(x).index_add(0, token, weighed)


def inputs(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """int64 ids and the leaves x, weights, w_gate_up, w_down."""
    values = [torch.randn(T, D), torch.rand(T, K), torch.randn(E, 2 * F, D) * D**-0.5, torch.randn(E, D, F) * F**-0.5]
    dtypes = [dtype, torch.float32, dtype, dtype]
    leaves = [v.to(device, d).requires_grad_() for v, d in zip(values, dtypes, strict=True)]
    return random_ids(T, E, K).long().to(device), leaves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_bytes_are_the_formula(dtype: torch.dtype, device: torch.device) -> None:
    ids, leaves = inputs(dtype, device)
    x, weights, w_gate_up, w_down = leaves
    y, ours = kept_bytes(lambda: moe_layer(x, ids, weights, w_gate_up, w_down), [w_gate_up, w_down])
    reference, theirs = kept_bytes(lambda: every_stage(x, ids, weights, w_gate_up, w_down), [w_gate_up, w_down])
    assert_close("the same function", y, reference, 5e-2 if dtype == torch.bfloat16 else 1e-5)
    rows, b = T * K, x.element_size()
    routing = weights.nbytes + sum(tensor.nbytes for tensor in routing_plan(ids, E)[:-1])
    assert ours == T * D * b + rows * 2 * F * b + routing
    assert routing <= 12 * rows + 4 * (4 * E + rows // 16 + 8)
    scattermoe = T * D * b + rows * (2 * F + F + D) * b
    megablocks = rows * (D + 2 * F + F + D) * b
    assert theirs >= megablocks
    assert ours < 0.6 * scattermoe
    assert ours < 0.5 * theirs


def test_without_gradient_nothing_is_kept(device: torch.device) -> None:
    ids, leaves = inputs(torch.float32, device)
    frozen = [leaf.detach() for leaf in leaves]
    assert kept_bytes(lambda: moe_layer(frozen[0], ids, *frozen[1:]), [])[1] == 0


def test_a_frozen_layer_on_a_differentiable_input_keeps_no_more(device: torch.device) -> None:
    """Only x wants a gradient: still x, z and the routing, since dx needs them."""
    ids, leaves = inputs(torch.float32, device)
    whole = kept_bytes(lambda: moe_layer(leaves[0], ids, *leaves[1:]), leaves[2:])[1]
    frozen = [leaves[0], *(leaf.detach() for leaf in leaves[1:])]
    assert kept_bytes(lambda: moe_layer(frozen[0], ids, *frozen[1:]), frozen[2:])[1] == whole


@pytest.mark.gpu
def test_peak_on_a_gpu(device: torch.device) -> None:
    """The allocator agrees: what a forward leaves allocated is the formula, the output and the allocator's rounding."""
    big_T, big_D, big_F = 4096, 1024, 512
    values = [torch.randn(big_T, big_D), torch.randn(8, 2 * big_F, big_D), torch.randn(8, big_D, big_F)]
    x, w_gate_up, w_down = (v.to(device, torch.bfloat16).requires_grad_() for v in values)
    ids, weights = random_ids(big_T, 8, K).to(device), torch.rand(big_T, K, device=device)
    moe_layer(x, ids, weights, w_gate_up, w_down)
    before = torch.cuda.memory_allocated()
    y = moe_layer(x, ids, weights, w_gate_up, w_down)
    kept = torch.cuda.memory_allocated() - before - y.nbytes
    expected = 2 * big_T * K * 2 * big_F
    assert expected <= kept < 1.05 * expected + 2**20
