"""The builds a file declares, and every fault in how it declares them. Runs in the worker: it runs the user's file."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebench.audit.judging import EXPECTED

if TYPE_CHECKING:
    from moebench_kernels.build import Build

SHIPPED = "moebench_kernels"
MOST_LINES = 20  # of one file
SCALARS = (
    "i1", "i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64",
    "fp16", "bf16", "fp32", "fp64", "fp8e4nv", "fp8e4b8", "fp8e4b15", "fp8e5", "fp8e5b16",
)  # fmt: skip
_SCALAR = "|".join(SCALARS)
TYPE = re.compile(rf"constexpr|\*{{0,2}}k?({_SCALAR})|tensordesc<({_SCALAR})\[\d+(, *\d+)*\]>")
ALLOWED_TYPES = f"constexpr, {', '.join(SCALARS)}, *TYPE for a pointer, tensordesc<TYPE[ROWS, COLUMNS]>"


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


def builds_of(path: Path) -> list[Build]:
    """Import a file and take what it declares.

    Raises:
        Wrong: it cannot be read or imported, declares nothing, or declares it wrongly.
    """
    where = str(path)
    declared = _declared(_imported(path), where)
    if not isinstance(declared, list | tuple) or not declared:
        found = "nothing" if isinstance(declared, list | tuple) else f"a {type(declared).__name__}"
        raise Wrong([f"{where}: its builds are {found} (allowed: a list of moebench_kernels.build.Build)"])
    lines = [f"{where}: {line}" for at, build in enumerate(declared) for line in _faults(build, at)]
    named = Counter((build.name, target) for build in declared if _is_build(build) for target in build.targets)
    lines += [
        f"{where}: build {name!r}: {count} builds have this name for {target} (allowed: one)"
        for (name, target), count in named.items()
        if count > 1
    ]
    if lines:
        rest = len(lines) - MOST_LINES
        raise Wrong(lines[:MOST_LINES] + ([f"{where}: and {rest} more faults"] if rest > 0 else []))
    return list(declared)


def _imported(path: Path) -> Any:
    name = f"{SHIPPED}.{path.stem}"
    ours = importlib.util.find_spec(name) if path.parent.name == SHIPPED else None
    try:
        if ours is not None and ours.origin and Path(ours.origin).resolve() == path.resolve():
            return importlib.import_module(name)
        return _run_file(path)
    except OSError as error:
        raise Wrong([f"{path}: cannot be read: {error.strerror or error}"]) from error
    except (Exception, SystemExit) as error:  # a file that is a script may parse arguments, or exit
        text = " ".join(str(error).split())[:300] or "no message"
        raise Wrong([f"{path}: running it failed: {type(error).__name__}: {text}"]) from error


def _run_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"moebench_audited_{path.stem}", path.resolve())
    if spec is None or spec.loader is None:
        raise Wrong([f"{path}: is not a Python file"])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # triton and dataclasses look a module up by its name
    sys.path.insert(0, str(path.resolve().parent))  # as `python file.py` would, so that its neighbours import
    spec.loader.exec_module(module)
    return module


def _declared(module: Any, where: str) -> Any:
    if callable(getattr(module, "builds", None)):
        try:
            return module.builds()
        except Exception as error:
            text = " ".join(str(error).split())[:300] or "no message"
            raise Wrong([f"{where}: builds() failed: {type(error).__name__}: {text}"]) from error
    if hasattr(module, "BUILDS"):
        return module.BUILDS
    raise Wrong([f"{where}: declares no kernels (allowed: a function builds() or a list BUILDS of Build)"])


def _is_build(build: Any) -> bool:
    from moebench_kernels.build import Build

    return isinstance(build, Build)


def _faults(build: Any, at: int) -> Iterator[str]:
    from triton.runtime.jit import JITFunction

    if not _is_build(build):
        yield f"build number {at + 1}: is a {type(build).__name__} (allowed: moebench_kernels.build.Build)"
        return
    label = f"build {build.name!r}"
    if not isinstance(build.kernel, JITFunction):
        inner = isinstance(getattr(build.kernel, "fn", None), JITFunction)
        hint = "; give the function below the decorator, its .fn" if inner else ""
        yield f"{label}: kernel is a {type(build.kernel).__name__} (allowed: a @triton.jit function{hint})"
        return
    for line in (*_argument_faults(build), *_choice_faults(build)):
        yield f"{label}: {line}"


def _argument_faults(build: Build) -> Iterator[str]:
    parameters = {parameter.name: parameter for parameter in build.kernel.params}
    for name, parameter in parameters.items():
        kind = build.signature.get(name, "constexpr" if name in build.constants else None)
        if kind is None:
            yield f"argument {name!r} is neither in signature nor in constants"
        elif not isinstance(kind, str) or not TYPE.fullmatch(kind):
            yield f"argument {name!r}: unknown type {kind!r} (allowed: {ALLOWED_TYPES})"
        elif kind == "constexpr" and name not in build.constants:
            yield f"argument {name!r} is constexpr and has no value in constants"
        elif kind != "constexpr" and name in build.constants:
            yield f"argument {name!r} has a value in constants and type {kind!r} (allowed: constexpr)"
        elif kind != "constexpr" and parameter.is_constexpr:
            yield f"argument {name!r} is a tl.constexpr and has type {kind!r} (allowed: a value in constants)"
    strangers = [
        (field, name)
        for field in ("signature", "constants")
        for name in getattr(build, field)
        if name not in parameters
    ]
    for field, name in strangers:
        yield f"{field} names {name!r}, which is no argument of {build.kernel.__name__} ({', '.join(parameters)})"


def _choice_faults(build: Build) -> Iterator[str]:
    from moebench_kernels.build import TARGETS

    if not build.targets or isinstance(build.targets, str):
        yield f"targets: found {build.targets!r} (allowed: a tuple of {', '.join(TARGETS)})"
    else:
        for target in build.targets:
            if target not in TARGETS:
                yield f"targets: unknown target {target!r} (allowed: {', '.join(TARGETS)})"
    for word in build.expect:
        if word not in EXPECTED:
            yield f"expect: found {word!r} (allowed: {', '.join(EXPECTED)})"
    if build.num_warps not in (1, 2, 4, 8, 16, 32):
        yield f"num_warps: found {build.num_warps!r} (allowed: 1, 2, 4, 8, 16, 32)"
    if not isinstance(build.num_stages, int) or build.num_stages < 1:
        yield f"num_stages: found {build.num_stages!r} (allowed: whole numbers from 1)"
