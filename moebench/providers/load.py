"""From a provider's name to the provider; the only place that runs a user's file, which the user named."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from moebench.point import PLAIN_PRECISIONS, PRECISIONS
from moebench.providers import PROVIDERS, entry_points, is_file, unknown
from moebench.providers.base import Case, ExpertsProvider, Provider
from moebench.providers.packages import missing


class Unavailable(Exception):
    """A provider that cannot be had here; the message says why."""


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
        return from_function(name, _function_in_file(name))
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
        raise Unavailable(f"{name}: {type(error).__name__}: {_one_line(error)}") from error


def _function_in_file(name: str) -> Any:
    path, _, function = name.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise Unavailable(f"{name}: there is no file {path!r}")
    spec = importlib.util.spec_from_file_location(f"moebench_user_{file.stem}", file.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and inductor look a module up by its name
    sys.path.insert(0, str(file.resolve().parent))  # as `python file.py` would, so that its neighbours import
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a file that is a script may parse arguments, or exit
        raise Unavailable(f"{name}: {type(error).__name__}: {_one_line(error)}") from error
    if not hasattr(module, function):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise Unavailable(f"{name}: {path!r} has no {function!r} (functions in it: {', '.join(functions) or 'none'})")
    return getattr(module, function)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or "no message"
