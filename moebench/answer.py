"""Answer: what an arm said on the check's inputs, and which tokens of it are looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from moebench.workload import Choice, Inputs

CHECK_TOKENS = 256

T = TypeVar("T")


class Wrong(Exception):
    """The answer is wrong in a way that no error norm expresses."""


@dataclass(frozen=True)
class Answer:
    """What the arm said on the check's inputs.

    Attributes:
        inputs: those of the check, as the variant sees them (capacity applied).
        wanted: the dropless routing.
        output: whatever `run` returned.
        grads: gradients by name ("x", "weights", "w_gate_up", ...); empty for forward.
        known: what the oracle has said on these inputs already, for all arms of the block.
    """

    inputs: Inputs
    wanted: Choice
    output: Any
    grads: dict[str, Tensor]
    known: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def once(self, key: tuple[Any, ...], ask: Callable[[], T]) -> T:
        """The oracle's answer of that name, computed by the first arm that needs it."""
        if key not in self.known:
            self.known[key] = ask()
        found: T = self.known[key]
        return found


def sample_tokens(choice: Choice, tokens: int, limit: int = CHECK_TOKENS) -> Tensor:
    """Up to `limit` of T token indices, sorted: first one token for each active expert, then evenly spread ones."""
    if tokens <= limit:
        return torch.arange(tokens)
    if choice.combine is not None:  # a Mix: every token meets every expert
        return torch.linspace(0, tokens - 1, limit).long()
    flat = choice.ids.cpu().flatten()
    token = torch.arange(flat.numel()) // choice.ids.shape[1] if choice.token is None else choice.token.cpu()
    owner = torch.full((int(flat.max()) + 2,), -1, dtype=torch.int64)
    owner.scatter_(0, flat.where(flat >= 0, len(owner) - 1), token)
    hits = owner[:-1][owner[:-1] >= 0].unique()[:limit]
    spread = torch.linspace(0, tokens - 1, limit - len(hits)).long()
    picked: Tensor = torch.cat([hits, spread]).unique()
    return picked


def tensor_of(output: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The output, if it is a tensor of this shape and dtype and finite everywhere; else raise Wrong."""
    if not isinstance(output, Tensor):
        raise Wrong(f"returned a {type(output).__name__}, not a tensor")
    if tuple(output.shape) != shape:
        raise Wrong(f"returned shape {list(output.shape)}, not {list(shape)}")
    if output.dtype != dtype:
        raise Wrong(f"returned {output.dtype}, not {dtype}")
    broken = int((~output.detach().isfinite()).any(dim=1).sum())  # in all rows, as the errors are of sampled ones
    if broken:
        raise Wrong(f"{broken} of {shape[0]} rows hold NaN or infinity")
    return output.detach()
