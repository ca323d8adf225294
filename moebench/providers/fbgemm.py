"""fbgemm: the Triton grouped GEMM and silu_mul of FBGEMM GenAI.

Its index_shuffling chooses the experts itself, so the sort by expert is PyTorch's. Dropped assignments are sorted
behind the last group, where it does not look. Its silu_mul takes widths of a multiple of 1024 only (of 512 for fewer
rows than the GPU has multiprocessors); for others the activation is PyTorch's.
"""

from __future__ import annotations

from torch import Tensor

from moebench.providers import torch_grouped
from moebench.providers.case import Case
from moebench.providers.layer_parts import activate
from moebench.providers.peers import Call, peer, peer_provider
from moebench.providers.torch_grouped import sort_plan

SILU_MUL_WIDTH = 1024


def ready(w_gate_up: Tensor, w_down: Tensor, case: Case) -> Call:
    """Views [E*2F, D] and [E*D, F] of the weights."""
    gemm = peer("fbgemm_gpu.experimental.gemm.triton_gemm.grouped_gemm", "grouped_gemm")
    silu_mul = peer("fbgemm_gpu.experimental.gen_ai.moe", "silu_mul")
    E, F, drops = w_down.shape[0], w_down.shape[2], case.drops
    w_in, w_out = w_gate_up.flatten(0, 1), w_down.flatten(0, 1)

    def call(x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        plan = sort_plan(ids, E, drops=drops)
        sizes = plan.ends.diff(prepend=plan.ends.new_zeros(1))
        up = gemm(torch_grouped.permute(x, plan), w_in, sizes)
        hidden = activate(up, "swiglu") if F % SILU_MUL_WIDTH else silu_mul(up[:, :F], up[:, F:])
        return torch_grouped.combine(gemm(hidden, w_out, sizes), gates, plan)

    return call


PROVIDER = peer_provider("fbgemm", ready, precisions=("bf16",), accepts_drops=True, multiple_of=8)
