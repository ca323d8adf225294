"""From a suite and what its worker says of the machine to a Manifest; what resuming requires of one. No torch."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

from moebench import __version__
from moebench.axes import shown
from moebench.catalogue.cost import cost_inputs
from moebench.catalogue.hardware import Hardware, match
from moebench.estimate import estimate_seconds, model_hash
from moebench.options import Options
from moebench.point import YARDSTICKS, digest
from moebench.record import Manifest
from moebench.remote import Reply
from moebench.suite import DeviceKind, Suite

Providers = dict[str, dict[str, Any]]
YARDSTICK_SOURCES = ("yardsticks.py", "measure/gemm.py")


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
    return Manifest(
        run_id=os.urandom(6).hex(),  # a clock that was set back must not make two runs one
        suite=suite.name,
        question=suite.question,
        suite_hash=suite_hash(suite, options),
        suite_text=suite.text,
        overrides=_overrides(suite),
        joined=list(suite.joined),
        files=suite.files,
        shard=options.shard,
        check_only=options.check_only,
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
        expected_seconds=_expected(suite, hello["device_kind"], ceilings),
        expected_by=model_hash(),
        started_at=now(),
    )


def yardstick_facts(hello: Reply) -> Providers:
    """Version and source of the yardsticks: what they time is PyTorch's, how they ask for it is ours."""
    here = Path(__file__).parent
    source = b"".join((here / name).read_bytes() for name in YARDSTICK_SOURCES)
    facts = {"version": f"torch {hello['versions'].get('torch')}", "hash": hashlib.sha256(source).hexdigest()[:16]}
    return {name: dict(facts) for name in YARDSTICKS}


def require_same(before: Manifest, suite: Suite, options: Options, hello: Reply, providers: Providers) -> None:
    """Resuming may only go on with what was begun.

    Raises:
        ValueError: naming everything that changed.
    """
    changed = []
    if before.suite_hash != suite_hash(suite, options):
        changed += _suite_changes(before, suite, options) or ["the suite"]
    if before.device != hello["device"]:
        changed.append(f"the device ({before.device} then, {hello['device']} now)")
    for name, facts in providers.items():
        then = before.providers.get(name, {})
        if then.get("hash") != facts.get("hash"):
            changed.append(f"provider {name} ({_state(then)} then, {_state(facts)} now)")
    if changed:
        raise ValueError(f"{options.out} cannot be resumed, since this changed: {'; '.join(changed)}")


def _expected(suite: Suite, device_kind: DeviceKind, ceilings: Reply | None) -> dict[str, float]:
    """What the estimate says before anything is measured, uncorrected, so that later estimates can learn from it."""
    phases = estimate_seconds(suite, device_kind, ceilings).phases
    return {phase: round(seconds, 3) for phase, seconds in phases.items()}


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def suite_hash(suite: Suite, options: Options) -> str:
    """Changes when what is to be measured does: the suite, its overrides and files, the share of it."""
    return digest([suite.digest, list(options.shard), options.check_only])


def _overrides(suite: Suite) -> dict[str, list[Any]]:
    return {axis: list(values) for axis, values in suite.overrides.items()}


def _suite_changes(before: Manifest, suite: Suite, options: Options) -> list[str]:
    """What of the suite and of its options is not as the manifest has it."""
    changed = []
    if before.suite_text != suite.text:
        changed.append(f"the suite file ({_first_difference(before.suite_text, suite.text)})")
    for axis, then, now in _differences(before.overrides, _overrides(suite)):
        key = "--provider" if axis == "provider" else f"--set {axis}"
        changed.append(f"{key} ({_given(then)} then, {_given(now)} now)")
    if before.joined != list(suite.joined):
        changed.append(f"--provider ({_given(before.joined)} then, {_given(suite.joined)} now)")
    changed += [f"the contents of {path}" for path, *both in _differences(before.files, suite.files) if all(both)]
    for option, then, now in (
        ("--shard", "{}/{}".format(*before.shard), "{}/{}".format(*options.shard)),
        ("--check-only", *("given" if given else "not given" for given in (before.check_only, options.check_only))),
    ):
        changed += [f"{option} ({then} then, {now} now)"] if then != now else []
    return changed


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) where they differ; a key that is not there has None."""
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) != now.get(key):
            yield key, then.get(key), now.get(key)


def _first_difference(then: str, now: str) -> str:
    """The first line of a text that another does not have there."""
    lines = enumerate(zip_longest(then.split("\n"), now.split("\n")), 1)
    number, (old, new) = next((number, pair) for number, pair in lines if pair[0] != pair[1])
    columns = enumerate(zip_longest(old or "", new or "", fillvalue=""))
    at = next((at for at, pair in columns if pair[0] != pair[1]), 0)
    start = max(0, at - 20)  # of long lines, from shortly before they part
    old, new = ("no such line" if line is None else shown(line[start:]) for line in (old, new))
    return f"line {number}: {old} then, {new} now"


def _given(values: Iterable[Any] | None) -> str:
    return shown(",".join(map(str, values))) if values else "not given"


def _state(facts: dict[str, Any]) -> str:
    if "unavailable" in facts:
        return "unavailable"
    return f"{facts.get('version')} with source {facts.get('hash')}" if facts else "not part of it"


def _git() -> dict[str, Any]:
    """Commit and dirtiness of the checkout that moebench runs from.

    Outside one the commit is what `MOEBENCH_COMMIT` says, if anything: a tree that was copied without its history.
    """
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
        return {"git_commit": stated_commit(), "git_dirty": None}
    return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain"))}


def stated_commit() -> str | None:
    """What `MOEBENCH_COMMIT` says.

    Raises:
        ValueError: it is no commit's full name.
    """
    stated = os.environ.get("MOEBENCH_COMMIT", "").strip().lower()
    if stated and not re.fullmatch("[0-9a-f]{40}", stated):
        raise ValueError(f"MOEBENCH_COMMIT is {shown(stated)}; it must be the 40 hex digits of `git rev-parse HEAD`")
    return stated or None
