"""Workload: the tensors of a problem. Weights once per layer and precision, inputs in rotating static buffers.

Quantised precisions: the layer is drawn in bf16 and its experts' matrices are quantised once; the oracle and every
provider get the same quantised values, and the bf16 ones stay for what quantising costs.

Weight layout (that of transformers' experts): w_gate_up [E, 2F, D], gate rows
first ([E, F, D] for ungated experts), w_down [E, D, F], router [E, D].
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moebench.catalogue.spec import LayerSpec
from moebench.point import QUANTISED_PRECISIONS, Problem, base_precision
from moebench.routing import TopK, route_problem
from moebench.routing.build import with_capacity
from moebench.routing.logits import impose_logits
from moebench.traffic import parse_traffic
from moebench.work import held_bytes

if TYPE_CHECKING:
    from moebench_kernels import QuantisedWeights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of a base precision


@dataclass(frozen=True)
class Weights:
    """Parameters of one MoE layer, all of one dtype (but for `quantised`).

    Attributes:
        router: [E, D].
        w_gate_up: [E, m*F, D], m = 2 for gated experts, else 1.
        w_down: [E, D, F].
        shared_gate_up: [m*Fs, D] or None; Fs is the width of all shared experts together.
        shared_down: [D, Fs] or None.
        shared_gate: [1, D] or None; its sigmoid scales the shared output (Qwen).
        quantised: what w_gate_up and w_down were quantised to, in a quantised precision; else None.
    """

    router: Tensor
    w_gate_up: Tensor
    w_down: Tensor
    shared_gate_up: Tensor | None = None
    shared_down: Tensor | None = None
    shared_gate: Tensor | None = None
    quantised: tuple[QuantisedWeights, QuantisedWeights] | None = None

    @property
    def experts(self) -> tuple[Any, Any]:
        """w_gate_up and w_down as providers are to take them: tensors, or QuantisedWeights."""
        return self.quantised or (self.w_gate_up, self.w_down)

    def expert(self, index: int) -> tuple[Tensor, Tensor]:
        """One expert's matrices as asked for, float64: [m*F, D] and [D, F], dequantised where quantised."""
        first, second = (expert_matrix(stack, index, torch.float64) for stack in self.experts)
        return first, second

    def unquantised(self) -> Weights:
        """The layer before it was quantised."""
        return replace(self, quantised=None)

    def tensors(self) -> dict[str, Tensor]:
        """Those that exist, by name."""
        found = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        for name, weights in zip(("w_gate_up", "w_down"), self.quantised or (), strict=False):
            found |= {f"quantised {name}": weights.values, f"scales of {name}": weights.scales}
        return found


def expert_matrix(stack: Tensor | QuantisedWeights, index: int, dtype: torch.dtype) -> Tensor:
    """One expert's matrix of a stack of them, dequantised where it is quantised."""
    if isinstance(stack, Tensor):
        return stack[index].to(dtype)
    from moebench_kernels import dequantise_weights  # not before the worker has said how triton is to run

    one = stack._replace(values=stack.values[index : index + 1], scales=stack.scales[index : index + 1])
    matrix: Tensor = dequantise_weights(one, dtype)[0]
    return matrix


@dataclass
class Inputs:
    """One draw. The buffers are static; the harness refills them in place.

    Attributes:
        x: [T, D].
        ids: int64 [T, K], -1 where dropped.
        weights: float32 [T, K], 0 where dropped.
        upstream: [T, D], the gradient of the output, or None for forward.
    """

    x: Tensor
    ids: Tensor
    weights: Tensor
    upstream: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that exist, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def refill(self, other: Inputs) -> None:
        """Copy another draw's values into these buffers."""
        for name, value in self.tensors().items():
            value.copy_(getattr(other, name))

    def clone(self) -> Inputs:
        """The same values in buffers of their own."""
        return Inputs(**{name: value.clone() for name, value in self.tensors().items()})


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def make_weights(layer: LayerSpec, precision: str, device: str, seed: int) -> Weights:
    """Normal weights scaled by 1/sqrt(fan-in), drawn on the device; then quantised, in a quantised precision."""
    D, F, E, Fs = layer.hidden_size, layer.expert_ffn_size, layer.routed_experts, layer.shared_width
    m = 2 if layer.gated else 1
    generator = torch.Generator(device=device).manual_seed(seed_of(seed, "weights"))

    def draw(*shape: int) -> Tensor:
        value = torch.empty(shape, dtype=DTYPES[base_precision(precision)], device=device)
        return value.normal_(std=shape[-1] ** -0.5, generator=generator)

    weights = Weights(
        router=draw(E, D),
        w_gate_up=draw(E, m * F, D),
        w_down=draw(E, D, F),
        shared_gate_up=draw(m * Fs, D) if Fs else None,
        shared_down=draw(D, Fs) if Fs else None,
        shared_gate=draw(1, D) if layer.shared_combine == "sigmoid_gate" else None,
    )
    return quantise(weights, precision) if precision in QUANTISED_PRECISIONS else weights


def quantise(weights: Weights, precision: str) -> Weights:
    """The same layer with its experts' matrices quantised as well."""
    from moebench_kernels import quantise_weights  # not before the worker has said how triton is to run

    up, down = (quantise_weights(stack, precision) for stack in (weights.w_gate_up, weights.w_down))
    return replace(weights, quantised=(up, down))


def weight_bytes(layer: LayerSpec, precision: str) -> int:
    """What `make_weights` takes."""
    return round(held_bytes(layer, precision))


@dataclass(frozen=True)
class Draw:
    """One draw of a problem before any capacity rule: float32 hidden states and the dropless routing."""

    x: Tensor
    routing: TopK
    upstream: Tensor


def make_draw(problem: Problem, router: Tensor, index: int) -> Draw:
    """Hidden states and routing that agree with each other, on the CPU.

    Args:
        router: W [E, D] in the precision it will be used in.
        index: 0..DRAWS-1 are timed; DRAWS is the check's own.

    Raises:
        NotImplementedError: the traffic needs a router that is not built.
        ValueError: the traffic cannot be had with this layer.
    """
    layer, traffic = problem.layer, parse_traffic(problem.traffic)
    generator = torch.Generator().manual_seed(seed_of(problem.seed, "inputs", index))
    x = torch.randn(problem.tokens, layer.hidden_size, generator=generator)
    upstream = torch.randn(problem.tokens, layer.hidden_size, generator=generator)
    router = router.float().cpu()
    logits = x @ router.T if traffic.pattern == "router" else None
    routing = route_problem(layer, traffic, logits, problem.tokens, seed_of(problem.seed, "routing", index))
    if can_impose(layer) and routing.logits is not None:
        x = impose_logits(x, router, routing.logits).float()
    return Draw(x, routing, upstream)


def can_impose(layer: LayerSpec) -> bool:
    """Whether hidden states can be moved so that the layer's linear router makes chosen choices."""
    return layer.routed_experts <= layer.hidden_size


def make_inputs(draw: Draw, capacity_factor: float | str, precision: str, device: str, *, backward: bool) -> Inputs:
    """The draw as a variant sees it: rounded to its precision, under its capacity rule, on its device."""
    routing = with_capacity(draw.routing, capacity_factor)
    dtype = DTYPES[base_precision(precision)]
    return Inputs(
        x=draw.x.to(device, dtype),
        ids=routing.ids.to(device),
        weights=routing.weights.to(device),
        upstream=draw.upstream.to(device, dtype) if backward else None,
    )
