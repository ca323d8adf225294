"""Refusal: what cannot be run with a layer as it is, said before anything is built. No torch."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from moebench.catalogue.gate import WELL_CONDITIONED
from moebench.catalogue.routers import imposable, router_info
from moebench.point import DROPLESS, QUANTISED_PRECISIONS, STAGES, Problem, Variant, base_precision
from moebench.traffic import parse_traffic

NEEDS_ROUTER = ("layer", "gate")
BY_WEIGHT = ("probability", "batch_priority")  # drop orders that compare weights of different tokens
# Routers whose thresholds or rankings between tokens no margin can be kept from.
FINE = ("sparsemixer", "batch_mask", "expert_choice_mesh")


def refusal(problem: Problem, variant: Variant) -> str | None:
    """Why no provider can run this point, or None."""
    if variant.precision in QUANTISED_PRECISIONS and (cannot := _cannot_quantise(problem, variant)):
        return cannot
    return _capacity(problem, variant) or _traffic(problem, variant)


def _capacity(problem: Problem, variant: Variant) -> str | None:
    """Why the capacity rule cannot go with the router."""
    info, kind = router_info(problem.layer.router.kind), problem.layer.router.kind
    if variant.capacity_factor == DROPLESS:
        return None
    if info.form != "TopK":
        return f"router {kind!r} has a capacity of its own ({info.capacity}); capacity_factor 'dropless' can be run"
    if problem.layer.router.zero_experts:
        return f"router {kind!r} with zero experts is dropless"
    if float(variant.capacity_factor) <= 0 and variant.capacity_rounding != "tutel":
        rounding = f"with capacity_rounding {variant.capacity_rounding!r}"
        return f"capacity_factor {variant.capacity_factor:g} {rounding}: it must be above 0 (or use 'tutel')"
    return None


def _traffic(problem: Problem, variant: Variant) -> str | None:
    """Why the traffic cannot be had with the router, the scope and the precision."""
    info, kind, own = router_info(problem.layer.router.kind), problem.layer.router.kind, problem.traffic == "router"
    if "token_ids" in info.side and problem.traffic.partition(":")[0] in ("active", "trace"):
        return f"router {kind!r} chooses by token id; traffic balanced, uniform, zipf and router can be run"
    if info.form != "TopK" and not (own or imposable(problem.layer.router)):
        return f"router {kind!r} chooses no experts that traffic {problem.traffic!r} could ask for; use 'router'"
    if problem.traffic.startswith("trace:") and (other := _of_another_layer(problem)):
        return other
    if variant.scope not in NEEDS_ROUTER:
        return None
    if not (own or "token_ids" in info.side):
        return _cannot_impose(problem) or _cannot_hold(problem, variant)
    return _cannot_hold(problem, variant)


@lru_cache(maxsize=64)
def _of_another_layer(problem: Problem) -> str | None:
    """Why the trace cannot be replayed on the layer."""
    from moebench.trace_file import read_facts
    from moebench.trace_fit import check_fit, place_of

    traffic, layer = parse_traffic(problem.traffic), problem.layer
    path = str(Path(str(traffic.path)).expanduser())
    try:
        facts = read_facts(Path(path))
        check_fit(path, facts, layer.top_k, layer.choices)
        place_of(path, facts, traffic.trace_layer)
    except ValueError as error:
        return str(error)
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
    layer, kind = problem.layer, problem.layer.router.kind
    choices = layer.choices
    most = int(WELL_CONDITIONED * layer.hidden_size)
    if not imposable(layer.router):
        how = "whose noise depends on x" if router_info(kind).imposable else "which is not a linear map of x"
        return (
            f"traffic {problem.traffic!r} cannot be imposed on router {kind!r}, {how}; "
            "traffic 'router' and scope 'experts' can be run"
        )
    if choices <= most:
        return None
    return (
        f"traffic {problem.traffic!r} can be imposed on at most {most} experts with {layer.hidden_size} hidden units, "
        f"not on {choices}; traffic 'router' and scope 'experts' can be run"
    )


def _cannot_hold(problem: Problem, variant: Variant) -> str | None:
    """Why 16 bits would change what is chosen."""
    layer, info = problem.layer, router_info(problem.layer.router.kind)
    if variant.precision == "fp32":
        return None
    rounding = f"rounding to {base_precision(variant.precision)}"
    if variant.capacity_factor != DROPLESS and variant.drop_order in BY_WEIGHT:
        return f"{rounding} changes who is dropped by {variant.drop_order}; fp32 and scope 'experts' can be run"
    if layer.router.training and info.noise:
        return f"in training, {rounding} flips choices that router {layer.router.kind!r} draws; fp32 can be run"
    if layer.router.kind in FINE and not layer.router.training:
        return (
            f"{rounding} flips choices of router {layer.router.kind!r}, which compares scores finely; fp32 can be run"
        )
    if not info.imposable and "token_ids" not in info.side and info.form == "TopK":
        return f"{rounding} flips choices of router {layer.router.kind!r}, which takes x as it comes; fp32 can be run"
    if not info.imposable or layer.routed_experts <= WELL_CONDITIONED * layer.hidden_size:
        return None  # the rest take x as it comes, but choose by nothing that 16 bits change
    return (
        f"with {layer.routed_experts} experts and {layer.hidden_size} hidden units, {rounding} "
        "flips choices of the router; fp32 and scope 'experts' can be run"
    )
