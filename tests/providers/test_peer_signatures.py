"""Where a peer is installed: its functions still have the arguments that the adapters pass."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

# module -> function -> the arguments passed, in order; keywords are marked by "=".
PASSED: dict[str, dict[str, tuple[str, ...]]] = {
    "liger_kernel.ops": {
        "LigerFusedMoEFunction.forward": ("ctx", "x", "gate_up_proj", "down_proj", "top_k_index", "top_k_weights")
    },
    "moe_ops": {
        "permute": ("input", "indices", "E="),
        "grouped_gemm": ("A", "B", "offsets", "trans_b="),
        "unpermute": ("input", "row_id_map", "prob", "num_tokens=", "num_topK="),
    },
    "scattermoe.parallel_experts": {
        "parallel_linear": ("inputs", "expert_weights", "k", "sorted_expert_idxs", "sorted_scattered_idxs",
                            "expert_offsets", "gates=", "grouped_in=", "grouped_out="),
    },
    "triton_kernels.matmul": {
        "matmul": ("a", "b", "bias", "a_ragged_metadata=", "gather_indx=", "scatter_indx=", "gammas=",
                   "fused_activation="),
        "FusedActivation": ("specs", "fn_args"),
        "FnSpecs": ("name", "fn", "fn_arg_names", "reduction_n="),
    },
    "triton_kernels.tensor": {"make_ragged_tensor_metadata": ("slice_sizes", "n_total_rows")},
    "triton_kernels.reduce": {"reduce": ("x", "dim=")},
    "triton_kernels.swiglu": {"swiglu_fn": ()},
    "sonicmoe": {
        "moe_general_routing_inputs": ("x", "router_scores", "token_indices", "expert_indices", "w1", "b1", "w2", "b2",
                                       "E=", "stream_id=", "activation_type=", "is_inference_mode_enabled=",
                                       "concat_layout="),
    },
    "deep_gemm": {"m_grouped_bf16_gemm_nt_contiguous": (), "get_mk_alignment_for_contiguous_layout": ()},
    "fbgemm_gpu.experimental.gemm.triton_gemm.grouped_gemm": {"grouped_gemm": ("x", "w", "m_sizes")},
    "fbgemm_gpu.experimental.gen_ai.moe": {"silu_mul": ("x0", "x1")},
    "torchao.prototype.moe_training": {
        "_to_fp8_rowwise_then_scaled_grouped_mm": ("A", "B_t", "offs", "out_dtype=",
                                                   "pad_token_groups_for_grouped_mm="),
    },
    "vllm.model_executor.layers.fused_moe": {
        "fused_experts": ("hidden_states=", "w1=", "w2=", "topk_weights=", "topk_ids=")
    },
    "sglang.srt.layers.moe.fused_moe_triton.fused_moe": {
        "fused_experts": ("hidden_states", "w1", "w2", "topk_output", "moe_runner_config")
    },
    "sglang.srt.layers.moe.topk": {"StandardTopKOutput": ("topk_weights=", "topk_ids=", "router_logits=")},
    "sglang.srt.layers.moe.moe_runner": {
        "MoeRunnerConfig": ("num_experts=", "num_local_experts=", "top_k=", "activation=", "inplace=")
    },
    "flashinfer.fused_moe": {
        "cutlass_fused_moe": ("input", "token_selected_experts", "token_final_scales", "fc1_expert_weights",
                              "fc2_expert_weights", "output_dtype", "quant_scales="),
    },
    "transformer_engine.pytorch": {
        "moe_permute": ("inp", "routing_map", "num_out_tokens", "map_type="),
        "moe_unpermute": ("inp", "row_id_map", "merging_probs", "map_type="),
        "GroupedLinear": ("num_gemms", "in_features", "out_features", "bias=", "params_dtype=", "device="),
        "GroupedLinear.forward": ("self", "inp", "m_splits"),
    },
    "megablocks.layers.arguments": {
        "Arguments": ("hidden_size=", "ffn_hidden_size=", "moe_num_experts=", "moe_top_k=", "mlp_type=", "mlp_impl=",
                      "activation_fn=", "bias=", "return_bias=", "fp16=", "bf16=", "device="),
    },
    "megablocks.layers.dmoe": {
        "ParallelDroplessMLP": ("args",),
        "ParallelDroplessMLP.forward": ("self", "x", "scores", "expert_weights", "top_experts"),
    },
    "transformers.models.mixtral.modeling_mixtral": {
        "MixtralExperts": ("config",),
        "MixtralExperts.forward": ("self", "hidden_states", "top_k_index", "top_k_weights"),
    },
}  # fmt: skip


@pytest.mark.parametrize("library", sorted({module.partition(".")[0] for module in PASSED}))
def test_arguments(library: str) -> None:
    for module in PASSED:
        if module.partition(".")[0] == library:
            look_at(module)


def look_at(module: str) -> None:
    try:
        found = importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - a peer that does not import here cannot be looked at
        pytest.skip(f"{module} does not import: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
    for name, passed in PASSED[module].items():
        value: Any = found
        for part in name.split("."):
            value = getattr(value, part)
        if not passed:
            continue  # compiled code, whose arguments Python cannot see
        positional = [argument for argument in passed if not argument.endswith("=")]
        signature = inspect.signature(value)
        assert list(signature.parameters)[: len(positional)] == positional, name
        keywords = [argument[:-1] for argument in passed if argument.endswith("=")]
        signature.bind(*positional, **dict.fromkeys(keywords))
