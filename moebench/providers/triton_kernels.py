"""triton-kernels: OpenAI's ragged matmul, with its fused gather, SwiGLU, router weights and scatter.

Its SwiGLU takes alternating gate and up columns and adds 1 to up, as gpt-oss wants; a bias of -1 on the up
columns takes that back. Its own routing chooses the experts itself, so the sort by expert is PyTorch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebench.providers.case import Case
from moebench.providers.peers import Call, interleave, peer, peer_provider
from moebench.providers.torch_grouped import sort_plan


def ready(w_gate_up: Tensor, w_down: Tensor, case: Case) -> Call:
    """w [E, D, 2F] with alternating columns, and [E, F, D]: transposed views with the inner dimension contiguous."""
    matmul, activation, specs = peer("triton_kernels.matmul", "matmul", "FusedActivation", "FnSpecs")
    metadata = peer("triton_kernels.tensor", "make_ragged_tensor_metadata")
    reduce = peer("triton_kernels.reduce", "reduce")
    swiglu_fn = peer("triton_kernels.swiglu", "swiglu_fn")
    swiglu = activation(specs("swiglu", swiglu_fn, ("alpha", "limit"), reduction_n=2), (1.0, None))
    E, F, K = w_down.shape[0], w_down.shape[2], case.layer.top_k
    w_in, w_out = interleave(w_gate_up).transpose(1, 2), w_down.transpose(1, 2)
    minus_one = torch.tensor([0.0, -1.0], device=w_down.device).repeat(E, F)

    def call(x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        plan = sort_plan(ids, E, drops=False)
        assignment = plan.row2assignment.to(torch.int32)
        ragged = metadata(plan.ends.diff(prepend=plan.ends.new_zeros(1)), ids.numel())
        token = assignment.div(K, rounding_mode="floor")
        hidden = matmul(x, w_in, minus_one, a_ragged_metadata=ragged, gather_indx=token, fused_activation=swiglu)
        weights = gates.flatten()[plan.row2assignment]
        out = matmul(hidden, w_out, None, a_ragged_metadata=ragged, scatter_indx=assignment, gammas=weights)
        y: Tensor = reduce(out.view(x.shape[0], K, -1), dim=1)[0]
        return y

    return call


PROVIDER = peer_provider("triton-kernels", ready, multiple_of=8)
