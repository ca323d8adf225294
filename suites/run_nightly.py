"""`make nightly`: measure the commit at hand with asv, publish the site, say what regressed. Works offline.

    python -m moebench_suites.run_nightly [--device auto|cpu|cuda] [--machine NAME]

Everything lies under `.asv` of the repository: `results` (asv's, the history), `html` (the site)
and `runs/COMMIT` (the run directory, for `moebench report` and `moebench compare`).

Exit codes: 0 no news, 1 a benchmark failed, 2 bad words, 3 a regression that no earlier night told.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import click
from moebench_suites.regressions import Regression, news, remember

CONFIG, SITE, RESULTS, RUNS = "asv.conf.json", ".asv/html", ".asv/results", ".asv/runs"
TOLD = f"{RESULTS}/regressions-told.jsonl"  # beside the results, so that it travels with them
FAILED, REGRESSED = 1, 3


@click.command()
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True)
@click.option("--machine", help="Whose history this is. [default: the device's name]")
@click.option("--again", is_flag=True, help="Measure nothing: publish and judge what is stored.")
def main(device: str, machine: str | None, again: bool) -> None:
    """Measure the current commit, publish the history, exit with 3 on a regression."""
    root, commit = _repository()
    if not (root / CONFIG).is_file():
        raise click.UsageError(f"{root} has no {CONFIG}")
    failed = False
    if not again:
        kind, name = _device(device)
        failed = not measure(root, commit, kind, machine or name)
    if not _asv(root, "publish", "--no-pull"):
        raise click.ClickException("asv could not publish what is stored")
    found = news(root / SITE, root / RESULTS, root / TOLD, commit)
    clear = [regression for regression in found if regression.clear]
    for regression in clear:
        click.echo(line(regression))
    for regression in found:
        if not regression.clear:
            click.echo(f"unsure, the nights overlap: {line(regression)}", err=True)
    remember(root / TOLD, clear, commit)
    click.echo(f"{len(clear)} new regressions; the site: {SITE}, the run: {RUNS}/{commit}", err=True)
    sys.exit(REGRESSED if clear else FAILED if failed else 0)


def measure(root: Path, commit: str, device_kind: str, machine: str) -> bool:
    """One asv run of the tree as it is, stored under `commit`; False where a benchmark failed."""
    if _git(root, "status", "--porcelain"):
        click.echo(f"warning: the tree has changes; what is measured is stored as {commit[:10]} all the same", err=True)
    # Named by these two alone: asv begins a new history when any fact of a machine changes, be it a kernel's number.
    if not _asv(root, "machine", "--yes", "--machine", machine, "--os", platform.system()):
        raise click.ClickException("asv could not note the machine")
    more = {"MOEBENCH_NIGHTLY_DEVICE": device_kind, "MOEBENCH_NIGHTLY_OUT": str(root / RUNS / commit)}
    words = ("--python=same", "--set-commit-hash", commit, "--launch-method", "spawn", "--machine", machine)
    return _asv(root, "run", *words, "--show-stderr", "--no-pull", **more)


def line(regression: Regression) -> str:
    """`nightly.Latency.track_device(CASE): 1.02 -> 3.05 ms (+199 %), since 1a2b3c4d5e`."""
    before, after = regression.before, regression.after
    change = f" ({100 * (after / before - 1):+.0f} %)" if before else ""
    since = f"since {regression.commit[:10]}"
    if regression.last_good:
        since += f", after {regression.last_good[:10]}"
    return f"{regression.entry}: {before:.4g} -> {after:.4g} {regression.unit}{change}, {since}"


def _asv(root: Path, *words: str, **environment: str) -> bool:
    done = subprocess.run(
        [sys.executable, "-m", "asv", *words, "--config", str(root / CONFIG)],
        cwd=root, env={**os.environ, **environment}, stdout=sys.stderr, check=False,
    )  # fmt: skip
    return done.returncode == 0


def _repository() -> tuple[Path, str]:
    """The top folder of the repository around the current one, and its commit."""
    try:
        return Path(_git(Path.cwd(), "rev-parse", "--show-toplevel")), _git(Path.cwd(), "rev-parse", "HEAD")
    except subprocess.CalledProcessError as error:
        raise click.UsageError(f"no commit to measure here: {error.stderr.strip().splitlines()[-1]}") from None


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def _device(asked: str) -> tuple[str, str]:
    """cpu or cuda, and what to call this machine."""
    from moebench.measure.device import device_name

    kind = "cpu" if asked == "cpu" else _best_device(asked)
    words = [kind, device_name(kind), *([] if kind == "cuda" else [f"{os.cpu_count()} cores"])]
    return kind, re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def _best_device(asked: str) -> str:
    import torch  # seconds: not where the answer is known

    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise click.UsageError("--device cuda: no CUDA device is available to PyTorch here")
    return "cpu"


if __name__ == "__main__":
    main()
