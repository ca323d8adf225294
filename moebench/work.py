"""Work: how many FLOPs and bytes a problem needs, whoever computes it. No torch.

Follows MoE-CAP (arXiv 2412.07067, section 4) in layer form. T tokens, D hidden
size, F expert width, E experts, A experts that kept a token, b bytes per weight;
`kept` counts the (token, expert) assignments that were not dropped, T*K when
dropless. m is 2 input maps for gated experts and 1 for the others.

    up_projection     2*m*D*F per kept assignment      A*m*D*F*b weight bytes
    down_projection   2*D*F per kept assignment        A*D*F*b
    gate              2*E*D per token                  E*D*b
    shared experts    2*(m+1)*D*Fs per token           (m+1)*D*Fs*b

Quantised precisions: b is of the experts' matrices, per matrix and with its scales; all else, the activations
among it, is bf16.

Copies, activations and the weighted sum are not counted as FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

from moebench.catalogue.gate import gate_maps
from moebench.catalogue.layer_forms import LAYER_FORMS, form_work
from moebench.catalogue.routers import router_info
from moebench.catalogue.spec import LayerSpec
from moebench.point import QUANTISED_PRECISIONS, STAGES, Problem, Variant, base_precision

# Of the values alone; `matrix_bytes` counts the scales of the quantised ones.
BYTES_PER_WEIGHT = {
    "fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5,
    "fp8:row": 1.0, "fp8:128": 1.0, "w4a16:128": 0.5,
}  # fmt: skip
BLOCK = 128  # columns, and for fp8 rows, that share a scale
ID_BYTES = 8  # int64
GATE_WEIGHT_BYTES = 4  # float32


@dataclass(frozen=True)
class Work:
    """What must be done at least once.

    Attributes:
        flops: useful FLOPs (W); a multiply-add is two.
        weight_bytes: weights of the experts that kept a token, router and shared experts.
        input_bytes: distinct inputs read.
        output_bytes: outputs written.
    """

    flops: float
    weight_bytes: float
    input_bytes: float
    output_bytes: float

    @property
    def compulsory_bytes(self) -> float:
        """Distinct inputs, active weights and outputs, each once."""
        return self.weight_bytes + self.input_bytes + self.output_bytes


def expected_active(layer: LayerSpec, tokens: int) -> float:
    """Experts hit by T tokens that choose uniformly: E * (1 - (1 - K/E)^T)."""
    E, K = layer.routed_experts, layer.top_k
    return E * (1.0 - (1.0 - K / E) ** tokens)


def expected_kept(layer: LayerSpec, tokens: int) -> float:
    """Rows that experts compute when nothing is dropped: T * K, or the slots of a Mix, whatever T is."""
    if router_info(layer.router.kind).form == "Mix":
        return float(layer.routed_experts * layer.router.slots)
    return float(tokens * layer.top_k)


def matrix_bytes(rows: int, columns: int, precision: str) -> float:
    """Bytes of one matrix [rows, columns] of an expert, scales included.

    fp8:row and int8 have a float32 a row, fp8:128 one for 128 x 128 weights, w4a16:128 a bfloat16 for 128 columns of
    a row.
    """
    values, blocks = rows * columns * BYTES_PER_WEIGHT[precision], -(-columns // BLOCK)
    scales = {"fp8:row": 4 * rows, "int8": 4 * rows, "fp8:128": 4 * -(-rows // BLOCK) * blocks}
    return values + scales.get(precision, 2 * rows * blocks if precision == "w4a16:128" else 0)


def expert_bytes(layer: LayerSpec, precision: str) -> tuple[float, float]:
    """(up, down) bytes of one expert's two matrices."""
    D, F, m = layer.hidden_size, layer.expert_ffn_size, 2 if layer.gated else 1
    return matrix_bytes(m * F, D, precision), matrix_bytes(D, F, precision)


def held_bytes(layer: LayerSpec, precision: str) -> float:
    """What the worker holds of a layer: its weights; beside quantised ones also those they were made of."""
    plain = layer.total_params() * BYTES_PER_WEIGHT[base_precision(precision)]
    quantised = precision in QUANTISED_PRECISIONS
    return plain + (layer.routed_experts * sum(expert_bytes(layer, precision)) if quantised else 0.0)


def point_work(
    problem: Problem, variant: Variant, *, active_experts: float | None = None, kept: float | None = None
) -> Work:
    """Work of one call.

    Args:
        active_experts: A as routed; the expectation of uniform routing where it is not known yet.
        kept: kept assignments as routed; all T*K where not known yet.
    """
    layer, tokens = problem.layer, problem.tokens
    A = expected_active(layer, tokens) if active_experts is None else active_experts
    kept = expected_kept(layer, tokens) if kept is None else kept
    work = _forward(layer, tokens, A, kept, variant.precision, variant.scope)
    return _with_backward(work) if problem.direction == "forward_backward" else work


