"""Each adapter against a stand-in that computes what its library documents, in the library's layouts.

The stand-ins fail on what the library would not take, and fill with NaN what it leaves undefined.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from peer_arms import all_experts, answer, on_cpu, stand_in, verdict_of

from moebench.catalogue.spec import LayerSpec
from moebench.providers import (
    deepgemm,
    fbgemm,
    flashinfer,
    liger,
    megablocks,
    moe_ops,
    scattermoe,
    sglang,
    sonic_moe,
    torchao,
    transformer_engine,
    triton_kernels,
    vllm,
)

NAN = float("nan")


def passes(provider: Any, **more: Any) -> None:
    """Forward and, where declared, backward; also with experts that no token chose, and as a whole layer."""
    for direction in provider.directions:
        for changed in ({}, {"traffic": "zipf:20"}, {"scope": "layer"}, {"tokens": 1}):
            verdict = verdict_of(on_cpu(provider), direction=direction, **{**changed, **more})
            assert verdict.wrong is None, (direction, changed, verdict.wrong)


def test_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(x: Any, gate_up_proj: Any, down_proj: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        assert top_k_index.dtype == torch.int32
        return answer(x, top_k_index, top_k_weights, gate_up_proj, down_proj)

    stand_in(monkeypatch, {"liger_kernel.ops": {"LigerFusedMoEFunction": SimpleNamespace(apply=apply)}})
    passes(liger.PROVIDER)


def grouped(rows: Any, weights: Any, ends: Any) -> Any:
    """rows [M, K] times weights [E, K, N] by group; NaN behind the last group."""
    out = torch.full((rows.shape[0], weights.shape[2]), NAN)
    begin, parts = 0, []
    for expert, end in enumerate(ends.tolist()):
        parts.append(rows[begin:end] @ weights[expert])
        begin = end
    return torch.cat([*parts, out[begin:]])


def test_moe_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    def permute(x: Any, indices: Any, num_out_tokens: int = 0, E: Any = None) -> Any:
        assert indices.dtype == torch.int32
        order = indices.flatten().argsort(stable=True)
        row_id_map = torch.empty(order.numel(), dtype=torch.int32)
        T, K = indices.shape
        row_id_map[order % K * T + order // K] = torch.arange(T * K, dtype=torch.int32)  # numbered k*T + t
        counts = torch.bincount(indices.flatten(), minlength=E).cumsum(0)
        return x[order // K], row_id_map, torch.cat([torch.zeros(1, dtype=torch.int64), counts]).int()

    def grouped_gemm(A: Any, B: Any, offsets: Any, trans_b: bool = True) -> Any:
        assert offsets.numel() == B.shape[0] + 1
        return grouped(A, B.transpose(1, 2) if trans_b else B, offsets[1:])

    def unpermute(rows: Any, row_id_map: Any, prob: Any, num_tokens: int, num_topK: int) -> Any:
        picked = rows[row_id_map.long()].view(num_topK, num_tokens, -1)
        return (picked * prob.T.unsqueeze(-1)).sum(0)

    stand_in(monkeypatch, {"moe_ops": {"permute": permute, "grouped_gemm": grouped_gemm, "unpermute": unpermute}})
    passes(moe_ops.PROVIDER)
    passes(moe_ops.PROVIDER, layer=LayerSpec(64, 128, 6, 2, activation="relu"))


def test_scattermoe(monkeypatch: pytest.MonkeyPatch) -> None:
    def flatten_sort_count(expert_idxs: Any, num_experts: int) -> Any:
        experts, assignments = expert_idxs.flatten().sort()
        return experts, assignments, torch.bincount(experts, minlength=num_experts).cumsum(0)

    def parallel_linear(
        inputs: Any, expert_weights: Any, k: int, experts: Any, assignments: Any, offsets: Any,
        expert_biases: Any = None, gates: Any = None, grouped_in: bool = False, grouped_out: bool = False,
    ) -> Any:  # fmt: skip
        assert expert_weights.stride(1) == 1  # a transposed view
        rows = inputs if grouped_in else inputs[assignments // k]
        out = grouped(rows, expert_weights, offsets)
        if not grouped_out:
            out = torch.empty_like(out).index_copy(0, assignments, out)
        if gates is not None:
            assert gates.dtype == inputs.dtype
            out = (gates.unsqueeze(1) @ out.view(*gates.shape, -1)).squeeze(1)
        return out

    attributes = {"flatten_sort_count": flatten_sort_count, "parallel_linear": parallel_linear}
    stand_in(monkeypatch, {"scattermoe.parallel_experts": attributes})
    passes(scattermoe.PROVIDER)
    passes(scattermoe.PROVIDER, layer=LayerSpec(64, 128, 6, 2, activation="geglu"))


class Ragged(NamedTuple):
    sizes: Any
    rows: int


def test_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class FnSpecs:
        name: str
        fn: Any
        fn_arg_names: tuple[str, ...] = ()
        fn_arg_do_not_specialize: tuple[str, ...] = ()
        reduction_n: int = 1

    @dataclass(frozen=True)
    class FusedActivation:
        specs: FnSpecs
        fn_args: tuple[object, ...] = ()

    def swiglu_fn(rows: Any, alpha: float, limit: Any) -> Any:
        assert limit is None
        gate, up = rows[:, 0::2], rows[:, 1::2]
        return gate * torch.sigmoid(alpha * gate) * (up + 1)

    def matmul(
        a: Any, b: Any, bias: Any, a_ragged_metadata: Any = None, gather_indx: Any = None, scatter_indx: Any = None,
        gammas: Any = None, fused_activation: Any = None,
    ) -> Any:  # fmt: skip
        assert bias is None or bias.dtype == torch.float32
        sizes = a_ragged_metadata.sizes
        rows = a if gather_indx is None else a[gather_indx.long()]
        out = grouped(rows, b, sizes.cumsum(0))
        if bias is not None:
            out = out + bias.repeat_interleave(sizes.long(), dim=0)
        if fused_activation is not None:
            assert fused_activation.specs.reduction_n == 2
            out = fused_activation.specs.fn(out, *fused_activation.fn_args)
        if gammas is not None:
            out = out * gammas.unsqueeze(1)
        return out if scatter_indx is None else torch.empty_like(out).index_copy(0, scatter_indx.long(), out)

    stand_in(monkeypatch, {
        "triton_kernels.matmul": {"matmul": matmul, "FnSpecs": FnSpecs, "FusedActivation": FusedActivation},
        "triton_kernels.tensor": {"make_ragged_tensor_metadata": Ragged},
        "triton_kernels.reduce": {"reduce": lambda x, dim: (x.sum(dim), None)},
        "triton_kernels.swiglu": {"swiglu_fn": swiglu_fn},
    })  # fmt: skip
    passes(triton_kernels.PROVIDER)


def test_sonic_moe(monkeypatch: pytest.MonkeyPatch) -> None:
    def general(
        x: Any, router_scores: Any, token_indices: Any, expert_indices: Any, w1: Any, b1: Any, w2: Any, b2: Any, E: int,
        stream_id: Any, activation_type: Any, is_inference_mode_enabled: bool = False, concat_layout: bool = False,
    ) -> Any:  # fmt: skip
        assert (activation_type, b1, b2, E, concat_layout) == ("swiglu", None, None, w2.shape[2], True)
        assert is_inference_mode_enabled is not torch.is_grad_enabled()
        assert token_indices.dtype == expert_indices.dtype == torch.int32
        assert torch.equal(token_indices, token_indices.sort().values)
        assert w1.stride(1) == w2.stride(1) == 1  # stride order (2, 0, 1)
        assert w1.stride(2) > w1.stride(0)
        every = all_experts(x, w1.permute(2, 0, 1), w2.permute(2, 0, 1))
        out = every[token_indices.long(), expert_indices.long()] * router_scores.unsqueeze(1)
        return torch.zeros_like(x).index_add(0, token_indices.long(), out), None

    kinds = SimpleNamespace(SWIGLU="swiglu")
    stand_in(
        monkeypatch, {"sonicmoe": {"moe_general_routing_inputs": general}, "sonicmoe.enums": {"ActivationType": kinds}}
    )
    passes(sonic_moe.PROVIDER)


@pytest.mark.parametrize("alignment", [16, 128])
def test_deepgemm(monkeypatch: pytest.MonkeyPatch, alignment: int) -> None:
    def gemm(a: Any, b: Any, d: Any, grouped_layout: Any) -> None:
        assert grouped_layout.dtype == torch.int32
        assert len(grouped_layout) == len(a) == len(d)
        assert len(a) % alignment == 0
        d.fill_(NAN)
        for first in range(0, len(a), alignment):
            block = grouped_layout[first : first + alignment]
            found = block[block >= 0].unique()
            if len(found):
                assert len(found) == 1
                assert block[0] == found[0]  # it reads the group of a block's first row
                d[first : first + alignment] = a[first : first + alignment] @ b[found[0]].T

    attributes = {
        "m_grouped_bf16_gemm_nt_contiguous": gemm,
        "get_mk_alignment_for_contiguous_layout": lambda: alignment,
    }
    stand_in(monkeypatch, {"deep_gemm": attributes})
    passes(deepgemm.PROVIDER)


def test_fbgemm(monkeypatch: pytest.MonkeyPatch) -> None:
    def grouped_gemm(x: Any, w: Any, m_sizes: Any, use_fast_accum: bool = True) -> Any:
        assert m_sizes.dtype == torch.int32
        assert x.is_contiguous()
        assert w.is_contiguous()
        E = len(m_sizes)
        return grouped(x, w.view(E, -1, w.shape[1]).transpose(1, 2), m_sizes.cumsum(0))

    def silu_mul(x0: Any, x1: Any) -> Any:
        fused.append(x0.shape[1])
        return torch.nn.functional.silu(x0) * x1

    fused: list[int] = []
    stand_in(monkeypatch, {
        "fbgemm_gpu.experimental.gemm.triton_gemm.grouped_gemm": {"grouped_gemm": grouped_gemm},
        "fbgemm_gpu.experimental.gen_ai.moe": {"silu_mul": silu_mul},
    })  # fmt: skip
    passes(fbgemm.PROVIDER)
    assert not fused  # it takes no width of 128
    monkeypatch.setattr(fbgemm, "SILU_MUL_WIDTH", 128)
    passes(fbgemm.PROVIDER, capacity=0.5)
    assert set(fused) == {128}


def test_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    def gemm(
        A: Any, B_t: Any, offs: Any, out_dtype: Any = torch.bfloat16, pad_token_groups_for_grouped_mm: bool = True
    ) -> Any:
        assert not pad_token_groups_for_grouped_mm
        assert offs.dtype == torch.int32
        assert not (offs % 16).any()
        assert B_t.stride(-2) == 1  # column-major
        return grouped(A, B_t, offs).to(out_dtype)

    stand_in(monkeypatch, {"torchao.prototype.moe_training": {"_to_fp8_rowwise_then_scaled_grouped_mm": gemm}})
    passes(torchao.PROVIDER)


def test_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused_experts(
        hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, inplace: bool = False
    ) -> Any:
        assert (topk_weights.dtype, topk_ids.dtype) == (torch.float32, torch.int32)
        return answer(hidden_states, topk_ids, topk_weights, w1, w2)

    stand_in(monkeypatch, {"vllm.model_executor.layers.fused_moe": {"fused_experts": fused_experts}})
    passes(vllm.PROVIDER)


def test_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    class StandardTopKOutput(NamedTuple):
        topk_weights: Any
        topk_ids: Any
        router_logits: Any

    @dataclass
    class MoeRunnerConfig:
        num_experts: Any = None
        num_local_experts: Any = None
        top_k: Any = None
        activation: str = "silu"
        inplace: bool = True

    def fused_experts(hidden_states: Any, w1: Any, w2: Any, topk_output: Any, moe_runner_config: Any) -> Any:
        weights, ids, _ = topk_output
        assert ids.dtype == torch.int32
        assert moe_runner_config.num_experts == moe_runner_config.num_local_experts == len(w1)
        y = answer(hidden_states, ids, weights, w1, w2)
        return hidden_states.copy_(y) if moe_runner_config.inplace else y

    stand_in(monkeypatch, {
        "sglang.srt.layers.moe.fused_moe_triton.fused_moe": {"fused_experts": fused_experts},
        "sglang.srt.layers.moe.topk": {"StandardTopKOutput": StandardTopKOutput},
        "sglang.srt.layers.moe.moe_runner": {"MoeRunnerConfig": MoeRunnerConfig},
    })  # fmt: skip
    passes(sglang.PROVIDER)


def test_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    def cutlass_fused_moe(
        input: Any, token_selected_experts: Any, token_final_scales: Any, fc1_expert_weights: Any,
        fc2_expert_weights: Any, output_dtype: Any, quant_scales: Any,
    ) -> Any:  # fmt: skip
        assert (token_selected_experts.dtype, token_final_scales.dtype) == (torch.int32, torch.float32)
        assert quant_scales is None
        up, gate = fc1_expert_weights.chunk(2, dim=1)
        y = answer(input, token_selected_experts, token_final_scales, torch.cat([gate, up], 1), fc2_expert_weights)
        return [y.to(output_dtype)]

    stand_in(monkeypatch, {"flashinfer.fused_moe": {"cutlass_fused_moe": cutlass_fused_moe}})
    passes(flashinfer.PROVIDER)


def test_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    class GroupedLinear(torch.nn.Module):
        def __init__(self, num_gemms: int, in_features: int, out_features: int, **more: Any) -> None:
            super().__init__()
            assert more == {"bias": False, "params_dtype": torch.float32, "device": torch.device("cpu")}
            self.num_gemms = num_gemms
            for index in range(num_gemms):
                self.register_parameter(
                    f"weight{index}", torch.nn.Parameter(torch.full((out_features, in_features), NAN))
                )

        def forward(self, inp: Any, m_splits: Any) -> Any:
            weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
            parts = inp.split(m_splits)
            return torch.cat([rows @ weight.T for rows, weight in zip(parts, weights, strict=True)])

    def moe_permute(
        inp: Any, routing_map: Any, num_out_tokens: int, max_token_num: int = -1, map_type: str = "mask"
    ) -> Any:
        assert (routing_map.dtype, map_type, num_out_tokens) == (torch.int32, "index", routing_map.numel())
        order = routing_map.flatten().argsort(stable=True)
        return inp[order // routing_map.shape[1]], order.argsort()

    def moe_unpermute(
        inp: Any, row_id_map: Any, merging_probs: Any = None, restore_shape: Any = None, map_type: str = "mask"
    ) -> Any:
        assert (map_type, merging_probs.dtype) == ("index", torch.float32)
        return (inp[row_id_map].view(*merging_probs.shape, -1) * merging_probs.unsqueeze(-1)).sum(1)

    attributes = {"GroupedLinear": GroupedLinear, "moe_permute": moe_permute, "moe_unpermute": moe_unpermute}
    stand_in(monkeypatch, {"transformer_engine.pytorch": attributes})
    passes(transformer_engine.PROVIDER)
    passes(transformer_engine.PROVIDER, layer=LayerSpec(64, 128, 6, 2, activation="gelu"))


def test_megablocks(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Arguments:
        hidden_size: int = 0
        ffn_hidden_size: int = 0
        moe_num_experts: int = 0
        moe_top_k: int = 0
        mlp_type: str = "mlp"
        mlp_impl: str = ""
        activation_fn: Any = None
        bias: bool = True
        return_bias: bool = True
        fp16: bool = True
        bf16: bool = False
        device: Any = field(default="none")

    class ParallelDroplessMLP(torch.nn.Module):
        def __init__(self, args: Arguments) -> None:
            super().__init__()
            assert (args.mlp_type, args.mlp_impl, args.bias, args.return_bias) == ("glu", "grouped", False, False)
            self.args, self.mlp = args, torch.nn.Module()
            for name in ("w1", "v1", "w2"):
                shape = args.moe_num_experts * args.ffn_hidden_size, args.hidden_size
                self.mlp.register_parameter(name, torch.nn.Parameter(torch.full(shape, NAN)))

        def forward(self, x: Any, scores: Any, expert_weights: Any, top_experts: Any) -> Any:
            assert not self.training
            assert expert_weights.dtype == x.dtype
            E, D = self.args.moe_num_experts, self.args.hidden_size
            w1, v1, w2 = (getattr(self.mlp, name).view(E, -1, D) for name in ("w1", "v1", "w2"))
            every = all_experts(x, torch.cat([w1, v1], 1), w2.transpose(1, 2), self.args.activation_fn)
            picked = every.gather(1, top_experts.unsqueeze(-1).expand(-1, -1, D))
            return (picked * expert_weights.unsqueeze(-1)).sum(1)

    stand_in(monkeypatch, {
        "megablocks.layers.arguments": {"Arguments": Arguments},
        "megablocks.layers.dmoe": {"ParallelDroplessMLP": ParallelDroplessMLP},
    })  # fmt: skip
    passes(megablocks.PROVIDER)
    passes(megablocks.PROVIDER, layer=LayerSpec(64, 128, 6, 2, activation="geglu"))
