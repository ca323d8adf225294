"""The published measurements of one GPU: its tests first, then the suites, within the time there is.

    python -m moebench_suites.measure_gpu --out DIR [--minutes 10] [SUITE...]

The tests marked `gpu` must be green before any number is taken; once they were, for this very source and device, they
are not run again in the same DIR. A suite that does not fit into what is left of the minutes is not begun; one that
is cut off keeps what it has. The same command goes on where the last one stopped: complete runs are left alone,
others resumed. Then `moebench publish DIR/*/`, here or elsewhere.

Exit codes: 0 all are complete, 1 a test or a suite failed, 2 bad words, 3 there is more to do.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

ORDER = (  # what the headline and the targets need comes first
    "h200-decode", "h200-prefill", "h200-gemm", "h200-mixtral", "h200-stages", "h200-train", "h200-precision",
    "h200-energy", "h200-compile",
)  # fmt: skip
# The first two measure times and run alone; nearly all the time of the third is compiling.
TESTS = (("tests/gpu", "tests/measure"), ("tests/kernels",))
GREEN_FIRST = "gpu and not full"  # those marked `full` take hours
WITHOUT = re.compile("CUDA GPU|TRITON_INTERPRET")  # of a test that was skipped as if there were no GPU
CUT_OFF_S = 30.0  # for a suite that is interrupted to write its table
FAILED, MORE_TO_DO = 1, 3
ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("kernels/**/*.py", "moebench/**/*.py", "tests/gpu/*.py", "tests/kernels/*.py", "tests/measure/*.py")


@dataclass(frozen=True)
class Clock:
    """The minutes there are."""

    ends: float

    def left(self) -> float:
        return self.ends - time.monotonic()


@click.command()
@click.argument("suites", nargs=-1, metavar="[SUITE]...")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="One run directory for each suite goes here."
)
@click.option("--minutes", type=click.FloatRange(0.1), default=60.0, show_default=True, help="Then it stops.")
@click.option("--device", type=click.Choice(("cuda", "cpu")), default="cuda", help="cpu: a rehearsal, without tests.")
@click.option("--set", "sets", multiple=True, metavar="AXIS=V[,V]", help="As of `moebench run suite`.")
def main(suites: tuple[str, ...], out: Path, minutes: float, device: str, sets: tuple[str, ...]) -> None:
    """Test this GPU, then measure the suites (all h200-* ones if none is named) as far as the minutes reach."""
    if not (ROOT / TESTS[0][0]).is_dir():
        raise click.UsageError(f"the tests of the GPU are not beside {ROOT}: run it in a checkout")
    clock, out = Clock(time.monotonic() + 60 * minutes), out.resolve()  # pytest runs at the top of the checkout
    out.mkdir(parents=True, exist_ok=True)
    if device == "cuda" and not tested(out, clock):
        click.echo("a test of the GPU failed or did not end: no number is taken", err=True)
        sys.exit(FAILED)
    states = {name: measured(name, out, device, sets, clock) for name in suites or ORDER}
    for name, state in states.items():
        click.echo(f"{name}: {state}")
    sys.exit(exit_code(states.values()))


def exit_code(states: Iterable[str]) -> int:
    """0 where all are complete, 1 where one failed, else 3."""
    found = set(states)
    if any(state.startswith("failed") for state in found):
        return FAILED
    return 0 if found <= {"complete"} else MORE_TO_DO


# Tests


def tested(out: Path, clock: Clock) -> bool:
    """Whether the gpu tests of this source are green on this device; run where that is not known."""
    mark, state = out / "gpu-tests.json", {"source": source_hash(), "device": device_name()}
    if mark.exists() and json.loads(mark.read_text()) == state:
        return True
    for number, folders in enumerate(TESTS, 1):
        if not _green(folders, out / f"gpu-tests-{number}.xml", clock):
            return False
    mark.write_text(json.dumps(state))
    return True


def _green(folders: Sequence[str], results: Path, clock: Clock) -> bool:
    parallel = ["-n", "8"] if folders == TESTS[-1] and _has_xdist() else []
    words = [sys.executable, "-m", "pytest", "-q", "-m", GREEN_FIRST, f"--junitxml={results}", *parallel, *folders]
    try:
        done = subprocess.run(words, cwd=ROOT, timeout=max(1.0, clock.left()), check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and passed(results.read_text())


def passed(results: str) -> bool:
    """Whether at least one test of a JUnit file ran, none failed, and none was skipped for want of a GPU."""
    import xml.etree.ElementTree as Tree

    cases = list(Tree.fromstring(results).iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [found.get("message", "") for case in cases if (found := case.find("skipped")) is not None]
    return len(cases) > len(skipped) and not bad and not any(WITHOUT.search(message) for message in skipped)


def _has_xdist() -> bool:
    from importlib.util import find_spec

    return find_spec("xdist") is not None


def source_hash() -> str:
    """Changes with anything that the gpu tests test, or with them."""
    paths = sorted(path for pattern in SOURCES for path in ROOT.glob(pattern))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def device_name() -> str:
    """As the driver says it."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


# Suites


def measured(name: str, out: Path, device: str, sets: Sequence[str], clock: Clock) -> str:
    """Run or resume one suite: `complete`, `cut off`, `not begun: ...` or `failed: ...`."""
    folder = out / name.removesuffix(".toml").rpartition("/")[2]
    state = finished(folder)
    if state == "complete":
        return state
    needed = CUT_OFF_S + expected_seconds(name, device, sets)
    if clock.left() < needed and state is None:
        return f"not begun: it takes some {needed:.0f} s, and {max(0.0, clock.left()):.0f} s are left"
    words = [sys.executable, "-m", "moebench", "run", "suite", name, "--device", device, "--out", str(folder)]
    words += ["--no-report", *(word for text in sets for word in ("--set", text))]
    code = _until(words + (["--resume"] if state else []), clock.left() - CUT_OFF_S)
    state = finished(folder)
    if state == "complete":
        return state
    return "cut off" if code == 130 else f"failed: exit code {code}"


def _until(words: list[str], seconds: float) -> int:
    """The exit code; interrupted after so many seconds, and killed where it does not end then."""
    process = subprocess.Popen(words)
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        return process.wait(CUT_OFF_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return 130


def finished(folder: Path) -> str | None:
    """How far the run of a folder is, as its manifest says; None where there is none."""
    try:
        state = json.loads((folder / "manifest.json").read_text())["finished"]
    except (OSError, ValueError, KeyError):
        return None
    return str(state or "begun")


def expected_seconds(name: str, device: str, sets: Sequence[str]) -> float:
    """What `--dry-run` says of the suite."""
    words = [sys.executable, "-m", "moebench", "run", "suite", name, "--device", device, "--dry-run", "--json"]
    done = subprocess.run(
        words + [word for text in sets for word in ("--set", text)], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)  # it has said what is wrong
    return float(json.loads(done.stdout)[0]["seconds"])


if __name__ == "__main__":
    main()