def dense_work(problem: Problem, variant: Variant) -> Work:
    """Work of the dense-ffn yardstick: one FFN of width K*F on every token, no router."""
    layer, b = problem.layer, BYTES_PER_WEIGHT[base_precision(variant.precision)]
    params = layer.top_k * layer.expert_params() + (layer.shared_params() if variant.scope == "layer" else 0)
    hidden = problem.tokens * layer.hidden_size * b
    work = Work(2.0 * problem.tokens * params, params * b, hidden, hidden)
    return _with_backward(work) if problem.direction == "forward_backward" else work


def layer_form_work(problem: Problem, variant: Variant) -> Work:
    """Work of a layer form, which is another function than the layer's."""
    flops, params = form_work(variant.provider, problem.layer, problem.tokens)
    b = BYTES_PER_WEIGHT[variant.precision]
    hidden = problem.tokens * problem.layer.hidden_size * b
    return Work(flops, params * b, hidden, hidden)


def variant_work(
    problem: Problem, variant: Variant, *, active_experts: float | None = None, kept: float | None = None
) -> Work:
    """Work of one call by any provider: the dense FFN and the layer forms do another than the layer's."""
    if variant.provider == "dense-ffn":
        return dense_work(problem, variant)
    if variant.provider in LAYER_FORMS:
        return layer_form_work(problem, variant)
    return point_work(problem, variant, active_experts=active_experts, kept=kept)


def stage_work(
    layer: LayerSpec, tokens: int, active_experts: float, kept: float, precision: str
) -> dict[str, Work]:  # fmt: skip
    """Work of each stage alone, its intermediate inputs and outputs included."""
    b, (up_bytes, down_bytes) = BYTES_PER_WEIGHT[base_precision(precision)], expert_bytes(layer, precision)
    T, D, F, K = tokens, layer.hidden_size, layer.expert_ffn_size, layer.top_k
    m = 2 if layer.gated else 1
    routing_bytes = T * K * (ID_BYTES + GATE_WEIGHT_BYTES)
    return {
        "gate": Work(2.0 * T * gate_maps(layer), gate_maps(layer) * b, T * D * b, routing_bytes),
        "plan": Work(0.0, 0.0, T * K * ID_BYTES, kept * ID_BYTES),
        "permute": Work(0.0, 0.0, min(T, kept) * D * b, kept * D * b),
        "up_projection": Work(kept * 2 * m * D * F, active_experts * up_bytes, kept * D * b, kept * F * b),
        "down_projection": Work(kept * 2 * D * F, active_experts * down_bytes, kept * F * b, kept * D * b),
        "combine": Work(0.0, 0.0, kept * D * b + T * K * GATE_WEIGHT_BYTES, T * D * b),
    }


def shared_work(layer: LayerSpec, tokens: int, b: float) -> tuple[float, float]:
    """(FLOPs, weight bytes) of the shared experts and the gate on them."""
    params = layer.shared_params()
    return 2.0 * tokens * params, params * b


def _forward(layer: LayerSpec, tokens: int, active: float, kept: float, precision: str, scope: str) -> Work:
    stages, b = stage_work(layer, tokens, active, kept, precision), BYTES_PER_WEIGHT[base_precision(precision)]
    if scope in STAGES:
        return stages[scope]
    experts = (stages["up_projection"], stages["down_projection"])
    flops = sum(stage.flops for stage in experts) + _mixing_flops(layer, tokens)
    weights = sum(stage.weight_bytes for stage in experts)
    hidden = tokens * layer.hidden_size * b
    if scope == "experts":
        return Work(flops, weights, hidden + tokens * layer.top_k * (ID_BYTES + GATE_WEIGHT_BYTES), hidden)
    shared_flops, shared_bytes = shared_work(layer, tokens, b)
    gate = stages["gate"]
    return Work(flops + gate.flops + shared_flops, weights + gate.weight_bytes + shared_bytes, hidden, hidden)


def _mixing_flops(layer: LayerSpec, tokens: int) -> float:
    """What blending tokens into slots and back takes (Soft MoE): two products with [T, S]."""
    if router_info(layer.router.kind).form != "Mix":
        return 0.0
    return 4.0 * tokens * expected_kept(layer, tokens) * layer.hidden_size


def _with_backward(work: Work) -> Work:
    """Forward and backward: 3W; every operand's gradient is as large as the operand."""
    return Work(3 * work.flops, 2 * work.weight_bytes, 2 * work.input_bytes, 2 * work.output_bytes)
