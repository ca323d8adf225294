"""Weights: the parameters of a layer, once per layer and precision.

Quantised precisions: the layer is drawn in bf16 and its experts' matrices are quantised once; the oracle and every
provider get the same quantised values, and the bf16 ones stay for what quantising costs.

Weight layout (that of transformers' experts): w_gate_up [E, 2F, D], gate rows
first ([E, F, D] for ungated experts), w_down [E, D, F], router [E, D].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moebench.catalogue.gate import gate_shapes
from moebench.catalogue.spec import SHARED_GATES, LayerSpec
from moebench.point import QUANTISED_PRECISIONS, base_precision
from moebench.work import held_bytes

if TYPE_CHECKING:
    from moebench_kernels import QuantisedWeights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of a base precision
BIAS_STD = 0.1
COSINE_TEMPERATURE = 0.6931471805599453  # log 2, where Tutel starts
PART = 1 << 22  # numbers that one thread draws at a time
Key = tuple[LayerSpec, str, int]  # layer, precision, seed: what says all of a layer's weights
GATE = "gate "  # before the names of the gate's further weights


@dataclass(frozen=True)
class Weights:
    """Parameters of one MoE layer, all of one dtype (but for `quantised`, and the gate's tables and biases).

    Attributes:
        router: [E, D], or as `moebench.catalogue.gate.gate_shapes` says.
        w_gate_up: [E, m*F, D], m = 2 for gated experts, else 1.
        w_down: [E, D, F].
        shared_gate_up: [m*Fs, D] or None; Fs is the width of all shared experts together.
        shared_down: [D, Fs] or None.
        shared_gate: [1, D] (Qwen, NLLB) or [2, D] (Residual-MoE), what weighs the shared output; or None.
        b_gate_up: [E, m*F] or None.
        b_down: [E, D] or None.
        gate: the gate's further weights by name.
        quantised: what w_gate_up and w_down were quantised to, in a quantised precision; else None.
    """

    router: Tensor
    w_gate_up: Tensor
    w_down: Tensor
    shared_gate_up: Tensor | None = None
    shared_down: Tensor | None = None
    shared_gate: Tensor | None = None
    b_gate_up: Tensor | None = None
    b_down: Tensor | None = None
    gate: dict[str, Tensor] = field(default_factory=dict)
    quantised: tuple[QuantisedWeights, QuantisedWeights] | None = None

    @property
    def experts(self) -> tuple[Any, Any]:
        """w_gate_up and w_down as providers are to take them: tensors, or QuantisedWeights."""
        return self.quantised or (self.w_gate_up, self.w_down)

    @property
    def biases(self) -> dict[str, Tensor]:
        """b_gate_up and b_down where the experts have them."""
        return {name: value for name in ("b_gate_up", "b_down") if (value := getattr(self, name)) is not None}

    @property
    def whole_gate(self) -> dict[str, Tensor]:
        """All of the gate's weights by name, the main map under "router"."""
        return {"router": self.router, **self.gate}

    def expert(self, index: int) -> tuple[Tensor, Tensor]:
        """One expert's matrices as asked for, float64: [m*F, D] and [D, F], dequantised where quantised."""
        first, second = (expert_matrix(stack, index, torch.float64) for stack in self.experts)
        return first, second

    def expert_biases(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        """One expert's biases, float64: [m*F] and [D], or None."""
        first, second = (None if stack is None else stack[index].double() for stack in (self.b_gate_up, self.b_down))
        return first, second

    def unquantised(self) -> Weights:
        """The layer before it was quantised."""
        return replace(self, quantised=None)

    def tensors(self) -> dict[str, Tensor]:
        """Those that exist, by name."""
        found = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        for name, weights in zip(("w_gate_up", "w_down"), self.quantised or (), strict=False):
            found |= {f"quantised {name}": weights.values, f"scales of {name}": weights.scales}
        return found | {GATE + name: value for name, value in self.gate.items()}

    def copy(self) -> Weights:
        """The same values in memory of their own; those that quantised ones were made of stay shared."""
        plain = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        kept = ("w_gate_up", "w_down") if self.quantised else ()
        made: dict[str, Any] = {name: value.clone() for name, value in plain.items() if name not in kept}
        if self.quantised:
            made["quantised"] = tuple(
                each._replace(values=each.values.clone(), scales=each.scales.clone()) for each in self.quantised
            )
        return replace(self, **made, gate={name: value.clone() for name, value in self.gate.items()})

    def leaves(self) -> Weights:
        """The same storage as leaves that collect gradients; of unquantised weights."""
        found: dict[str, Any] = {name: _leaf(value) for name, value in self.tensors().items()}
        gate = {name: found.pop(GATE + name) for name in self.gate}
        return Weights(**found, gate=gate)


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_(value.is_floating_point())


def expert_matrix(stack: Tensor | QuantisedWeights, index: int, dtype: torch.dtype) -> Tensor:
    """One expert's matrix of a stack of them, dequantised where it is quantised."""
    if isinstance(stack, Tensor):
        return stack[index].to(dtype)
    from moebench_kernels import dequantise_weights  # not before the worker has said how triton is to run

    one = stack._replace(values=stack.values[index : index + 1], scales=stack.scales[index : index + 1])
    matrix: Tensor = dequantise_weights(one, dtype)[0]
    return matrix


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def make_weights(layer: LayerSpec, precision: str, device: str, seed: int) -> Weights:
    """Normal weights scaled by 1/sqrt(fan-in), drawn on the device; then quantised, in a quantised precision."""
    D, F, E, Fs = layer.hidden_size, layer.expert_ffn_size, layer.routed_experts, layer.shared_width
    m = 2 if layer.gated else 1
    generator = torch.Generator(device=device).manual_seed(seed_of(seed, "weights"))

    def draw(*shape: int, std: float | None = None) -> Tensor:
        value = torch.empty(shape, dtype=DTYPES[base_precision(precision)], device=device)
        scale = max(1, shape[-1]) ** -0.5 if std is None else std
        if value.device.type == "cpu" and value.numel() >= 2 * PART:
            return _fill_in_parts(value, scale, generator)
        return value.normal_(std=scale, generator=generator)

    shapes = gate_shapes(layer)
    gates = SHARED_GATES
    weights = Weights(
        router=draw(*shapes.pop("router")),
        w_gate_up=draw(E, m * F, D),
        w_down=draw(E, D, F),
        shared_gate_up=draw(m * Fs, D) if Fs else None,
        shared_down=draw(D, Fs) if Fs else None,
        shared_gate=draw(gates[layer.shared_combine], D) if layer.shared_combine in gates else None,
        b_gate_up=draw(E, m * F, std=BIAS_STD) if layer.expert_bias else None,
        b_down=draw(E, D, std=BIAS_STD) if layer.expert_bias else None,
        gate={name: _gate_weight(name, shape, layer, draw, seed) for name, shape in shapes.items()},
    )
    return quantise(weights, precision) if precision in QUANTISED_PRECISIONS else weights


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal numbers on the CPU, float32; large ones on all threads."""
    value = torch.empty(shape)
    return _fill_in_parts(value, 1.0, generator) if value.numel() >= 2 * PART else value.normal_(generator=generator)


def _fill_in_parts(value: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Normal numbers on all threads, where PyTorch draws on one. Each part has its own seed, whoever fills it."""
    parts = value.view(-1).split(PART)
    seeds = torch.empty(len(parts), dtype=torch.int64).random_(generator=generator).tolist()

    def fill(part: Tensor, seed: int) -> Tensor:
        return part.normal_(std=std, generator=torch.Generator().manual_seed(seed))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, parts, seeds))
    return value


