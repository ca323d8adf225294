"""A function of a Python file that the user named on the command line; the only place that runs such a file."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from functools import cache
from pathlib import Path
from typing import Any


class Unavailable(Exception):
    """Something of the user's, or a library, that cannot be had here; the message says why."""


@cache
def function_in_file(name: str) -> Any:
    """What `path/to/file.py:function` names.

    Raises:
        Unavailable: no such file or function, or the file raises; one line.
    """
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
        raise Unavailable(f"{name}: {type(error).__name__}: {one_line(error)}") from error
    if not hasattr(module, function):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise Unavailable(f"{name}: {path!r} has no {function!r} (functions in it: {', '.join(functions) or 'none'})")
    return getattr(module, function)


def one_line(error: BaseException) -> str:
    """An error's message on one short line."""
    return " ".join(str(error).split())[:300] or "no message"
