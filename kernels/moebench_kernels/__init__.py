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
from moebench_kernels.module import GateOptions, MoEExperts, MoELayer
from moebench_kernels.permute import permute, permute_torch
from moebench_kernels.plan import Plan, routing_plan, routing_plan_torch
from moebench_kernels.projections import (
    down_projection,
    down_projection_torch,
    up_projection,
    up_projection_torch,
)
from moebench_kernels.quantise import (
    QuantisedWeights,
    dequantise_weights,
    quantise_rows,
    quantise_rows_torch,
    quantise_weights,
    supported,
)
from moebench_kernels.quantised_gemm import quantised_gemm, quantised_gemm_torch
from moebench_kernels.quantised_layer import quantised_moe_layer, quantised_moe_layer_torch
from moebench_kernels.ragged_gemm import ragged_gemm, ragged_gemm_torch
from moebench_kernels.runtime import interpreting, triton_available

__all__ = [
    "ACTIVATIONS",
    "GateOptions",
    "MoEExperts",
    "MoELayer",
    "Plan",
    "QuantisedWeights",
    "combine",
    "combine_torch",
    "decode_form",
    "decode_layer",
    "decode_layer_torch",
    "dequantise_weights",
    "down_projection",
    "down_projection_torch",
    "grouped_gemm",
    "grouped_gemm_torch",
    "interpreting",
    "moe_layer",
    "moe_layer_torch",
    "permute",
    "permute_torch",
    "quantise_rows",
    "quantise_rows_torch",
    "quantise_weights",
    "quantised_gemm",
    "quantised_gemm_torch",
    "quantised_moe_layer",
    "quantised_moe_layer_torch",
    "ragged_gemm",
    "ragged_gemm_torch",
    "routing_plan",
    "routing_plan_torch",
    "supported",
    "topk_gate",
    "topk_gate_torch",
    "triton_available",
    "up_projection",
    "up_projection_torch",
]
