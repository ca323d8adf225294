"""Adapters checked as the harness checks any arm: against the float64 oracle, on a CPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from moebench.arm import Arm
from moebench.bench import Bench
from moebench.catalogue.spec import LayerSpec
from moebench.check import Verdict
from moebench.point import Capacity, Problem, Variant
from moebench.providers.case import Case
from moebench.weights import make_weights
from moebench.workload import make_draws

LAYER = LayerSpec(64, 128, 6, 2)  # widths that differ: a weight the wrong way round does not fit


def verdict_of(
    provider: Any, layer: LayerSpec = LAYER, tokens: int = 13, *, precision: str = "fp32", scope: str = "experts",
    capacity: Any = "dropless", direction: str = "forward", traffic: str = "uniform",
) -> Verdict:  # fmt: skip
    """The check's verdict; the provider must not refuse."""
    problem = Problem("custom", layer, tokens, traffic, direction)
    weights = make_weights(layer, precision, "cpu", 0)
    bench = Bench(problem, weights, make_draws(problem, weights))
    arm = Arm(provider, bench, Variant(provider.name, precision, capacity, scope=scope), "cpu")
    assert provider.refuse(arm.case) is None
    return arm.check()


def case(**changed: Any) -> Case:
    """A case on a GPU that peers take."""
    return replace(Case(LAYER, 13, "forward", "bf16", Capacity(), "experts", "cuda"), **changed)


def on_cpu(provider: Any) -> Any:
    """The same adapter, declared for float32 on a CPU, where its stand-in computes."""
    return replace(provider, devices=("cpu",), precisions=("fp32",))


def stand_in(monkeypatch: pytest.MonkeyPatch, modules: dict[str, dict[str, Any]]) -> None:
    """Modules of these names and attributes, as if the library were installed."""
    for name, attributes in modules.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)


def all_experts(x: Any, w_gate_up: Any, w_down: Any, act: Any = torch.nn.functional.silu) -> Any:
    """Every expert on every token: [T, E, D]; w_gate_up [E, 2F, D] with gate rows first, w_down [E, D, F]."""
    gate, up = torch.einsum("td,efd->tef", x, w_gate_up).chunk(2, dim=-1)
    return torch.einsum("tef,edf->ted", act(gate) * up, w_down)


def answer(x: Any, ids: Any, gates: Any, w_gate_up: Any, w_down: Any) -> Any:
    """The SwiGLU layer in differentiable PyTorch, in the dtype it is given."""
    picked = all_experts(x, w_gate_up, w_down).gather(1, ids.long().unsqueeze(-1).expand(-1, -1, x.shape[1]))
    return (picked * gates.unsqueeze(-1).to(x.dtype)).sum(1)
