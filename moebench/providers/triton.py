"""triton: moebench's own kernels (kernels/moebench_kernels).

On a CPU they run in Triton's interpreter: verified, never timed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

import moebench_kernels as kernels
from moebench.catalogue.spec import LayerSpec
from moebench.point import PRECISIONS, QUANTISED_PRECISIONS
from moebench.providers.base import StagedProvider, Stages, source_digest
from moebench.providers.case import Case
from moebench.providers.layer_parts import ExpertsFn, reference_gate
from moebench.routing.forms import Routing, top_k_routing
from moebench.routing.route import make_scores
from moebench.routing.scores import Side

available, why = kernels.triton_available()
if not available:
    raise ImportError(why)


# What the fused gate computes: its options by router. The others run in plain PyTorch before the kernels.
FUSED: dict[str, dict[str, str]] = {
    "softmax_topk": {},
    "dense_softmax": {},
    "switch_top1": {},
    "recycle_top1": {},
    "frozen_random": {},
    "cosine": {},
    "topk_softmax": {"order": "topk_first"},
    "attention": {"order": "topk_first"},
    "noisy_topk": {"order": "topk_first"},
    "noisy_topk_tanh": {"order": "topk_first"},
    "noisy_softmax_topk": {},
    "softmax_bias": {},
    "softmax_bias_zero": {},
    "group_limited": {"group_score": "max"},
    "group_limited_sum2": {"group_score": "top2_sum"},
    "sigmoid_topk": {"scoring": "sigmoid"},
    "sigmoid_bias": {"scoring": "sigmoid", "group_score": "top2_sum"},
    "sigmoid_logit_bias": {"scoring": "sigmoid", "order": "topk_first"},
    "sigmoid_input": {"scoring": "sigmoid"},
    "sqrt_softplus_bias": {"scoring": "sqrt_softplus", "group_score": "top2_sum"},
}


def fused(layer: LayerSpec) -> bool:
    """Whether the layer's router runs as one kernel from its logits."""
    spec, E = layer.router, layer.choices
    fits = layer.top_k <= 64 and E <= 4096
    pairs = spec.groups == 1 or FUSED.get(spec.kind, {}).get("group_score") != "top2_sum" or E // spec.groups >= 2
    noisy = spec.training and spec.kind.startswith("noisy")  # the noise is added in PyTorch, before anything is chosen
    return spec.kind in FUSED and fits and pairs and not noisy


def gate(x: Tensor, gate: Mapping[str, Tensor], case: Case, side: Side) -> Routing:
    """x [T, D] -> the routing; logits by torch, the rest in one kernel where the router is one of `FUSED`."""
    spec = case.layer.router
    if not fused(case.layer):
        return reference_gate(x, gate, case, side)
    scores = make_scores(case.layer, x, gate, side)
    ids, weights = kernels.topk_gate(
        scores.logits.contiguous(),
        case.layer.top_k,
        bias=scores.bias,
        renormalise=spec.normalise,
        n_groups=spec.groups,
        topk_groups=spec.topk_groups,
        scale=spec.scale,
        **FUSED[spec.kind],
    )
    choices = scores.logits.shape[1]
    return top_k_routing(ids.long(), weights, choices, scores.logits, on_input=spec.kind == "sigmoid_input")


def plan(ids: Tensor, case: Case) -> kernels.Plan:
    """ids [T, K] -> Plan."""
    return kernels.routing_plan(ids, case.layer.routed_experts)


def permute(x: Tensor, plan: kernels.Plan) -> Tensor:
    """x [T, D] -> rows [T*K, D]."""
    rows: Tensor = kernels.permute(x, plan)
    return rows


def up_projection(
    rows: Tensor, w_gate_up: Tensor, plan: kernels.Plan, activation: str, bias: Tensor | None = None
) -> Tensor:
    """rows [T*K, D] -> [T*K, F]."""
    hidden: Tensor = kernels.up_projection(
        rows, w_gate_up, plan, activation=activation, permuted=True, **({} if bias is None else {"bias": bias})
    )
    return hidden


def down_projection(hidden: Tensor, w_down: Tensor, plan: kernels.Plan, bias: Tensor | None = None) -> Tensor:
    """hidden [T*K, F] -> [T*K, D]."""
    rows: Tensor = kernels.down_projection(hidden, w_down, plan, **({} if bias is None else {"bias": bias}))
    return rows


def limits(case: Case) -> str | None:
    """What the kernels do not take, or the device has not."""
    if case.precision in QUANTISED_PRECISIONS:
        if case.layer.expert_bias:
            return f"triton takes no biases beside weights in {case.precision}"
        lacks: str | None = kernels.supported(case.precision, case.device_kind)
        if lacks:
            return lacks
    if case.scope == "gate" and not fused(case.layer):
        return (
            f"triton has no fused gate for router {case.layer.router.kind!r} of this shape; torch-grouped has its gate"
        )
    return None


def tile_files() -> list[Path]:
    """Tuned tiles that may be in use: the file that MOEBENCH_TILES names, and those beside the kernels."""
    named = os.environ.get("MOEBENCH_TILES")
    own = sorted((Path(kernels.__file__).parent / "tuned").glob("*.json"))
    return [path for path in (*([Path(named)] if named else []), *own) if path.is_file()]


@dataclass(frozen=True)
class TritonProvider(StagedProvider):
    """The layer runs the fused form, which gathers in the first GEMM; the stages run one by one.

    Fingerprinted by every kernel file, since any of them may change the answer, and by the tuned tiles in use.
    """

    def bind(self, case: Case) -> ExpertsFn:
        return partial(kernels.moe_layer, activation=case.layer.activation)

    def fingerprint(self) -> str:
        files = sorted(Path(kernels.__file__).parent.rglob("*.py")) + tile_files()
        return source_digest(plan, self.version, *(file.read_text() for file in files))


STAGES = Stages(
    gate=gate,
    plan=plan,
    permute=permute,
    up_projection=up_projection,
    down_projection=down_projection,
    combine=kernels.combine,
    row_map=lambda plan: plan.row2assignment.long(),
    row_experts=lambda plan: plan.row2expert.long(),
)
PROVIDER = TritonProvider(
    "triton", plan, version=why.partition(",")[0].partition(" on ")[0], stages=STAGES, limits=limits,
    precisions=PRECISIONS, biases=True, activations=kernels.ACTIVATIONS,
    interpreted_on=("cpu",) if kernels.interpreting() else (),
)  # fmt: skip
