"""From Python: `run("quick", providers=[my_experts])`. No torch in this process."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moebench.options import Options
from moebench.run import Outcome, run_suite
from moebench.suite import load_suite


def run(
    *sources: str,
    out: str | Path,
    providers: Sequence[str | Callable[..., Any]] = (),
    overrides: Mapping[str, Sequence[object]] | None = None,
    device: str = "auto",
    resume: bool = False,
) -> Outcome:
    """Measure suites, with further providers beside their own, into the folder `out`.

    Args:
        sources: shipped names or .toml files; `quick` when there is none.
        providers: names, or functions f(x, ids, weights, w_gate_up, w_down) -> y that stand at the top level of a
            file: the worker, a process of its own, imports that file.
        overrides: axis -> values, as `--set`.

    Raises:
        ValueError: a bad suite, folder or function; one line for each fault.
        moebench.failures.RunError: the run could not go on; what was measured is kept.
    """
    names = [provider if isinstance(provider, str) else reference(provider) for provider in providers]
    texts = {axis: [str(value) for value in values] for axis, values in (overrides or {}).items()}
    suite = load_suite(sources or ("quick",), texts, add_providers=names)
    return run_suite(suite, Options(Path(out), resume=resume, device=device, command="from Python"))


def reference(function: Callable[..., Any]) -> str:
    """`path/to/file.py:function` of a function.

    Raises:
        ValueError: it cannot be found again in another process (a lambda, a closure, a notebook cell).
    """
    name = getattr(function, "__qualname__", type(function).__name__)
    source = inspect.getsourcefile(function) if inspect.isfunction(function) else None
    if source is None or not name.isidentifier() or not Path(source).is_file():
        raise ValueError(f"provider {name} is no function at the top level of a .py file, which a worker could import")
    return f"{source}:{name}"
