"""The `run` command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from moebench.catalogue.hardware import Hardware
    from moebench.options import Options
    from moebench.run import Outcome
    from moebench.suite import Suite

DEFAULT_SUITE = "quick"
RUNS = Path("moebench-runs")


@click.group()
def run() -> None:
    """Measure something.

    \b
    Example:
      moebench run suite smoke
    """


@run.command("suite")
@click.argument("sources", nargs=-1, metavar="[NAME|FILE]...")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run. [default: moebench-runs/SUITE-TIME]")
@click.option("--resume", is_flag=True, help="Go on with the run in --out (or with the suite's newest unfinished one).")
@click.option("--set", "sets", multiple=True, metavar="AXIS=V[,V]", help="Replace an axis in every sweep. Repeatable.")
@click.option(
    "--provider",
    "providers",
    multiple=True,
    metavar="A[,B]",
    help="Race only these providers. Given only path/to/file.py:function, it joins the suite's own.",
)
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True)
@click.option("--hardware", type=click.Path(path_type=Path), help="CSV or TOML with your devices' peaks and prices.")
@click.option("--check-only", is_flag=True, help="Check every answer, time nothing.")
@click.option("--shard", metavar="I/N", default="1/1", help="Run only the I-th of N shares of the blocks.")
@click.option("--no-report", is_flag=True, help="Leave out report.html.")
@click.option("--dry-run", is_flag=True, help="Print the plan, its size and estimated time; measure nothing.")
@click.option("--for", "elsewhere", metavar="NAME", help="With --dry-run: on this device of `list hardware`, not here.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome (or the plan) as JSON on stdout.")
def run_suite(
    sources: tuple[str, ...],
    out: Path | None,
    resume: bool,
    sets: tuple[str, ...],
    providers: tuple[str, ...],
    device: str,
    hardware: Path | None,
    check_only: bool,
    shard: str,
    no_report: bool,
    dry_run: bool,
    elsewhere: str | None,
    as_json: bool,
) -> None:
    """Measure a suite and write its report; `quick` when none is named.

    Exit codes: 0 all good, 1 some point failed, 2 bad words or a bad file, 130 interrupted (--resume goes on).

    \b
    Examples:
      moebench run suite
      moebench run suite decode --set model=qwen3-30b-a3b --set tokens=1,8,64
      moebench run suite --provider my_kernel.py:experts
      moebench run suite sweep --dry-run
      moebench run suite h200-decode --dry-run --for H200-SXM-141GB
      moebench run suite quick --out run1 --resume
    """
    from moebench.suite import load_suite, parse_shard

    names, added = _provider_choice(providers)
    overrides = _overrides(sets) | ({"provider": names} if names else {})
    suite = load_suite(sources or (DEFAULT_SUITE,), overrides, add_providers=added)
    share = parse_shard(shard)
    if elsewhere and not dry_run:
        raise click.UsageError("--for plans for a device that need not be here; it goes with --dry-run")
    if dry_run:
        from moebench.catalogue.hardware import hardware_row, hardware_table

        table = hardware_table(hardware)  # a bad file is said now
        _print_plan(suite, device, hardware_row(elsewhere, table) if elsewhere else None, as_json)
        return
    from moebench.options import Options, default_command

    options = Options(
        out=out or _default_out(suite, resume),
        resume=resume,
        device=device,
        check_only=check_only,
        shard=share,
        hardware=hardware,
        command=default_command(),
    )
    _run(suite, options, report=not no_report, as_json=as_json)


def _run(suite: Suite, options: Options, *, report: bool, as_json: bool) -> None:
    from moebench.options import resume_command
    from moebench.run import run_suite
    from moebench.stopwatch import spent
    from moebench.terminal import LiveProgress, outcome_lines

    with LiveProgress(suite) as progress:
        outcome = run_suite(suite, options, progress)
    page = _write_report(outcome) if report else None
    for line in outcome_lines(outcome):
        click.echo(line, err=True)
    if outcome.interrupted:
        click.echo(f"interrupted; go on with:  {resume_command(options)}", err=True)
    if as_json:
        result = {"path": str(outcome.path), "report": page and str(page), "exit_code": outcome.exit_code}
        click.echo(json.dumps([{**result, **spent(outcome.seconds), **outcome.counts}]))
    else:
        click.echo(page or outcome.path)
    sys.exit(outcome.exit_code)


def _write_report(outcome: Outcome) -> Path | None:
    if not (outcome.path / "results.parquet").exists():
        return None
    from moebench.report.html import write_report

    return write_report([outcome.path], outcome.path / "report.html")


def _provider_choice(given: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """(providers that replace the suite's, providers that join them)."""
    from moebench.providers import PROVIDERS, is_file

    names = [name for text in given for name in text.split(",")]
    for name in filter(is_file, names):
        path = name.rpartition(":")[0]
        if not Path(path).expanduser().is_file():
            raise ValueError(f"provider {name}: there is no file {path!r}")
    return ([], names) if names and not any(name in PROVIDERS for name in names) else (names, [])


def _overrides(sets: tuple[str, ...]) -> dict[str, list[str]]:
    overrides: dict[str, list[str]] = {}
    for text in sets:
        axis, equals, values = text.partition("=")
        if not equals or not axis:
            raise click.BadParameter(f"{text!r} is not AXIS=VALUE[,VALUE]", param_hint="--set")
        if axis in overrides:
            raise click.BadParameter(f"{axis} is given twice", param_hint="--set")
        overrides[axis] = values.split(",")
    return overrides


def _default_out(suite: Suite, resume: bool) -> Path:
    from datetime import datetime

    prefix = "".join(character if character.isalnum() else "-" for character in suite.name)
    if not resume:
        return RUNS / f"{prefix}-{datetime.now():%Y%m%d-%H%M%S}"
    from moebench.run_directory import newest_unfinished

    found = newest_unfinished(RUNS, prefix)
    if found is None:
        raise ValueError(f"there is no unfinished run of {suite.name} in {RUNS}; name its folder with --out")
    return found


def _print_plan(suite: Suite, device: str, elsewhere: Hardware | None, as_json: bool) -> None:
    from moebench.plan_text import plan_rows, plan_text

    rows = plan_rows(suite, device, RUNS, elsewhere)
    click.echo(json.dumps(rows) if as_json else plan_text(suite, rows))
