"""Case: what a provider is asked to do, in full."""

from __future__ import annotations

from dataclasses import dataclass

from moebench.catalogue.routers import router_info
from moebench.catalogue.spec import LayerSpec
from moebench.point import Capacity
from moebench.routing.capacity import capacity_slots


@dataclass(frozen=True)
class Case:
    """What a provider is asked to do, in full.

    Attributes:
        layer, tokens, direction, precision, capacity, scope: as in Problem and Variant.
        device_kind: "cpu" or "cuda".
    """

    layer: LayerSpec
    tokens: int
    direction: str
    precision: str
    capacity: Capacity
    scope: str
    device_kind: str

    @property
    def slots(self) -> int | None:
        """Capacity C of each expert; None when dropless."""
        return capacity_slots(self.capacity, self.tokens, self.layer.top_k, self.layer.routed_experts)

    @property
    def form(self) -> str:
        """The Routing that the layer's router gives."""
        return router_info(self.layer.router.kind).form

    @property
    def drops(self) -> bool:
        """Whether ids may be -1: capacity, padding of a Ragged, a second expert that is not kept, zero experts."""
        spec = self.layer.router
        may = spec.zero_experts > 0 or (spec.kind == "gshard_top2" and spec.training)
        return self.slots is not None or self.form == "Ragged" or may

    @property
    def activation(self) -> str:
        """The activation as `activate` takes it, its limit included."""
        limit = self.layer.activation_limit
        return self.layer.activation if limit is None else f"{self.layer.activation}:{limit:g}"
