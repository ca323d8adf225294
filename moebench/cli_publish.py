"""The `publish` command."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--into", type=click.Path(path_type=Path), default=Path("reports"), show_default=True, help="Where the folders go."
)
@click.option("--replace", is_flag=True, help="Write the folder of a run again that is published already.")
def publish(runs: tuple[Path, ...], into: Path, replace: bool) -> None:
    """Make run directories into published measurements, one folder each: DATE-DEVICE-SUITE.

    A folder holds manifest.json and results.parquet with all rows, cleaned of paths and names of this machine, a page
    (report.md) and its figures. Only complete runs are published. Needs neither torch nor a GPU.

    \b
    Examples:
      moebench publish moebench-runs/quick-20260101-120000
      moebench publish run1 run2 --into measurements
      moebench publish run1 --replace
    """
    from moebench.report.publish import publish as published

    for done in published(runs, into, replace=replace):
        if done.dirty:
            said = "was measured with uncommitted changes in the checkout; its page says so"
            click.echo(f"moebench: warning: {done.path} {said}", err=True)
        if done.cleaned:
            click.echo(f"moebench: cleaned of private text in {done.path}: {', '.join(done.cleaned)}", err=True)
        click.echo(done.path)
