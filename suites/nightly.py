"""The nightly as asv sees it (`asv.conf.json`): one run of the harness, then numbers read from it. No torch.

`setup_cache` measures the suite once; each `track_*` below picks one number of one case out of
what it found. Lower is better in all of them, since asv knows no other direction. A `track_*` that
returns `{"samples": [...], "number": 1}` has its samples treated like a timing's: median, quartiles
and 99 % interval; asv does it and does not say so, hence `tests/nightly` looks.

`moebench_suites.run_nightly` (`make nightly`) sets the environment variables named here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

from moebench_suites.cases import DEFAULT_SUITE, cases

SUITE = os.environ.get("MOEBENCH_NIGHTLY_SUITE", DEFAULT_SUITE)
DEVICE = os.environ.get("MOEBENCH_NIGHTLY_DEVICE", "cpu")
OUT = os.environ.get("MOEBENCH_NIGHTLY_OUT")  # keeps the run directory; else it goes with asv's cache
HARNESS = [sys.executable, "-m", "moebench"]

MANIFEST = "manifest.json"
ENDED = (0, 1)  # exit codes of a run that went to its end, all good or not; 1 is also that of one that broke off
GAP = float("nan")  # what asv takes for "not measured"
POINTS = cases("cuda" if DEVICE == "cuda" else "cpu", SUITE)


def setup_cache() -> dict[str, Any]:
    """Measure the suite; case id -> numbers (`moebench_suites.nightly_numbers`)."""
    from moebench_suites.nightly_numbers import numbers_of

    from moebench.suite import load_suite

    out = Path(OUT or "run").absolute()
    measure(out)
    return numbers_of(out, POINTS, load_suite([SUITE]).replicates)


setup_cache.timeout = 4 * 3600  # type: ignore[attr-defined]


def measure(out: Path) -> None:
    """Run the suite into `out`, in place of an earlier run there.

    Raises:
        RuntimeError: the run did not go to its end.
    """
    if (out / MANIFEST).is_file():
        shutil.rmtree(out)
    words = ["run", "suite", SUITE, "--out", str(out), "--device", DEVICE, "--no-report"]
    done = subprocess.run([*HARNESS, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode not in ENDED or not _complete(out):
        said = "\n".join(done.stderr.splitlines()[-20:])
        raise RuntimeError(f"`moebench {' '.join(words)}` ended with exit code {done.returncode}:\n{said}")


def _complete(out: Path) -> bool:
    manifest = out / MANIFEST
    return manifest.is_file() and json.loads(manifest.read_text())["finished"] == "complete"


def tracked(found: dict[str, Any], case: str, number: str) -> Any:
    """Samples of one number of one case, as asv takes them, or a gap.

    Raises:
        RuntimeError: the case failed, so that asv shows a failed benchmark.
    """
    numbers = found[case]
    if numbers["fault"]:
        raise RuntimeError(f"{case}: {numbers['fault']}")
    samples = numbers[number]
    return {"samples": samples, "number": 1} if samples else GAP


class _Tracked:
    """What all have in common. `version` is the meaning of a number: raise it, and the history begins anew."""

    params: ClassVar = list(POINTS)
    param_names: ClassVar = ["case"]
    timeout = 120.0
    version = "1"


class Latency(_Tracked):
    """Of one call of a case."""

    unit = "ms"

    def track_device(self, found: dict[str, Any], case: str) -> Any:
        """On the device's own clock; of a CPU the wall clock."""
        return tracked(found, case, "device_ms")

    def track_wall(self, found: dict[str, Any], case: str) -> Any:
        """With the host's part; a gap where the host's clock is the only one."""
        return tracked(found, case, "wall_ms")


class Relative(_Tracked):
    """The gate of machines that others use too: what slows all down slows the yardstick as well."""

    unit = "yardsticks"

    def track_latency_over_control(self, found: dict[str, Any], case: str) -> Any:
        """Latency over that of the yardstick of its block, one ratio for each process."""
        return tracked(found, case, "over_control")


class Energy(_Tracked):
    """Of one token that enters the layer; a gap where there is no meter."""

    unit = "J"

    def track_per_token(self, found: dict[str, Any], case: str) -> Any:
        """Gross: with what the device takes when idle."""
        return tracked(found, case, "energy_j_per_token")


class Memory(_Tracked):
    """Beyond weights and inputs."""

    unit = "bytes"

    def track_peak(self, found: dict[str, Any], case: str) -> Any:
        """The most that one call held."""
        return tracked(found, case, "peak_memory_bytes")


class Error(_Tracked):
    """Against the float64 oracle."""

    unit = "relative"

    def track_relative(self, found: dict[str, Any], case: str) -> Any:
        """Norm of the difference over norm of the answer."""
        return tracked(found, case, "rel_error")