def _gate_weight(name: str, shape: tuple[int, ...], layer: LayerSpec, draw: Callable[..., Tensor], seed: int) -> Tensor:
    """One of the gate's further weights, as a trained router would have it."""
    E = layer.choices
    if name == "table":
        from moebench.routing.fixed import balanced_table

        return balanced_table(shape[0], E, shape[1], seed_of(seed, "table") % 2**31).to(draw(1).device)
    if name == "selection_bias":
        # Of softmax scores, which are near 1/E, and of scores near 1/2; centred, so that shares still sum to 1.
        value = draw(*shape, std=0.03 / E if layer.router.kind.startswith("softmax") else 0.03).float()
        return value - value.mean()
    if name == "thresholds":
        # As many as training would keep: an expert takes a token whose share is among the K/E largest.
        shares = torch.softmax(draw(4096, E, std=1.0).float(), dim=1).flatten()[:1_000_000]
        return torch.full(shape, float(shares.quantile(1 - layer.top_k / E)), device=shares.device)
    if name in ("temperature", "slot_scale"):
        return torch.full(shape, COSINE_TEMPERATURE if name == "temperature" else 1.0, device=draw(1).device)
    return draw(*shape, std=0.1 if name == "logit_bias" else None)


def quantise(weights: Weights, precision: str) -> Weights:
    """The same layer with its experts' matrices quantised as well."""
    from moebench_kernels import quantise_weights  # not before the worker has said how triton is to run

    up, down = (quantise_weights(stack, precision) for stack in (weights.w_gate_up, weights.w_down))
    return replace(weights, quantised=(up, down))


def weight_bytes(layer: LayerSpec, precision: str) -> int:
    """What `make_weights` takes."""
    return round(held_bytes(layer, precision))


def weights_beside(held: Mapping[Key, Weights], key: Key, device: str) -> Weights:
    """`make_weights` of a key, made of what is held of that layer in another precision where it can be.

    Quantised ones and those that they were made of are then the same tensors: two copies of the largest layers in bf16,
    beside what was quantised, would fill a GPU.
    """
    layer, precision, seed = key
    for (other_layer, other, other_seed), found in held.items():
        if (other_layer, base_precision(other), other_seed) == (layer, base_precision(precision), seed):
            shared = found.unquantised()
            return quantise(shared, precision) if precision in QUANTISED_PRECISIONS else shared
    return make_weights(layer, precision, device, seed)


def needed_bytes(layer: LayerSpec, precisions: Iterable[str], held: Iterable[Key]) -> int:
    """What `weights_beside` takes for these precisions, one after another, of a layer that is held in others."""
    every, there = list(precisions), {base_precision(precision) for other, precision, _ in held if other == layer}
    plain = {base_precision(precision) for precision in every} - there
    beside = sum(weight_bytes(layer, precision) - weight_bytes(layer, base_precision(precision)) for precision in every)
    return beside + sum(weight_bytes(layer, precision) for precision in plain)
