"""From a suite and what its worker says of the machine to a Manifest; what resuming requires of one. No torch."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moebench import __version__
from moebench.catalogue.cost import cost_inputs
from moebench.catalogue.hardware import Hardware, match
from moebench.options import Options
from moebench.point import digest
from moebench.record import Manifest
from moebench.remote import Reply
from moebench.suite import Suite

Providers = dict[str, dict[str, Any]]


def new_manifest(
    suite: Suite,
    options: Options,
    hello: Reply,
    table: Mapping[str, Hardware],
    providers: Providers,
    ceilings: Reply | None,
) -> Manifest:
    """The manifest a run begins with.

    Args:
        hello: the worker's first reply.
        table: hardware rows, of which the device's is taken.
        providers: name -> version and hash, or why it is unavailable.
        ceilings: as measured, or None.
    """
    hardware = match(hello["device"], table)
    started = now()
    return Manifest(
        run_id=hashlib.sha256(f"{started}{os.getpid()}{options.out}".encode()).hexdigest()[:12],
        suite=suite.name,
        question=suite.question,
        suite_hash=_suite_hash(suite, options),
        suite_text=suite.text,
        overrides={axis: list(values) for axis, values in suite.overrides.items()},
        command=options.command,
        **_git(),
        device=hello["device"],
        device_kind=hello["device_kind"],
        versions={"moebench": __version__, **hello["versions"]},
        machine={**hello["machine"], "cache_bytes": hello["cache_bytes"], "available_bytes": hello["available_bytes"]},
        ceilings=ceilings,
        hardware=None if hardware is None else dict(vars(hardware)),
        cost=cost_inputs(hardware),
        providers=providers,
        points=suite.count(hello["device_kind"]).points,
        started_at=started,
    )


def require_same(before: Manifest, suite: Suite, options: Options, hello: Reply, providers: Providers) -> None:
    """Resuming may only go on with what was begun.

    Raises:
        ValueError: naming everything that changed.
    """
    changed = []
    if before.suite_hash != _suite_hash(suite, options):
        changed.append("the suite file, a router file or trace it names, its overrides, --shard or --check-only")
    if before.device != hello["device"]:
        changed.append(f"the device ({before.device} then, {hello['device']} now)")
    for name, facts in providers.items():
        then = before.providers.get(name, {})
        if then.get("hash") != facts.get("hash"):
            changed.append(f"provider {name} ({_state(then)} then, {_state(facts)} now)")
    if changed:
        raise ValueError(f"{options.out} cannot be resumed, since this changed: {'; '.join(changed)}")


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _suite_hash(suite: Suite, options: Options) -> str:
    return digest([suite.digest, list(options.shard), options.check_only])


def _state(facts: dict[str, Any]) -> str:
    if "unavailable" in facts:
        return "unavailable"
    return f"{facts.get('version')} with source {facts.get('hash')}" if facts else "not part of it"


def _git() -> dict[str, Any]:
    """Commit and dirtiness of the checkout that moebench runs from; nulls outside one."""
    here = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "moebench/run.py") is None:
        return {"git_commit": None, "git_dirty": None}
    return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain"))}
