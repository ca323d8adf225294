"""Where a transformers model says which experts its tokens go to: hooks that listen, and what they heard.

In transformers 5 nearly every MoE layer hands ids and weights, both [T, K], to one experts module. A pre-hook on that
call sees what the experts are really given, whichever router made it and whichever experts implementation runs. Two
families do it otherwise (Llama 4 multiplies the input, JetMoe sorts inside its router): their router's answer is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moebench.trace_file import expert_dtype

Picks = tuple[Tensor, Tensor]


class Untraceable(ValueError):
    """What the model does cannot be recorded; one line."""


@dataclass
class Layer:
    """What one MoE layer said, window by window: ids and weights, both [T, K]."""

    name: str
    routed_experts: int
    on_input: bool = False
    wanted: bool = True
    ids: list[NDArray[Any]] = field(default_factory=list)
    weights: list[NDArray[Any]] = field(default_factory=list)

    @property
    def top_k(self) -> int:
        """K."""
        return int(self.ids[0].shape[1])

    def keep(self, picks: Picks | None) -> None:
        """Add one call's ids and weights; None is a call that has none."""
        if picks is None or not self.wanted:
            return
        if not self.routed_experts:
            raise Untraceable(f"{self.name}: it does not say how many experts it has")
        ids, weights = (each.detach().cpu() for each in picks)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.routed_experts:
            raise Untraceable(f"{self.name}: expert ids outside 0 to {self.routed_experts - 1}")
        self.ids.append(ids.numpy().astype(expert_dtype(self.routed_experts)))
        self.weights.append(weights.float().numpy())


class Listener:
    """Hooks on every MoE layer of a model; `layers` are those that have said something."""

    def __init__(self, model: nn.Module) -> None:
        self.all: list[Layer] = []
        self.hooks = [hook for name, module in model.named_modules() if (hook := self._listen(model, name, module))]

    @property
    def layers(self) -> list[Layer]:
        """In the model's order."""
        return [layer for layer in self.all if layer.ids]

    def close(self) -> None:
        """Take the hooks off again."""
        for hook in self.hooks:
            hook.remove()

    def _listen(self, model: nn.Module, name: str, module: nn.Module) -> Any:
        kind = type(module).__name__
        if kind == "Llama4Router":
            layer = self._add(name, module, on_input=True)
            return module.register_forward_hook(lambda m, _, out: layer.keep(_llama4(m, out)))
        if kind == "JetMoeTopKGating" and type(model.get_submodule(name.rpartition(".")[0])).__name__.endswith("MoE"):
            layer = self._add(name, module)
            return module.register_forward_hook(lambda m, _, out: layer.keep(_jetmoe(out)))
        if kind.endswith("Experts"):
            layer = self._add(name, module)
            return module.register_forward_pre_hook(
                lambda m, args, kwargs: layer.keep(_given([*args, *kwargs.values()])), with_kwargs=True
            )
        return None

    def _add(self, name: str, module: nn.Module, *, on_input: bool = False) -> Layer:
        # LongCat's ids run over experts that compute and experts that pass their input on.
        count = getattr(module, "total_experts", 0) or getattr(module, "num_experts", 0)
        self.all.append(Layer(name, count if isinstance(count, int) else 0, on_input))
        return self.all[-1]


def _given(arguments: Sequence[Any]) -> Picks | None:
    """The ids and weights among what an experts module is called with, after the hidden states."""
    tensors = [each for each in arguments[1:] if isinstance(each, Tensor) and each.ndim == 2]
    for ids in tensors:
        for weights in tensors:
            if not ids.is_floating_point() and weights.is_floating_point() and ids.shape == weights.shape:
                return ids, weights
    return None


def _llama4(router: Any, answer: Any) -> Picks:
    """Llama 4 gives scores and logits, both [T, E]; scores are 0 but for the picks."""
    scores, logits = answer
    ids = torch.topk(logits, router.top_k, dim=1).indices
    return ids, scores.gather(1, ids)


def _jetmoe(answer: Any) -> Picks:
    """JetMoe gives its T * K picks sorted by expert: their places, tokens, weights, and the size of each expert."""
    place, _, weights, sizes, logits = answer
    experts = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(place.device)
    back = torch.argsort(place)
    return experts[back].view(len(logits), -1), weights[back].view(len(logits), -1)


def numbers_of(layers: Sequence[Layer]) -> list[int]:
    """The model's number of each layer, as its name has it; the place among them where names do not tell."""
    found = [re.search(r"(?:layers?|blocks?|h)\.(\d+)\.", layer.name) for layer in layers]
    numbers = [int(match[1]) for match in found if match]
    return numbers if numbers == sorted(set(numbers)) and len(numbers) == len(layers) else list(range(len(layers)))


def keep_only(layers: Sequence[Layer], wanted: Sequence[int]) -> None:
    """From now on listen only to the layers of these numbers; forget what the others have said.

    Raises:
        ValueError: the model has no MoE layer of some number.
    """
    numbers = numbers_of(layers)
    if absent := [number for number in wanted if number not in numbers]:
        there = f"{', '.join(map(str, numbers[:40]))}{', …' if numbers[40:] else ''}"
        raise ValueError(f"--layers: layer {absent[0]} is no MoE layer of this model (allowed: {there})")
    for number, layer in zip(numbers, layers, strict=True):
        if number not in wanted:
            layer.wanted = False
            layer.ids.clear()
            layer.weights.clear()


def check_window(layers: Sequence[Layer], windows: int, tokens: int, family: str) -> None:
    """Every layer has spoken once of each token of each window, and all alike.

    Raises:
        ValueError: the family is one that cannot be recorded, by name.
    """
    cannot = f"the family {family} cannot be traced"
    if not layers:
        raise Untraceable(f"{cannot}: no layer of it calls experts with ids and weights; is it a mixture of experts?")
    for layer in layers:
        if len(layer.ids) != windows or len(layer.ids[-1]) != tokens:
            raise Untraceable(f"{cannot}: {layer.name} is not run once for each token")
    first = layers[0]
    for number, layer in zip(numbers_of(layers), layers, strict=True):
        if (layer.routed_experts, layer.top_k) != (first.routed_experts, first.top_k):
            raise ValueError(
                f"layers differ: layer {number} has E={layer.routed_experts}, K={layer.top_k}, an earlier one "
                f"E={first.routed_experts}, K={first.top_k}; choose layers that are alike with --layers"
            )
