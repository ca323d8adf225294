"""Every fault in how a build is declared, one line each. Runs in the worker; triton comes in here only."""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from moebench.audit.judging import EXPECTED

if TYPE_CHECKING:
    from moebench_kernels.build import Build

SCALARS = (
    "i1", "i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64",
    "fp16", "bf16", "fp32", "fp64", "fp8e4nv", "fp8e4b8", "fp8e4b15", "fp8e5", "fp8e5b16",
)  # fmt: skip
_SCALAR = "|".join(SCALARS)
TYPE = re.compile(rf"constexpr|\*{{0,2}}k?({_SCALAR})|tensordesc<({_SCALAR})\[\d+(, *\d+)*\]>")
ALLOWED_TYPES = f"constexpr, {', '.join(SCALARS)}, *TYPE for a pointer, tensordesc<TYPE[ROWS, COLUMNS]>"
WARPS = (1, 2, 4, 8, 16, 32)


def is_build(build: Any) -> bool:
    """Whether it is a Build at all."""
    from moebench_kernels.build import Build

    return isinstance(build, Build)


def faults_of_list(builds: list[Any] | tuple[Any, ...]) -> list[str]:
    """Faults of each, and two of one name for one target; such names are only counted where all else is right."""
    faults = [line for at, build in enumerate(builds) for line in _faults(build, at)]
    if faults:
        return faults
    named = Counter((build.name, target) for build in builds for target in build.targets)
    return [
        f"build {name!r}: {count} builds have this name for {target} (allowed: one)"
        for (name, target), count in named.items()
        if count > 1
    ]


def _faults(build: Any, at: int) -> Iterator[str]:
    if not is_build(build):
        yield f"build number {at + 1}: is a {type(build).__name__} (allowed: moebench_kernels.build.Build)"
        return
    fit = _is_text(build.name)
    label = f"build {build.name!r}" if fit else f"build number {at + 1}"
    if not fit:
        yield f"{label}: name: found {_found(build.name)} (allowed: a text of one line)"
    for line in (*_kernel_faults(build), *_choice_faults(build)):
        yield f"{label}: {line}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and bool(value.strip())


def _found(value: Any) -> str:
    """A value as text: short, of one line, whatever its own repr does."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    return " ".join(short.repr(value).split())


def _kernel_faults(build: Build) -> Iterator[str]:
    from triton.runtime.jit import JITFunction

    if not isinstance(build.kernel, JITFunction):
        inner = isinstance(getattr(build.kernel, "fn", None), JITFunction)
        hint = "; give the function below the decorator, its .fn" if inner else ""
        yield f"kernel is a {type(build.kernel).__name__} (allowed: a @triton.jit function{hint})"
        return
    wrong = [field for field in ("signature", "constants") if not isinstance(getattr(build, field), Mapping)]
    for field in wrong:
        what = "type" if field == "signature" else "value"
        yield f"{field}: found {_found(getattr(build, field))} (allowed: a dict, argument: {what})"
    if not wrong:
        yield from _argument_faults(build)


def _argument_faults(build: Build) -> Iterator[str]:
    parameters = {parameter.name: parameter for parameter in build.kernel.params}
    for name, parameter in parameters.items():
        kind = build.signature.get(name, "constexpr" if name in build.constants else None)
        if kind is None:
            yield f"argument {name!r} is neither in signature nor in constants"
        elif not isinstance(kind, str) or not TYPE.fullmatch(kind):
            yield f"argument {name!r}: unknown type {_found(kind)} (allowed: {ALLOWED_TYPES})"
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
        yield f"{field} names {_found(name)}, which is no argument of {build.kernel.__name__} ({', '.join(parameters)})"


def _choice_faults(build: Build) -> Iterator[str]:
    yield from _target_faults(build.targets)
    yield from _expect_faults(build.expect)
    if not _is_whole(build.num_warps) or build.num_warps not in WARPS:
        yield f"num_warps: found {_found(build.num_warps)} (allowed: {', '.join(map(str, WARPS))})"
    if not _is_whole(build.num_stages) or build.num_stages < 1:
        yield f"num_stages: found {_found(build.num_stages)} (allowed: whole numbers from 1)"
    # A bare text would be searched for parts of names.
    if not isinstance(build.unaligned, tuple | list | set | frozenset) or not all(map(_is_text, build.unaligned)):
        yield f"unaligned: found {_found(build.unaligned)} (allowed: a tuple of names of arguments)"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _target_faults(targets: Any) -> Iterator[str]:
    from moebench_kernels.build import TARGETS

    if not isinstance(targets, tuple | list) or not targets:
        yield f"targets: found {_found(targets)} (allowed: a tuple of {', '.join(TARGETS)})"
        return
    for at, target in enumerate(targets):
        if target not in TARGETS:
            yield f"targets: unknown target {_found(target)} (allowed: {', '.join(TARGETS)})"
        elif target in targets[:at]:
            yield f"targets: found {target!r} again (allowed: each once)"


def _expect_faults(expect: Any) -> Iterator[str]:
    if not isinstance(expect, tuple | list):
        yield f"expect: found {_found(expect)} (allowed: a tuple of {', '.join(EXPECTED)})"
        return
    for word in expect:
        if word not in tuple(EXPECTED):
            yield f"expect: found {_found(word)} (allowed: {', '.join(EXPECTED)})"
