"""What earlier runs on this machine tell an estimate: their ceilings, and what they took against what was expected."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from moebench.estimate import model_hash

MOST_RUNS = 8  # the newest ones
MEANINGFUL_S = 1.0  # a phase of which less was expected in all of them says nothing
SAME_SUITE, OTHER_SUITES = (0.1, 10.0), (0.5, 2.0)  # bounds of a factor: other suites have phases of another kind

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Known:
    """What is known of a machine.

    Attributes:
        ceilings: as the newest run measured them, or None.
        factors: phase -> seconds taken over seconds expected.
        runs: on how many runs the factors rest.
    """

    ceilings: dict[str, Any] | None = None
    factors: dict[str, float] = field(default_factory=dict)
    runs: int = 0


def known_from(folder: Path, device_kind: str, suite_hash: str | None = None) -> Known:
    """What the runs in a folder tell, the newest first; where the very suite has been run before, that run alone."""
    found = [manifest for manifest in _manifests(folder) if manifest.get("device_kind") == device_kind]
    ceilings = next((manifest["ceilings"] for manifest in found if manifest.get("ceilings")), None)
    model = model_hash()
    whole = [manifest for manifest in found if is_whole(manifest) and manifest.get("expected_by") == model]
    same = [manifest for manifest in whole if suite_hash and manifest.get("suite_hash") == suite_hash]
    told, bounds = (same[:1], SAME_SUITE) if same else (whole[:MOST_RUNS], OTHER_SUITES)
    return Known(ceilings, factors_of(told, bounds), len(told))


def _manifests(folder: Path) -> list[Manifest]:
    paths = sorted(folder.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [manifest for path in islice(paths, 100) if (manifest := _read(path)) is not None]


def _read(path: Path) -> Manifest | None:
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def is_whole(manifest: Manifest) -> bool:
    """Whether it was measured from end to end in one session: only then are its seconds those of its points."""
    asked = {"finished": "complete", "sessions": 1, "shard": [1, 1], "check_only": False}
    told = all(isinstance(manifest.get(name), dict) for name in ("seconds", "expected_seconds"))
    return told and all(manifest.get(name) == value for name, value in asked.items())


def factors_of(manifests: list[Manifest], bounds: tuple[float, float] = OTHER_SUITES) -> dict[str, float]:
    """Phase -> seconds taken over seconds expected, of whole runs together."""
    took: Counter[str] = Counter()
    expected: Counter[str] = Counter()
    for manifest in manifests:
        took.update(manifest["seconds"])
        expected.update(manifest["expected_seconds"])
    low, high = bounds
    return {
        phase: min(high, max(low, took[phase] / seconds))
        for phase, seconds in expected.items()
        if seconds >= MEANINGFUL_S
    }
