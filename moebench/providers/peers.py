"""Adapters of other libraries: what they share.

An adapter is one function `ready(w_gate_up, w_down, case) -> call(x, ids, gates) -> y`. It imports the library,
puts the weights into the library's layout once, and returns the call that is checked and timed. What the library
cannot do is declared on its `PeerProvider`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moebench.providers import PROVIDERS
from moebench.providers.base import ExpertsProvider, State, source_digest
from moebench.providers.case import Case
from moebench.providers.load import Unavailable
from moebench.providers.torch_grouped import SortPlan, sort_plan
from moebench.weights import Weights

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PeerProvider(ExpertsProvider):
    """Another library's experts function; `experts` is the adapter's `ready`.

    Attributes:
        devices, precisions, directions: those it takes.
        multiple_of: what hidden_size and expert_ffn_size must be multiples of.
    """

    devices: tuple[str, ...] = ("cuda",)
    precisions: tuple[str, ...] = ("bf16", "fp16")
    directions: tuple[str, ...] = ("forward",)
    multiple_of: int = 1

    def fingerprint(self) -> str:
        return source_digest(self.experts, self.version, source_digest(peer_provider), str(torch.__version__))

    def refuse(self, case: Case) -> str | None:
        if case.drops and not self.accepts_drops:
            return f"{self.name} takes no dropped assignments"
        asked = {"devices": case.device_kind, "precisions": case.precision, "directions": case.direction}
        for what, value in asked.items():
            if value not in getattr(self, what):
                return f"{self.name} takes {what} {', '.join(getattr(self, what))}, not {value}"
        for what, width in (
            ("hidden_size", case.layer.hidden_size),
            ("expert_ffn_size", case.layer.expert_ffn_size),
        ):
            if width % self.multiple_of:
                return f"{self.name} needs {what} to be a multiple of {self.multiple_of}, which {width} is not"
        return super().refuse(case)

    def prepare(self, weights: Weights, case: Case) -> State:
        call: Call = self.experts(weights.w_gate_up, weights.w_down, case)
        return State(weights, case, lambda x, ids, gates, w_gate_up, w_down: call(x, ids, gates))

    def executed_flops(self, case: Case, counts: Tensor) -> float | None:
        # Tiles are rounded up as the library likes: only an adapter that knows says how.
        return None if self.flops_executed is None else super().executed_flops(case, counts)


def peer_provider(name: str, ready: Callable[[Tensor, Tensor, Case], Call], **declared: Any) -> PeerProvider:
    """The provider of an adapter, under the version of its library that is installed."""
    package = PROVIDERS[name].needs
    assert package is not None
    declared.setdefault("activations", ("swiglu",))
    declared.setdefault("accepts_drops", False)
    return PeerProvider(name, ready, version=package.version(), **declared)


def peer(module: str, *attributes: str) -> Any:
    """Import a peer's module: the module, its attribute, or a tuple of its attributes.

    Raises:
        Unavailable: it does not import here, or has changed its interface.
    """
    try:
        found = importlib.import_module(module)
        values = tuple(getattr(found, name) for name in attributes)
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())[:300]
        raise Unavailable(f"importing {module} failed: {type(error).__name__}: {reason}") from error
    if not attributes:
        return found
    return values[0] if len(values) == 1 else values


def require_capability(name: str, device: torch.device, majors: tuple[int, ...]) -> None:
    """Raise NotImplementedError unless a CUDA device is of one of the compute capabilities."""
    if device.type == "cuda" and (major := torch.cuda.get_device_capability(device)[0]) not in majors:
        allowed = ", ".join(f"{value}.x" for value in majors)
        raise NotImplementedError(f"{name} needs compute capability {allowed}; this GPU has {major}.x")


def interleave(w_gate_up: Tensor) -> Tensor:
    """Gate rows first [E, 2F, D] -> gate and up rows alternating [E, 2F, D]."""
    return torch.stack(w_gate_up.chunk(2, dim=1), dim=2).flatten(1, 2)


def up_first(w_gate_up: Tensor) -> Tensor:
    """Gate rows first [E, 2F, D] -> up rows first [E, 2F, D]."""
    return torch.cat(w_gate_up.chunk(2, dim=1)[::-1], dim=1)


class PaddedPlan(NamedTuple):
    """Assignments in expert order, each expert's rows starting at a multiple of some alignment.

    Attributes:
        plan: the same without gaps.
        row2padded: int64 [T*K], where each of its rows goes.
        ends: int32 [E], the padded row behind each expert's last block.
        rows: padded rows in all, known without asking the device.
    """

    plan: SortPlan
    row2padded: Tensor
    ends: Tensor
    rows: int

    def pad(self, rows: Tensor) -> Tensor:
        """[T*K, D] -> [rows, D], zero in the gaps."""
        return rows.new_zeros(self.rows, rows.shape[1]).index_copy(0, self.row2padded, rows)

    def unpad(self, rows: Tensor) -> Tensor:
        """[rows, D] -> [T*K, D]."""
        return rows[self.row2padded]


def padded_plan(ids: Tensor, experts: int, alignment: int) -> PaddedPlan:
    """ids int64 [T, K] without drops -> PaddedPlan."""
    plan = sort_plan(ids, experts, drops=False)
    counts = plan.ends.diff(prepend=plan.ends.new_zeros(1)).long()
    blocks = (counts + alignment - 1).div(alignment, rounding_mode="floor") * alignment
    ends = blocks.cumsum(0)
    gap = (ends - blocks) - (plan.ends.long() - counts)  # how far each expert's rows move
    expert = ids.flatten()[plan.row2assignment]
    rows = torch.arange(ids.numel(), device=ids.device)
    total = -(-(ids.numel() + experts * (alignment - 1)) // alignment) * alignment
    return PaddedPlan(plan, rows + gap[expert], ends.to(torch.int32), total)


def padded_rows(counts: Tensor, alignment: int) -> float:
    """Rows of a padded plan that are computed, given kept assignments per expert."""
    return float(((counts + alignment - 1).div(alignment, rounding_mode="floor") * alignment).sum())
