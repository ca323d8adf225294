"""From a provider's name to the provider."""

from __future__ import annotations

import importlib
from typing import Any

from moebench.point import PLAIN_PRECISIONS, PRECISIONS
from moebench.providers import PROVIDERS, entry_points, is_file, unknown
from moebench.providers.base import ExpertsProvider, Provider
from moebench.providers.case import Case
from moebench.providers.packages import missing
from moebench.user_file import Unavailable, function_in_file, one_line

__all__ = ["Unavailable", "from_function", "load"]


def load(name: str) -> Provider:
    """The provider of a name, a `path/to/file.py:function`, or an entry point.

    Raises:
        Unavailable: its library, file or function is missing, or its import fails.
    """
    if name in PROVIDERS:
        needs = PROVIDERS[name].needs
        if needs is not None and (reason := missing(needs)):
            raise Unavailable(f"{name}: {reason}")
        shipped: Provider = _attribute(name, PROVIDERS[name].target)
        return shipped
    if is_file(name):
        return from_function(name, function_in_file(name))
    targets = entry_points()
    if name not in targets:
        raise Unavailable(unknown(name))
    found = _attribute(name, targets[name])
    return found if isinstance(found, ExpertsProvider) else from_function(name, found)


def from_function(name: str, function: Any) -> ExpertsProvider:
    """A user's kernel f(x, ids, weights, w_gate_up, w_down) -> y as a provider.

    Attributes of the function, all optional: `activations` (default ("swiglu",)),
    `accepts_drops` (default False), `precisions` (default: the unquantised ones; in the others w_gate_up and w_down are
    moebench_kernels.QuantisedWeights), `devices`, `directions` (default: all), `version`.
    """
    if not callable(function):
        raise Unavailable(f"{name} is a {type(function).__name__}, not a function")
    return ExpertsProvider(
        name,
        function,
        version=str(getattr(function, "version", "")) or "user",
        limits=lambda case: _declared_limit(function, case),
        accepts_drops=bool(getattr(function, "accepts_drops", False)),
        plain=True,
        activations=tuple(getattr(function, "activations", ("swiglu",))),
        precisions=PRECISIONS if hasattr(function, "precisions") else PLAIN_PRECISIONS,
    )


def _declared_limit(function: Any, case: Case) -> str | None:
    asked = {"precisions": case.precision, "devices": case.device_kind, "directions": case.direction}
    for name, value in asked.items():
        declared = getattr(function, name, None)
        if declared is not None and value not in declared:
            return f"the function declares {name} = {tuple(declared)}, and {value!r} is not among them"
    return None


def _attribute(name: str, target: str) -> Any:
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:
        raise Unavailable(f"{name}: {type(error).__name__}: {one_line(error)}") from error
