"""Refusal: what cannot be run with a layer as it is, said before anything is built. No torch."""

from __future__ import annotations

from moebench.catalogue.support import missing
from moebench.point import Problem, Variant

NEEDS_ROUTER = ("layer", "gate")
NEEDS_EXPERTS = ("layer", "experts", "up_projection", "down_projection", "combine")


def refusal(problem: Problem, variant: Variant) -> str | None:
    """Why no provider can run this point, or None. A part that is not built is named, never replaced."""
    reasons, scope = missing(problem.layer), variant.scope
    if scope in NEEDS_EXPERTS:
        for part in ("activation", "expert_bias"):
            if part in reasons:
                return f"{problem.model}: {reasons[part]}"
    if "shared" in reasons and scope == "layer":
        return f"{problem.model}: {reasons['shared']}; scope 'experts' runs without it"
    if "router" in reasons and problem.traffic == "router":
        return f"{problem.model}: {reasons['router']}; traffic 'router' needs it, balanced or zipf traffic does not"
    if "router" in reasons and scope in NEEDS_ROUTER:
        return f"{problem.model}: {reasons['router']}; scope {scope!r} needs it, scope 'experts' does not"
    if scope in NEEDS_ROUTER and problem.traffic != "router":
        return _cannot_impose(problem)
    return None


def _cannot_impose(problem: Problem) -> str | None:
    layer = problem.layer
    if layer.routed_experts <= layer.hidden_size:
        return None
    return (
        f"traffic {problem.traffic!r} cannot be imposed on a router with more experts ({layer.routed_experts}) "
        f"than hidden units ({layer.hidden_size}); traffic 'router' and scope 'experts' can be run"
    )
