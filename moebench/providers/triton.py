"""triton: moebench's own kernels (kernels/moebench_kernels).

On a CPU they run in Triton's interpreter: verified, never timed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

import moebench_kernels as kernels
from moebench.point import PRECISIONS, QUANTISED_PRECISIONS
from moebench.providers.base import Case, ExpertsFn, StagedProvider, Stages, source_digest

available, why = kernels.triton_available()
if not available:
    raise ImportError(why)


def gate(x: Tensor, router: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """x [T, D], router [E, D] -> ids int64 [T, K], weights float32 [T, K]; softmax routers only."""
    spec = case.layer.router
    ids, weights = kernels.topk_gate(
        x @ router.T,
        case.layer.top_k,
        order="topk_first" if spec.kind == "topk_softmax" else "score_first",
        renormalise=spec.normalise,
        scale=spec.scale,
    )
    return ids.long(), weights


def plan(ids: Tensor, case: Case) -> kernels.Plan:
    """ids [T, K] -> Plan."""
    return kernels.routing_plan(ids, case.layer.routed_experts)


def permute(x: Tensor, plan: kernels.Plan) -> Tensor:
    """x [T, D] -> rows [T*K, D]."""
    rows: Tensor = kernels.permute(x, plan)
    return rows


def up_projection(rows: Tensor, w_gate_up: Tensor, plan: kernels.Plan, activation: str) -> Tensor:
    """rows [T*K, D] -> [T*K, F]."""
    hidden: Tensor = kernels.up_projection(rows, w_gate_up, plan, activation=activation, permuted=True)
    return hidden


def limits(case: Case) -> str | None:
    """What the kernels do not take, or the device has not."""
    if case.precision in QUANTISED_PRECISIONS:
        lacks: str | None = kernels.supported(case.precision, case.device_kind)
        if lacks:
            return lacks
    K, E = case.layer.top_k, case.layer.routed_experts
    if K > 64 or E > 4096:
        return f"the gate takes top_k <= 64 and at most 4096 experts, not {K} of {E}"
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
    down_projection=kernels.down_projection,
    combine=kernels.combine,
    row_map=lambda plan: plan.row2assignment.long(),
    row_experts=lambda plan: plan.row2expert.long(),
)
PROVIDER = TritonProvider(
    "triton", plan, version=why.partition(",")[0].partition(" on ")[0], stages=STAGES, limits=limits,
    precisions=PRECISIONS, interpreted_on=("cpu",) if kernels.interpreting() else (),
)  # fmt: skip
