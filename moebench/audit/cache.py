"""Facts kept between audits: one small JSON file a build, named by the hash of all that decides them. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """$MOEBENCH_CACHE, else moebench under $XDG_CACHE_HOME, else ~/.cache/moebench."""
    if own := os.environ.get("MOEBENCH_CACHE"):
        return Path(own).expanduser() / "audit"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moebench" / "audit"


class Cache:
    """A folder of facts. A damaged file is as good as none; a folder that cannot be written keeps nothing.

    `sound` tells facts from what only reads as JSON.
    """

    def __init__(self, folder: Path, sound: Callable[[Any], bool]) -> None:
        self.folder = folder
        self._sound = sound

    def get(self, key: str) -> dict[str, Any] | None:
        """What was kept under a key, or None."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            kept: dict[str, Any] = json.loads(self._path(key).read_text())
            if self._sound(kept):
                return kept
        return None

    def put(self, key: str, facts: dict[str, Any]) -> None:
        """Keep facts: whole or not at all, also when two audits run at once."""
        path = self._path(key)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
            try:
                with os.fdopen(descriptor, "w") as file:
                    json.dump(facts, file)
                os.replace(partial, path)
            except BaseException:
                os.unlink(partial)
                raise

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
