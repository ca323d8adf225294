"""torchao: its differentiable grouped GEMM, which rounds rows of both operands to fp8 as it goes.

What it computes is precision fp8:row, whatever the dtype of the tensors it is given: a point of another precision
is refused rather than computed less exactly than it says.
"""

from __future__ import annotations

from torch import Tensor

from moebench.catalogue.spec import ACTIVATIONS
from moebench.providers import torch_grouped
from moebench.providers.case import Case
from moebench.providers.layer_parts import activate
from moebench.providers.peers import Call, padded_plan, padded_rows, peer, peer_provider, require_capability

ALIGNMENT = 16  # rows of a group, which it does not pad itself


def ready(w_gate_up: Tensor, w_down: Tensor, case: Case) -> Call:
    """Transposed views [E, D, m*F] and [E, F, D] of the bf16 weights, quantised at every call."""
    require_capability("torchao's fp8 grouped GEMM", w_down.device, (9, 10))
    gemm = peer("torchao.prototype.moe_training", "_to_fp8_rowwise_then_scaled_grouped_mm")
    E, activation = w_down.shape[0], case.activation

    def product(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        out: Tensor = gemm(
            rows, weights.transpose(-2, -1), ends, out_dtype=rows.dtype, pad_token_groups_for_grouped_mm=False
        )
        return out

    def call(x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        padded = padded_plan(ids, E, ALIGNMENT)
        rows = padded.pad(torch_grouped.permute(x, padded.plan))
        hidden = activate(product(rows, w_gate_up, padded.ends), activation)
        return torch_grouped.combine(padded.unpad(product(hidden, w_down, padded.ends)), gates, padded.plan)

    return call


def rows_executed(case: Case, counts: Tensor) -> float:
    """Groups of 16 rows, filled or not."""
    return padded_rows(counts, ALIGNMENT)


PROVIDER = peer_provider(
    "torchao",
    ready,
    precisions=("fp8:row",),
    directions=("forward", "forward_backward"),
    activations=ACTIVATIONS,
    multiple_of=16,
    flops_executed=rows_executed,
)
