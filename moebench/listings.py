"""The rows behind `moebench list` and `moebench doctor`: flat objects."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moebench.catalogue.routers import RouterInfo

Row = dict[str, Any]

COLUMNS = {
    "models": ("id", "year", "experts", "top_k", "hidden", "ffn", "moe_layers", "total", "active", "router", "state"),
    "providers": ("name", "role", "state", "version", "summary", "reason"),
    "routers": ("name", "rule", "source", "balance", "causal", "capacity", "published_capacity"),
    "suites": ("name", "points_cpu", "points_cuda", "question"),
    "hardware": ("name", "vendor", "bf16_dense_tflops", "mem_gb", "mem_bw_gbs", "power_w", "usd_per_gpu_hour",
                 "price_basis"),
    "doctor": ("what", "state", "detail"),
}  # fmt: skip


def models() -> list[Row]:
    """Every model of the catalogue; the short columns are for the terminal."""
    from moebench.catalogue.describe import list_models

    return [_model(row) for row in list_models()]


def _model(row: Row) -> Row:
    state = row["reason"] or ("alias of " + row["alias_of"] if row["alias_of"] else "ready")
    return {
        **row,
        "experts": row["routed_experts"],
        "hidden": row["hidden_size"],
        "ffn": row["expert_ffn_size"],
        "total": _billions(row["total_params"]),
        "active": _billions(row["active_params"]),
        "state": state,
    }


def _billions(count: float | None) -> str | None:
    return None if count is None else f"{count / 1e9:.4g}B"


def providers() -> list[Row]:
    """Every provider with its state here: ready, interpreted (verified, never timed) or unavailable."""
    from moebench.providers import PROVIDERS, entry_points

    found = _probe()
    listed = {name: (listing.role, listing.summary) for name, listing in PROVIDERS.items()}
    listed |= {name: ("arm", f"entry point {target}") for name, target in entry_points().items()}
    return [
        {"name": name, "role": role, "summary": summary, **found["providers"].get(name, {})}
        for name, (role, summary) in listed.items()
    ]


def routers() -> list[Row]:
    """Every router: what it does, who published it, what balances it, and whether later tokens matter to it."""
    from moebench.catalogue.routers import ROUTERS

    return [_router(name, info) for name, info in ROUTERS.items()]


def _router(name: str, info: RouterInfo) -> Row:
    return {
        "name": name,
        "rule": info.summary,
        "source": info.source,
        "balance": info.balance,
        "causal": {"inference": "in inference"}.get(info.causal, info.causal),
        "capacity": info.capacity or "as the point says",
        "published_capacity": info.published or None,
        "form": info.form,
        "weights_sum": info.weights,
        "top_k": "any" if info.picks is None else "E" if info.picks == "all" else info.picks,
        "looks_at": ", ".join(("x", *info.side)) if name != "mixer" else "context",
        "noise_in_training": info.noise,
        "imposable": info.imposable,
    }


def suites() -> list[Row]:
    """The suites that ship."""
    from moebench.suite import load_suite, shipped

    loaded = [load_suite([name]) for name in shipped()]
    return [
        {
            "name": suite.name,
            "points_cpu": suite.count("cpu").points,
            "points_cuda": suite.count("cuda").points,
            "question": suite.question,
        }
        for suite in loaded
    ]


def hardware(extra: Path | None = None) -> list[Row]:
    """The hardware table, the user's rows first."""
    from moebench.catalogue.hardware import hardware_table

    return [dict(vars(row)) for row in hardware_table(extra).values()]


def doctor() -> list[Row]:
    """What this machine can measure."""
    found = _probe()
    rows = [{"what": what, "state": state, "detail": detail} for what, state, detail in found["facts"]]
    rows += [
        {"what": f"provider {name}", "state": facts["state"], "detail": facts.get("reason") or facts.get("version")}
        for name, facts in found["providers"].items()
    ]
    return rows


def _probe() -> dict[str, Any]:
    # In a process of its own: probing imports torch and every provider's library, any of which may crash.
    done = subprocess.run(
        [sys.executable, "-m", "moebench.probe"], capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"facts": [["torch", "unavailable", last]], "providers": {}}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
