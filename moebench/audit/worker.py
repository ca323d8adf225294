"""The process that compiles: imports the kernel files once, then forks for every build, so none can hurt another.

Reads one request from stdin (a JSON line) and writes one JSON object a line to stdout. Run with TRITON_INTERPRET unset.
When stdin closes, the parent is gone: everything still compiling is killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fnmatch
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebench.audit.cache import Cache, cache_folder
from moebench.audit.declared import Wrong, builds_of, shipped_files
from moebench.audit.readers import Facts

if TYPE_CHECKING:
    from moebench_kernels.build import Build

Say = Callable[[dict[str, Any]], None]
FORK = multiprocessing.get_context("fork") if sys.platform != "win32" else None


@dataclass(frozen=True)
class Job:
    """One build for one target."""

    number: int
    file: str
    build: Build
    target: str
    key: str | None  # None: it cannot even be hashed, and compiling will say why


@dataclass
class Running:
    """A job in a process of its own."""

    job: Job
    process: ForkProcess
    log: Path
    began: float


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
    """Import every file and choose the jobs.

    Raises:
        Wrong: with the faults of all files.
    """
    files, wrong = [], []
    for path in [Path(name) for name in request["files"]] or shipped_files():
        say({"loading": str(path)})
        try:
            files.append((str(path), builds_of(path)))
        except Wrong as fault:
            wrong += fault.lines
    if wrong:
        raise Wrong(wrong)
    chosen = select(files, request)
    return [Job(at, file, build, target, _key(build, target)) for at, (file, build, target) in enumerate(chosen)]


def _key(build: Build, target: str) -> str | None:
    from moebench.audit.compiling import key_of

    try:
        return key_of(build, target)
    except Exception:  # noqa: BLE001 - Triton reads the source here, and may find fault with it
        return None


def compile_all(jobs: list[Job], request: dict[str, Any], say: Say) -> None:
    """Every job, some at a time; an answer as each ends."""
    from moebench.audit.compiling import warm_up

    cache = Cache(cache_folder(), frozenset(Facts.__annotations__))
    waiting, running = deque[Job](), dict[Connection, Running]()
    for job in jobs:
        if job.key and (kept := cache.get(job.key)):
            say(_answer(job, facts=kept, cached=True))
        else:
            waiting.append(job)
    scratch = Path(tempfile.mkdtemp(prefix="moebench-audit-"))
    os.environ["TRITON_CACHE_DIR"] = str(scratch / "triton")  # triton insists on one; the user's stays as it is
    try:
        warm_up(job.target for job in waiting)
        while waiting or running:
            while waiting and len(running) < request["jobs"]:
                connection, started = _start(waiting.popleft(), scratch)
                running[connection] = started
            for connection, ended in list(_ended(running, request["timeout_s"])):
                del running[connection]
                say(ended)
                if "facts" in ended and (key := jobs[ended["number"]].key):
                    cache.put(key, ended["facts"])
    finally:
        for left in running.values():
            _kill(left.process)
        shutil.rmtree(scratch, ignore_errors=True)


def _start(job: Job, scratch: Path) -> tuple[Connection, Running]:
    assert FORK is not None
    ours, theirs = FORK.Pipe(duplex=False)
    log = scratch / f"{job.number}.log"
    process = FORK.Process(target=_compile, args=(job, theirs, log), daemon=True)
    process.start()
    theirs.close()
    return ours, Running(job, process, log, time.monotonic())


def _compile(job: Job, out: Connection, log: Path) -> None:
    """In the fork: one compile, its answer, and the end."""
    os.setpgid(0, 0)  # so that ptxas dies with it
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from moebench.audit.compiling import compile_build

    try:
        facts, compile_ms = compile_build(job.build, job.target)
        out.send({"facts": facts, "compile_ms": compile_ms})
    except BaseException as error:  # noqa: BLE001 - whatever a compiler raises is a row of the table
        out.send({"error": one_line(error)})
    out.close()
    os._exit(0)  # nothing of the parent's is to be cleaned up here


def _ended(running: dict[Connection, Running], timeout_s: float) -> Iterator[tuple[Connection, dict[str, Any]]]:
    if not running:
        return
    first = min(each.began for each in running.values())
    ready = wait([*running, sys.stdin.fileno()], timeout=max(0.0, first + timeout_s - time.monotonic()))
    if sys.stdin.fileno() in ready:
        raise KeyboardInterrupt  # the parent has closed the pipe, or died
    for connection, each in running.items():
        if connection in ready:
            yield connection, _result(connection, each)
        elif time.monotonic() - each.began >= timeout_s:
            _kill(each.process)
            yield connection, _answer(each.job, error=f"did not compile within {timeout_s:g} s")


def _result(connection: Connection, each: Running) -> dict[str, Any]:
    try:
        said = connection.recv()
    except (EOFError, OSError):
        each.process.join()
        return _answer(each.job, error=_obituary(each))
    each.process.join()
    if "error" in said and (more := _complaint(each.log)):
        said["error"] += f" ({more})"
    return _answer(each.job, **said)


def _complaint(log: Path) -> str:
    """What the compiler itself printed as an error: the exception often says no more than that it failed."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line.strip()[:300] for line in lines if re.search(r"\b(error|fatal)\b", line)), "")


