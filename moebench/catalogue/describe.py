"""What is known of a model, as flat rows: the layer, parameters, sparsity, FLOPs, bytes, memory. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebench.catalogue.huggingface import read_config
from moebench.catalogue.models import model, models, resolve_layer
from moebench.catalogue.routers import ROUTERS
from moebench.catalogue.spec import LayerSpec, ModelSpec, MoELayers
from moebench.point import Problem, Variant
from moebench.work import BYTES_PER_WEIGHT, expected_active, point_work

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.table import Table

Row = dict[str, Any]
MEMORY_PRECISIONS = ("fp32", "bf16", "fp8", "int4")


def list_models() -> list[Row]:
    """One row for each MoE layer kind of each model; `reason` says why the undisclosed ones are not runnable."""
    return [row for spec in models().values() for row in _listed(spec)]


def describe(name_or_path: str, tokens: int = 1, precision: str = "bf16") -> list[Row]:
    """One flat row for each MoE layer kind of a preset ("id" or "id:kind") or of a config.json.

    Args:
        name_or_path: a preset, or the path of a config.json.
        tokens: T of one call; the touched weights are what uniform routing is expected to hit.
        precision: of the weights: fp32, bf16, fp16, fp8 or int4 (values alone), or a quantised one that suites
            have, such as fp8:row, whose touched bytes count scales and a router in bf16.

    Raises:
        ValueError: no such model or file, a file that is no MoE, T below 1, or an unknown precision.
    """
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; it must be at least 1")
    if precision not in BYTES_PER_WEIGHT:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(BYTES_PER_WEIGHT)}")
    spec, kinds = _find(name_or_path)
    if not kinds:
        return [_head(spec, None) | {"runnable": False, "reason": spec.unavailable}]
    return [
        _head(spec, kind) | _shape(kind.layer) | _parameters(spec, kind) | _work(spec, kind, tokens, precision)
        for kind in kinds
    ]


def render(rows: Iterable[Row]) -> Table:
    """The rows as a rich table of two columns and more, one a layer kind; text is shown as it is, never as markup."""
    from rich.table import Table
    from rich.text import Text

    described = list(rows)
    table = Table(show_header=False, box=None, pad_edge=False)
    for key in described[0] if described else ():
        table.add_row(Text(key), *(Text(_shown(key, row.get(key))) for row in described))
    return table


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and key != "year" else str(value)


def _find(name_or_path: str) -> tuple[ModelSpec, tuple[MoELayers, ...]]:
    if name_or_path in models():
        spec = models()[name_or_path]
        return spec, spec.layers
    path = Path(name_or_path)
    if path.suffix == ".json" or "/" in name_or_path or path.exists():
        spec = read_config(path)
        return spec, spec.layers
    if ":" in name_or_path:
        spec, kind = resolve_layer(name_or_path)
        return spec, (kind,)
    spec = model(name_or_path)
    return spec, spec.layers


def _listed(spec: ModelSpec) -> list[Row]:
    kinds: tuple[MoELayers | None, ...] = spec.layers or (None,)
    return [
        {
            "id": f"{spec.id}:{kind.name}" if kind and kind.name else spec.id,
            "title": spec.title,
            "year": spec.year,
            "routed_experts": kind.layer.routed_experts if kind else None,
            "top_k": kind.layer.top_k if kind else None,
            "hidden_size": kind.layer.hidden_size if kind else None,
            "expert_ffn_size": kind.layer.expert_ffn_size if kind else None,
            "shared_experts": kind.layer.shared_experts if kind else None,
            "moe_layers": kind.count if kind else None,
            **_either("total_params", spec.computed_total, spec.published_total),
            **_either("active_params", spec.computed_active, spec.published_active),
            "router": kind.layer.router.kind if kind else None,
            **_runs(spec, kind),
        }
        for kind in kinds
    ]


def _either(name: str, computed: int | None, published: float | None) -> Row:
    """Our own count, or where there is none the makers' figure; `..._from` says which."""
    source = "computed" if computed else "published" if published else None
    value = computed or (round(published) if published else None)
    return {name: value, f"{name}_from": source}


def _runs(spec: ModelSpec, kind: MoELayers | None) -> Row:
    return {"runnable": kind is not None, "reason": spec.unavailable, "alias_of": spec.alias_of}


def _head(spec: ModelSpec, kind: MoELayers | None) -> Row:
    return {
        "model": spec.id,
        "title": spec.title,
        "year": spec.year,
        "layer": (kind.name or None) if kind else None,
        "moe_layers": kind.count if kind else None,
        **_runs(spec, kind),
        "published_total_params": spec.published_total,
        "published_active_params": spec.published_active,
        "source": spec.source,
        "notes": spec.notes,
    }


def _shape(layer: LayerSpec) -> Row:
    router = layer.router
    return {
        "hidden_size": layer.hidden_size,
        "expert_ffn_size": layer.expert_ffn_size,
        "routed_experts": layer.routed_experts,
        "top_k": layer.top_k,
        "activation": layer.activation,
        "activation_limit": layer.activation_limit,
        "gated": layer.gated,
        "expert_bias": layer.expert_bias,
        "router": router.kind,
        "router_rule": ROUTERS[router.kind].summary,
        "normalise": router.normalise,
        "scale": router.scale,
        "groups": router.groups,
        "topk_groups": router.topk_groups,
        "logit_bias": router.logit_bias,
        "zero_experts": router.zero_experts,
        "shared_experts": layer.shared_experts,
        "shared_ffn_size": layer.shared_ffn_size,
        "shared_combine": layer.shared_combine,
    }


def _parameters(spec: ModelSpec, kind: MoELayers) -> Row:
    layer, total, active = kind.layer, spec.computed_total, spec.computed_active
    published = spec.published_total
    return {
        "expert_params": layer.expert_params(),
        "router_params": layer.router_params(),
        "shared_params": layer.shared_params(),
        "layer_params": layer.total_params(),
        "layer_active_params": layer.active_params(),
        "total_params": total,
        "active_params": active,
        "total_over_published": total / published if total and published else None,
        "uncounted": spec.uncounted,
        "active_expert_fraction": layer.top_k / layer.routed_experts,
        "active_layer_fraction": layer.active_params() / layer.total_params(),
        "active_model_fraction": active / total if active and total else None,
    }


def _work(spec: ModelSpec, kind: MoELayers, tokens: int, precision: str) -> Row:
    touched = point_work(Problem(spec.id, kind.layer, tokens), Variant("", precision)).weight_bytes
    # The memory of the whole model, and of its MoE layers of every kind.
    moe = sum(each.count * each.layer.total_params() for each in spec.layers)
    total = spec.computed_total
    row: Row = {
        "tokens": tokens,
        "precision": precision,
        "flops_per_token": _flops(spec, kind.layer),
        "moe_flops_per_token": sum(each.count * _flops(spec, each.layer) for each in spec.layers),
        "expected_active_experts": expected_active(kind.layer, tokens),
        "touched_weight_bytes": touched,
        "touched_weight_bytes_per_token": touched / tokens,
    }
    for name in MEMORY_PRECISIONS:
        size = BYTES_PER_WEIGHT[name]
        row[f"layer_bytes_{name}"] = kind.layer.total_params() * size
        row[f"moe_bytes_{name}"] = moe * size
        row[f"model_bytes_{name}"] = total * size if total else None
    return row


def _flops(spec: ModelSpec, layer: LayerSpec) -> float:
    return point_work(Problem(spec.id, layer, 1), Variant("", "bf16")).flops
