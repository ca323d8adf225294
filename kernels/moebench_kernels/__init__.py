"""Triton kernels for every stage of a mixture-of-experts layer, each with a reference in plain torch.

Shape letters: T tokens, D hidden size, F expert FFN size, E experts, K top-k.
Importable without triton; see `triton_available`.
"""

from moebench_kernels.activation import ACTIVATIONS
from moebench_kernels.combine import combine, combine_torch
from moebench_kernels.decode import decode_form, decode_layer, decode_layer_torch
from moebench_kernels.gate import topk_gate, topk_gate_torch
from moebench_kernels.grouped_gemm import grouped_gemm, grouped_gemm_torch
from moebench_kernels.layer import moe_layer, moe_layer_torch
from moebench_kernels.permute import permute, permute_torch
from moebench_kernels.plan import Plan, routing_plan, routing_plan_torch
from moebench_kernels.projections import (
    down_projection,
    down_projection_torch,
    up_projection,
    up_projection_torch,
)
from moebench_kernels.ragged_gemm import ragged_gemm, ragged_gemm_torch
from moebench_kernels.runtime import interpreting, triton_available

__all__ = [
    "ACTIVATIONS",
    "Plan",
    "combine",
    "combine_torch",
    "decode_form",
    "decode_layer",
    "decode_layer_torch",
    "down_projection",
    "down_projection_torch",
    "grouped_gemm",
    "grouped_gemm_torch",
    "interpreting",
    "moe_layer",
    "moe_layer_torch",
    "permute",
    "permute_torch",
    "ragged_gemm",
    "ragged_gemm_torch",
    "routing_plan",
    "routing_plan_torch",
    "topk_gate",
    "topk_gate_torch",
    "triton_available",
    "up_projection",
    "up_projection_torch",
]
