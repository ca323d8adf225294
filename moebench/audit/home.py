"""What a file imports, in force only while it is needed: two files' helper modules may have one name. Worker only."""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

INSTALLED = frozenset(
    os.path.realpath(folder)
    for name, folder in sysconfig.get_paths().items()
    if name in ("stdlib", "platstdlib", "purelib", "platlib")
)


class Home:
    """The search path and the modules of the files of one folder; between them, neither is seen by others.

    Modules that are installed stay: many cannot be imported twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path: list[str] = []
        self._modules: dict[str, ModuleType] = {}

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """As `python file.py` would see it; path, modules and working directory are put back at the end."""
        path, before, cwd = list(sys.path), set(sys.modules), _cwd()
        # In front, as `python file.py` has it, so that a file's neighbours import.
        sys.path[:] = self._path or [str(self.folder), *path]
        sys.modules.update(self._modules)
        try:
            yield
        finally:
            self._path = list(sys.path)
            own = {os.path.realpath(each) for each in (str(self.folder), cwd, *set(sys.path).difference(path))}
            self._modules = {name: sys.modules.pop(name) for name in _added(before, own - INSTALLED)}
            sys.path[:] = path
            with contextlib.suppress(OSError):
                os.chdir(cwd)


def _cwd() -> str:
    try:
        return os.getcwd()
    except OSError:  # it is no more
        return os.sep


def _added(before: set[str], folders: set[str]) -> list[str]:
    """Modules that are new and, by their outermost package, come from one of the folders."""
    new = [name for name in list(sys.modules) if name.partition(".")[0] not in before]
    return [name for name in new if _found_in(sys.modules.get(name.partition(".")[0])) in folders]


def _found_in(module: Any) -> str | None:
    """The folder of the search path that an outermost module was found in; None for one without a file."""
    known = getattr(module, "__dict__", {})
    parts = list(known.get("__path__") or ())
    file = parts[0] if parts else known.get("__file__")
    return os.path.realpath(os.path.dirname(file)) if isinstance(file, str) else None
