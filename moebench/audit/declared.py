"""The builds that a file declares. Runs in the worker: it runs the user's file."""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebench.audit.checking import faults_of_list

if TYPE_CHECKING:
    from moebench_kernels.build import Build

SHIPPED = "moebench_kernels"
MOST_LINES = 20  # of one file


class Wrong(Exception):
    """A file cannot be audited; one line a fault."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


def shipped_files() -> list[Path]:
    """The kernel files of moebench_kernels that declare builds, by name."""
    spec = importlib.util.find_spec(SHIPPED)
    if spec is None or not spec.submodule_search_locations:
        raise Wrong([f"{SHIPPED} is not installed"])
    folder = Path(next(iter(spec.submodule_search_locations)))
    return [path for path in sorted(folder.glob("*.py")) if re.search(r"^def builds\(", path.read_text(), re.MULTILINE)]


def builds_of(path: Path, where: str) -> list[Build]:
    """Import a file and take what it declares; `where` is what the user calls it.

    Raises:
        Wrong: it cannot be read or imported, declares nothing, or declares it wrongly.
    """
    try:
        declared = _declared(_imported(path), where)
    except Wrong:
        raise
    except BaseException as error:  # a file that is a script may parse arguments, exit, or interrupt itself
        if isinstance(error, OSError) and error.filename == str(path):
            raise Wrong([f"{where}: cannot be read: {error.strerror or error}"]) from error
        raise Wrong([f"{where}: running it failed: {_said(error)}"]) from error
    if not isinstance(declared, list | tuple) or not declared:
        found = "nothing" if isinstance(declared, list | tuple) else f"a {type(declared).__name__}"
        raise Wrong([f"{where}: its builds are {found} (allowed: a list of moebench_kernels.build.Build)"])
    lines = [f"{where}: {line}" for line in faults_of_list(declared)]
    if lines:
        rest = len(lines) - MOST_LINES
        raise Wrong(lines[:MOST_LINES] + ([f"{where}: and {rest} more faults"] if rest > 0 else []))
    return list(declared)


def _imported(path: Path) -> Any:
    name = f"{SHIPPED}.{path.stem}"
    ours = importlib.util.find_spec(name) if path.parent.name == SHIPPED else None
    if ours is not None and ours.origin and Path(ours.origin).resolve() == path:
        return importlib.import_module(name)
    loader = SourceFileLoader(f"moebench_audited_{path.stem}", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # triton and dataclasses look a module up by its name
    loader.exec_module(module)
    return module


def _declared(module: Any, where: str) -> Any:
    if callable(getattr(module, "builds", None)):
        try:
            return module.builds()
        except BaseException as error:
            raise Wrong([f"{where}: builds() failed: {_said(error)}"]) from error
    if hasattr(module, "BUILDS"):
        return module.BUILDS
    raise Wrong([f"{where}: declares no kernels (allowed: a function builds() or a list BUILDS of Build)"])


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300] or 'no message'}"
