"""Whether a trace can be replayed on a layer, and which of its rows. No torch."""

from __future__ import annotations

from moebench.trace_file import Facts


def check_fit(path: str, facts: Facts, top_k: int, routed_experts: int) -> None:
    """Raises ValueError where the trace is of another E or K."""
    if (facts.routed_experts, facts.top_k) != (routed_experts, top_k):
        raise ValueError(
            f"{path}: recorded with E={facts.routed_experts}, K={facts.top_k}; the layer has E={routed_experts}, "
            f"K={top_k}, and a trace fits only layers of its own E and K"
        )


def place_of(path: str, facts: Facts, layer: int | None) -> int:
    """The layer's row in the trace; the middle one for None."""
    if layer is None:
        return len(facts.layers) // 2
    if layer not in facts.layers:
        listed = f"{', '.join(map(str, facts.layers[:40]))}{', …' if facts.layers[40:] else ''}"
        raise ValueError(f"{path}: has no layer {layer} (allowed: {listed})")
    return facts.layers.index(layer)
