"""deepgemm: DeepGEMM's grouped bf16 GEMM over a contiguous layout whose groups start at its block size.

It has no permutation: sorting, padding and the weighted sum are PyTorch's, and are part of what is timed. It
compiles its kernels at the first call, for which it needs nvcc.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebench.catalogue.spec import ACTIVATIONS
from moebench.providers import torch_grouped
from moebench.providers.case import Case
from moebench.providers.layer_parts import activate
from moebench.providers.peers import Call, PaddedPlan, padded_plan, padded_rows, peer, peer_provider, require_capability

ALIGNMENT = 128  # its default; the library is asked where it runs


def ready(w_gate_up: Tensor, w_down: Tensor, case: Case) -> Call:
    """w_gate_up [E, m*F, D], w_down [E, D, F], as they are (nt)."""
    require_capability("deepgemm", w_down.device, (9,))
    gemm, alignment = peer("deep_gemm", "m_grouped_bf16_gemm_nt_contiguous", "get_mk_alignment_for_contiguous_layout")
    E, activation, block = w_down.shape[0], case.activation, int(alignment())

    def product(rows: Tensor, weights: Tensor, groups: Tensor) -> Tensor:
        out = rows.new_empty(rows.shape[0], weights.shape[1])
        gemm(rows, weights, out, groups)
        return out

    def call(x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        padded = padded_plan(ids, E, block)
        groups = group_of_rows(padded, ids)
        hidden = activate(product(padded.pad(torch_grouped.permute(x, padded.plan)), w_gate_up, groups), activation)
        return torch_grouped.combine(padded.unpad(product(hidden, w_down, groups)), gates, padded.plan)

    return call


def group_of_rows(padded: PaddedPlan, ids: Tensor) -> Tensor:
    """The expert of each padded row, -1 in the gaps: int32 [rows]."""
    expert = ids.flatten()[padded.plan.row2assignment].to(torch.int32)
    empty = torch.full((padded.rows,), -1, dtype=torch.int32, device=ids.device)
    return empty.index_copy(0, padded.row2padded, expert)


def rows_executed(case: Case, counts: Tensor) -> float:
    """Blocks of 128 rows, filled or not."""
    return padded_rows(counts, ALIGNMENT)


PROVIDER = peer_provider(
    "deepgemm",
    ready,
    precisions=("bf16",),
    activations=ACTIVATIONS,
    multiple_of=64,
    flops_executed=rows_executed,
)