def _obituary(each: Running) -> str:
    code = each.process.exitcode or 0
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    lines = each.log.read_text(errors="replace").splitlines() if each.log.exists() else []
    said = _complaint(each.log) or next((line.strip()[:300] for line in lines if line.strip()), "")
    return f"the compiler ended with {how}" + (f" ({said})" if said else "")


def _kill(process: ForkProcess) -> None:
    assert process.pid is not None
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(process.pid, signal.SIGKILL)
    process.join()


def _answer(job: Job, **more: Any) -> dict[str, Any]:
    return {"number": job.number, "cached": False, **more}


def one_line(error: BaseException) -> str:
    """What a compiler's error says, in one line: ptxas's complaint, or the last line that says something."""
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip() and set(line.strip()) != {"^"}]
    complaints = [line for line in lines if line.startswith("ptxas") and re.search(r"\b(error|fatal)\b", line)]
    last = (complaints or lines or ["no message"])[0 if complaints else -1]
    cause = error.__cause__
    if cause is not None and str(cause).strip() and str(cause).strip() not in last:
        last = f"{last} ({type(cause).__name__}: {' '.join(str(cause).split())[:200]})"
    return f"{type(error).__name__}: {last[:400]}"


def listing(job: Job) -> dict[str, Any]:
    """What a row begins with."""
    build = job.build
    return {
        "file": job.file, "kernel": build.kernel.__name__, "build": build.name, "target": job.target,
        "num_warps": build.num_warps, "num_stages": build.num_stages, "expect": list(build.expect),
    }  # fmt: skip


def serve(request: dict[str, Any], say: Say) -> None:
    """Answer one request."""
    try:
        import triton  # noqa: F401
    except Exception as error:  # noqa: BLE001 - a broken install raises anything
        say({"unavailable": f"triton cannot be imported: {' '.join(str(error).split())[:300]}"})
        return
    signal.alarm(max(1, int(request["load_timeout_s"])))  # a file that never ends loading; SIGALRM ends the process
    try:
        jobs = load(request, say)
    except Wrong as wrong:
        say({"wrong": wrong.lines})
        return
    signal.alarm(0)
    from moebench.audit.compiling import versions

    say({"listed": [listing(job) for job in jobs], "versions": versions()})
    compile_all(jobs, request, say)


def main() -> None:
    """One request on stdin, answers on stdout."""
    faulthandler.enable()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a user file's prints must not look like answers

    def say(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    request = json.loads(sys.stdin.readline())
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        serve(request, say)


if __name__ == "__main__":
    main()
