"""torch-compile: torch.compile of the grouped form, or of the bmm form where grouped_mm cannot be traced.

Inductor takes grouped_mm in bfloat16 only, so fp32 and fp16 compile the bmm
form; its slot count, when dropless, is read outside the compiled function.
torch-compile-max-autotune is the same with the compiler's own race of GEMM
templates; CUDA graphs are left to the harness, which gives them to every arm.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import count
from types import FunctionType

import torch
from torch import Tensor

from moebench.providers import torch_bmm, torch_grouped
from moebench.providers.base import ExpertsProvider
from moebench.providers.case import Case
from moebench.providers.layer_parts import ExpertsFn


def bmm_form(
    x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, activation: str, slots: int
) -> Tensor:
    """The torch-bmm experts for a known number of slots: x [T, D] -> y [T, D]."""
    plan = torch_bmm.slot_plan(ids, w_down.shape[0], slots)
    hidden = torch_bmm.up_projection(torch_bmm.permute(x, plan), w_gate_up, plan, activation)
    return torch_bmm.combine(torch_bmm.down_projection(hidden, w_down, plan), weights, plan)


def grouped_form(
    x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, activation: str, drops: bool
) -> Tensor:
    """The torch-grouped experts: x [T, D] -> y [T, D]."""
    plan = torch_grouped.sort_plan(ids, w_down.shape[0], drops=drops)
    hidden = torch_grouped.up_projection(torch_grouped.permute(x, plan), w_gate_up, plan, activation)
    return torch_grouped.combine(torch_grouped.down_projection(hidden, w_down, plan), weights, plan)


def traces_grouped(case: Case) -> bool:
    """Whether the grouped form is the one compiled."""
    return case.precision == "bf16" and torch_grouped.limits(case) is None


def alone(function: FunctionType) -> FunctionType:
    """A copy that the compiler takes for another function.

    It remembers by file, line and name which sizes have changed from call to call, and compiles later cases for any
    size: other code for a case only because another one came before it.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_COPIES)}")
    return FunctionType(code, function.__globals__, code.co_name)


_COPIES = count()


@lru_cache(maxsize=64)
def compile_for(case: Case, mode: str | None = None) -> ExpertsFn:
    """The experts function of the case, compiled at its first call, which is also when the compiler is imported.

    One for all copies of the layer's weights that rotate.
    """
    activation, slots, experts = case.activation, case.slots, case.layer.routed_experts
    compiled = cache(lambda form: torch.compile(alone(form), fullgraph=True, mode=mode))
    if traces_grouped(case):
        drops = case.drops
        return lambda x, ids, gates, w_gate_up, w_down: compiled(grouped_form)(
            x, ids, gates, w_gate_up, w_down, activation, drops
        )
    return lambda x, ids, gates, w_gate_up, w_down: compiled(bmm_form)(
        x, ids, gates, w_gate_up, w_down, activation, slots or torch_bmm.largest_load(ids, experts)
    )


def rows_executed(case: Case, counts: Tensor) -> float:
    """As the form that is compiled."""
    return float(counts.sum()) if traces_grouped(case) else torch_bmm.rows_executed(case, counts)


@dataclass(frozen=True)
class CompiledProvider(ExpertsProvider):
    """An experts function that is compiled for its case; `mode` is torch.compile's."""

    mode: str | None = None

    def bind(self, case: Case) -> ExpertsFn:
        return compile_for(case, self.mode)


PROVIDER = CompiledProvider("torch-compile", bmm_form, flops_executed=rows_executed)
MAX_AUTOTUNE = CompiledProvider(
    "torch-compile-max-autotune", bmm_form, flops_executed=rows_executed, mode="max-autotune-no-cudagraphs"
)
