"""What of a layer is not built yet. No torch.

A preset keeps its own router, activation and biases; what cannot run them
refuses them by these names instead of running something else.
"""

from __future__ import annotations

from moebench.catalogue.routers import ROUTERS
from moebench.catalogue.spec import LayerSpec, RouterSpec

BUILT_ACTIVATIONS = ("swiglu", "geglu", "relu", "gelu", "silu")
BUILT_SHARED = ("none", "add", "sigmoid_gate")


def missing(layer: LayerSpec) -> dict[str, str]:
    """What of `layer` is not built: "router", "activation", "expert_bias", "shared" -> one line of reason.

    "router" matters to what routes (scopes `layer` and `gate`, traffic `router`);
    "activation" and "expert_bias" to every scope with experts; "shared" to scope `layer`.
    """
    reasons = {
        "router": _router(layer.router),
        "activation": None
        if layer.activation in BUILT_ACTIVATIONS
        else f"activation {layer.activation!r} is not built yet; built are {', '.join(BUILT_ACTIVATIONS)}",
        "expert_bias": "biases in the experts are not built yet" if layer.expert_bias else None,
        "shared": None
        if layer.shared_combine in BUILT_SHARED
        else f"shared expert of the form {layer.shared_combine!r} is not built yet; built are add, sigmoid_gate",
    }
    return {part: reason for part, reason in reasons.items() if reason}


def _router(router: RouterSpec) -> str | None:
    info = ROUTERS.get(router.kind)
    if info is None:
        return f"router {router.kind!r} is unknown"
    if not info.built:
        return f"router {router.kind!r} is not built yet ({info.rule})"
    if router.groups > 1:
        return f"router {router.kind!r} with {router.groups} groups is not built yet"
    if router.logit_bias:
        return f"router {router.kind!r} with a bias on its logits is not built yet"
    return None
