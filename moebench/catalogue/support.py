"""What of a layer is not built. No torch.

A preset keeps its own router, activation and biases; what cannot run them
refuses them by these names instead of running something else.
"""

from __future__ import annotations

from moebench.catalogue.routers import ROUTERS
from moebench.catalogue.spec import ACTIVATIONS, SHARED_COMBINES, LayerSpec

BUILT_ACTIVATIONS = ACTIVATIONS
BUILT_SHARED = SHARED_COMBINES


def missing(layer: LayerSpec) -> dict[str, str]:
    """What of `layer` is not built: part -> one line of reason; today only a router that no table row knows."""
    kind = layer.router.kind
    return {} if kind in ROUTERS else {"router": f"router {kind!r} is unknown"}
