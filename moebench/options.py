"""How a suite is to be run, and the command that says so. No torch."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """How to run a suite.

    Attributes:
        out: the run directory.
        resume: go on with it.
        device: auto, cpu or cuda.
        check_only: check every point, time none.
        shard: (i, n), this run's share of the blocks.
        hardware: a file of the user's hardware rows.
        command: what to write into the manifest and to repeat for resuming.
    """

    out: Path
    resume: bool = False
    device: str = "auto"
    check_only: bool = False
    shard: tuple[int, int] = (1, 1)
    hardware: Path | None = None
    command: str = ""


def resume_command(options: Options) -> str:
    """What to type to go on."""
    words = options.command.split(" ") if options.command else ["moebench", "run", "suite"]
    if "--out" not in options.command:
        words += ["--out", shlex.quote(str(options.out))]
    return " ".join(words if "--resume" in words else [*words, "--resume"])


def default_command(argv: Sequence[str] | None = None) -> str:
    """The command line, as one would type it again."""
    return "moebench " + shlex.join(sys.argv[1:] if argv is None else argv)
