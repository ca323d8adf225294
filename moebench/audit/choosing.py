"""The jobs of an audit: the files are run, and of what they declare what was asked for is taken. Worker only."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebench.audit.declared import Wrong, builds_of, shipped_files
from moebench.audit.home import Home

if TYPE_CHECKING:
    from moebench_kernels.build import Build

Say = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """One build for one target."""

    number: int
    file: str
    build: Build
    target: str
    home: Home | None  # what its file imports; None for the kernels that ship
    key: str | None  # None: it cannot even be hashed, and compiling will say why


def select(files: list[tuple[str, list[Build]]], request: dict[str, Any]) -> list[tuple[str, Build, str]]:
    """(file, build, target) as asked: by target, by pattern, and one config a kernel and target unless all:
    the first of those that expect most.

    Raises:
        Wrong: nothing is left.
    """
    targets, patterns = request["targets"], request["kernels"]
    every = [(file, build, target) for file, builds in files for build in builds for target in build.targets]
    for pattern in patterns:
        if not any(_matches(build, pattern) for _, build, _ in every):
            names = sorted({build.kernel.__name__ for _, build, _ in every})
            raise Wrong([f"no kernel or build is like {pattern!r}; the kernels are: {', '.join(names)}"])
    chosen = [
        each
        for each in every
        if (not targets or each[2] in targets) and (not patterns or any(_matches(each[1], p) for p in patterns))
    ]
    if not chosen:
        raise Wrong([f"no build is meant for {', '.join(targets)}"])
    if request["all"]:
        return chosen
    # The one that expects most is the one with most to lose: a large tile rather than a small or an odd one.
    one: dict[tuple[str, str, str], tuple[str, Build, str]] = {}
    for file, build, target in chosen:
        same = (file, build.kernel.__name__, target)
        if same not in one or len(build.expect) > len(one[same][1].expect):
            one[same] = (file, build, target)
    return list(one.values())


def _matches(build: Build, pattern: str) -> bool:
    wanted = pattern.lower() if any(sign in pattern for sign in "*?[") else f"*{pattern.lower()}*"
    return any(fnmatch.fnmatchcase(name.lower(), wanted) for name in (build.name, build.kernel.__name__))


def load(request: dict[str, Any], say: Say) -> list[Job]:
    """Run every file and choose the jobs.

    Raises:
        Wrong: with the faults of all files.
    """
    import moebench_kernels.build  # noqa: F401 - before any file is: what a file imports first is taken for its own

    named = [(name, Path(name).resolve()) for name in request["files"]]  # now: a file may change the folder
    homes: dict[str, Home] = {}
    by_folder: dict[Path, Home] = {}
    files, wrong = [], []
    for name, path in named or [(str(path), path.resolve()) for path in shipped_files()]:
        if named:
            homes[name] = by_folder.setdefault(path.parent, Home(path.parent))
        say({"loading": name})
        try:
            with at_home(homes.get(name)):
                files.append((name, builds_of(path, name)))
        except Wrong as fault:
            wrong += fault.lines
        say({"loaded": name})
    if wrong:
        raise Wrong(wrong)
    return [_job(at, homes.get(each[0]), *each) for at, each in enumerate(select(files, request))]


def at_home(home: Home | None) -> AbstractContextManager[None]:
    """Within what a job's file imports."""
    return nullcontext() if home is None else home.entered()


def _job(number: int, home: Home | None, file: str, build: Build, target: str) -> Job:
    from moebench.audit.compiling import key_of

    try:
        with at_home(home):
            key = key_of(build, target)
    except Exception:  # noqa: BLE001 - Triton reads the source here, and may find fault with it
        key = None
    return Job(number, file, build, target, home, key)
