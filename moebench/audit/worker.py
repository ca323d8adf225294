"""The process that compiles: imports the kernel files once, then forks for every build, so none can hurt another.

Reads one request from stdin (a JSON line) and writes one JSON object a line to stdout. Run with TRITON_INTERPRET unset.
When stdin closes, the parent is gone: everything still running is killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from moebench.audit.cache import Cache, cache_folder
from moebench.audit.choosing import Job, at_home, load
from moebench.audit.declared import Wrong
from moebench.audit.link import Link, end_group
from moebench.audit.rows import are_facts

FORK = multiprocessing.get_context("fork") if sys.platform != "win32" else None


@dataclass
class Running:
    """A job in a process of its own."""

    job: Job
    process: ForkProcess
    log: Path
    began: float


def compile_all(jobs: list[Job], request: dict[str, Any], link: Link) -> None:
    """Every job, some at a time; who compiles as each begins, an answer as each ends."""
    from moebench.audit.compiling import warm_up

    cache = Cache(cache_folder(), are_facts)
    waiting, running = deque[Job](), dict[Connection, Running]()
    for job in jobs:
        if job.key and (kept := cache.get(job.key)):
            link.say(_answer(job, facts=kept, cached=True))
        else:
            waiting.append(job)
    scratch = Path(request["scratch"])
    os.environ["TRITON_CACHE_DIR"] = str(scratch / "triton")  # triton insists on one; the user's stays as it is
    try:
        warm_up(job.target for job in waiting)
        while waiting or running:
            while waiting and len(running) < request["jobs"]:
                connection, started = _start(waiting.popleft(), scratch)
                running[connection] = started
                link.say({"compiling": started.job.number, "group": started.process.pid})
            for connection, ended in list(_ended(running, request["timeout_s"], link)):
                del running[connection]
                link.say(ended)
                if "facts" in ended and (key := jobs[ended["number"]].key):
                    cache.put(key, ended["facts"])
    finally:
        for left in running.values():
            _kill(left.process)
        shutil.rmtree(scratch, ignore_errors=True)  # the parent's, but it may be gone


def _start(job: Job, scratch: Path) -> tuple[Connection, Running]:
    assert FORK is not None
    ours, theirs = FORK.Pipe(duplex=False)
    log = scratch / f"{job.number}.log"
    process = FORK.Process(target=_compile, args=(job, theirs, log), daemon=True)
    process.start()
    theirs.close()
    _lead_group(process.pid)
    return ours, Running(job, process, log, time.monotonic())


def _lead_group(pid: int | None) -> None:
    """So that ptxas dies with the compile; done on both sides of the fork, whichever comes first."""
    with contextlib.suppress(OSError):
        os.setpgid(pid or 0, 0)


def _compile(job: Job, out: Connection, log: Path) -> None:
    """In the fork: one compile, its answer, and the end."""
    _lead_group(0)
    os.register_at_fork(after_in_child=out.close)  # so that its death is seen, whatever it has started
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from moebench.audit.compiling import compile_build

    try:
        with at_home(job.home):
            facts, compile_ms = compile_build(job.build, job.target)
        out.send({"facts": facts, "compile_ms": compile_ms})
    except BaseException as error:  # noqa: BLE001 - whatever a compiler raises is a row of the table
        out.send({"error": one_line(error)})
    out.close()
    os._exit(0)  # nothing of the parent's is to be cleaned up here


def _ended(
    running: dict[Connection, Running], timeout_s: float, link: Link
) -> Iterator[tuple[Connection, dict[str, Any]]]:
    if not running:
        return
    first = min(each.began for each in running.values())
    ready = wait([*running, link.fileno()], timeout=max(0.0, first + timeout_s - time.monotonic()))
    if link.fileno() in ready:
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
        said = None
    _kill(each.process)  # it is done, or dead and its exit code known; what it has started may live on
    if said is None:
        return _answer(each.job, error=_obituary(each))
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


def serve(request: dict[str, Any], link: Link) -> None:
    """Answer one request."""
    try:
        import triton  # noqa: F401
    except Exception as error:  # noqa: BLE001 - a broken install raises anything
        link.say({"unavailable": f"triton cannot be imported: {' '.join(str(error).split())[:300]}"})
        return
    try:
        with link.ends_with_parent():
            jobs = load(request, link.say)
    except Wrong as wrong:
        link.say({"wrong": wrong.lines})
        return
    from moebench.audit.compiling import versions

    link.say({"listed": [listing(job) for job in jobs], "versions": versions()})
    compile_all(jobs, request, link)


def main() -> None:
    """One request on stdin, answers on stdout."""
    faulthandler.enable()
    link = Link()
    try:
        serve(link.request(), link)
    except (KeyboardInterrupt, BrokenPipeError):  # the parent is gone
        end_group()
    os._exit(0)  # a thread that a file has started would be waited for


if __name__ == "__main__":
    main()
