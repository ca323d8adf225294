"""Refusal: what cannot be run with a layer as it is, said before anything is built. No torch."""

from __future__ import annotations

from moebench.catalogue.support import missing
from moebench.point import QUANTISED_PRECISIONS, STAGES, Problem, Variant, base_precision

NEEDS_ROUTER = ("layer", "gate")
# Imposed logits are z = W x. Near a square W some x are hundreds of times larger than z, and rounding them to 16 bits
# flips choices: of 1,536 tokens 49 in bf16 at E = D = 64, and 169 at 256; none at E = 0.8 D.
WELL_CONDITIONED = 0.8
NEEDS_EXPERTS = ("layer", "experts", "up_projection", "down_projection", "combine")


def refusal(problem: Problem, variant: Variant) -> str | None:
    """Why no provider can run this point, or None. A part that is not built is named, never replaced."""
    if variant.precision in QUANTISED_PRECISIONS and (cannot := _cannot_quantise(problem, variant)):
        return cannot
    reasons, scope = missing(problem.layer), variant.scope
    if scope in NEEDS_EXPERTS:
        for part in ("activation", "expert_bias"):
            if part in reasons:
                return f"{problem.model}: {reasons[part]}"
    if "shared" in reasons and scope == "layer":
        return f"{problem.model}: {reasons['shared']}; scope 'experts' runs without it"
    if "router" in reasons and (scope in NEEDS_ROUTER or problem.traffic == "router"):
        needs = f"traffic {problem.traffic!r}" if problem.traffic == "router" else f"scope {scope!r}"
        without = "scope 'experts' under balanced, uniform, zipf or active traffic does not"
        return f"{problem.model}: {reasons['router']}; {needs} needs it, {without}"
    if scope in NEEDS_ROUTER:
        cannot = _cannot_impose(problem) if problem.traffic != "router" else None
        return cannot or _cannot_hold(problem, variant)
    return None


def _cannot_quantise(problem: Problem, variant: Variant) -> str | None:
    layer, precision = problem.layer, variant.precision
    if problem.direction != "forward":
        return f"precision {precision!r} is forward only"
    if variant.scope in STAGES:
        return f"precision {precision!r} has no stage {variant.scope!r}; scopes 'layer' and 'experts' can be run"
    if precision.startswith("w4a16") and (layer.hidden_size % 2 or layer.expert_ffn_size % 2):
        return f"precision {precision!r} packs two weights in a byte; hidden_size and expert_ffn_size must be even"
    return None


def _cannot_impose(problem: Problem) -> str | None:
    layer = problem.layer
    if layer.routed_experts <= layer.hidden_size:
        return None
    return (
        f"traffic {problem.traffic!r} cannot be imposed on a router with more experts ({layer.routed_experts}) "
        f"than hidden units ({layer.hidden_size}); traffic 'router' and scope 'experts' can be run"
    )


def _cannot_hold(problem: Problem, variant: Variant) -> str | None:
    layer = problem.layer
    if variant.precision == "fp32" or layer.routed_experts <= WELL_CONDITIONED * layer.hidden_size:
        return None
    rounding = f"rounding to {base_precision(variant.precision)}"
    return (
        f"with {layer.routed_experts} experts and {layer.hidden_size} hidden units, {rounding} "
        "flips choices of the router; fp32 and scope 'experts' can be run"
    )
