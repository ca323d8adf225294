"""The command line: parses, calls, echoes. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from moebench import __version__
from moebench.cli_audit import audit
from moebench.cli_compare import compare
from moebench.cli_publish import publish
from moebench.cli_run import run
from moebench.cli_trace import trace
from moebench.cli_tune import tune

KINDS = ("models", "providers", "routers", "suites", "hardware")


class Commands(click.Group):
    """Turns a user's mistake into one line and exit code 2, never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        from moebench.failures import RunError

        try:
            return super().invoke(ctx)
        except RunError as error:
            _fail(str(error), 1)
        except ValueError as error:
            _fail(str(error), 2)
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except BrokenPipeError:
            sys.stderr.close()  # `moebench list models | head`: nobody listens any more
            sys.exit(0)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{error.strerror or error}", 1)


def _fail(message: str, code: int) -> NoReturn:
    for line in message.splitlines():
        click.echo(f"moebench: {line}", err=True)
    sys.exit(code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="moebench")
def main() -> None:
    """Benchmark mixture-of-experts layers: checked, timed, priced, and drawn side by side.

    \b
    Examples:
      moebench run suite                         the default suite, then a report
      moebench run suite smoke --out run1        another suite, into a folder of your choice
      moebench describe mixtral-8x7b             a published layer, in numbers
      moebench list providers                    what can be raced here
    """


@main.command("list")
@click.argument("kind", type=click.Choice(KINDS))
@click.option("--json", "as_json", is_flag=True, help="A list of flat objects on stdout.")
@click.option("--hardware", type=click.Path(path_type=Path), help="With `hardware`: your rows too.")
def list_things(kind: str, as_json: bool, hardware: Path | None) -> None:
    """List models, providers, routers, suites or hardware.

    \b
    Examples:
      moebench list models
      moebench list providers --json
    """
    from moebench import listings

    rows = listings.hardware(hardware) if kind == "hardware" else getattr(listings, kind)()
    _print_rows(rows, as_json, listings.COLUMNS[kind])


@main.command()
@click.argument("model", metavar="MODEL|config.json")
@click.option("--tokens", type=click.IntRange(1, 2**30), default=1, show_default=True, help="Tokens of one call.")
@click.option("--precision", default="bf16", show_default=True, help="Of the weights, for bytes.")
@click.option("--json", "as_json", is_flag=True, help="A list of flat objects on stdout.")
def describe(model: str, tokens: int, precision: str, as_json: bool) -> None:
    """A published MoE layer, or a config.json's, in numbers; the file is read as data.

    \b
    Examples:
      moebench describe mixtral-8x7b
      moebench describe path/to/config.json --tokens 16
      moebench describe swin-moe-s-64:stage3 --json
    """
    from moebench.catalogue.describe import describe as described
    from moebench.catalogue.describe import render

    rows = described(model, tokens, precision)
    if as_json:
        click.echo(json.dumps(rows))
        return
    from moebench.terminal import print_renderable

    print_renderable(render(rows))


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("--out", type=click.Path(path_type=Path), help="The page. [default: report.html in the first RUN]")
@click.option("--baseline", help="Provider or variant that ratios are taken against.")
@click.option("--figures", type=click.Path(path_type=Path), metavar="DIR", help="Also write print figures (PDF, PNG).")
@click.option("--markdown", type=click.Path(path_type=Path), metavar="FILE", help="Also write a Markdown summary.")
@click.option(
    "--trace", "traces", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
    help="Also show a recorded trace (`moebench trace`). Repeatable.",
)  # fmt: skip
def report(
    runs: tuple[Path, ...],
    out: Path | None,
    baseline: str | None,
    figures: Path | None,
    markdown: Path | None,
    traces: tuple[Path, ...],
) -> None:
    """Write the CAP report of one or more runs; needs neither torch nor a GPU.

    \b
    Examples:
      moebench report moebench-runs/quick-20260101-120000
      moebench report run1 run2 --out both.html --figures figures
      moebench report run1 --trace mixtral.safetensors
    """
    from moebench.report.html import write_report

    click.echo(write_report(runs, out or runs[0] / "report.html", baseline=baseline, traces=traces))
    if figures is not None:
        from moebench.report.figures import write_figures

        for path in write_figures(runs, figures):
            click.echo(path)
    if markdown is not None:
        from moebench.report.markdown import write_markdown

        click.echo(write_markdown(runs, markdown))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="A list of flat objects on stdout.")
def doctor(as_json: bool) -> None:
    """Say what this machine can and cannot measure, and why.

    \b
    Examples:
      moebench doctor
      moebench doctor --json
    """
    from moebench import listings

    rows = listings.doctor()
    _print_rows(rows, as_json, listings.COLUMNS["doctor"])


def _print_rows(rows: list[dict[str, Any]], as_json: bool, columns: tuple[str, ...]) -> None:
    if as_json:
        click.echo(json.dumps(rows))
        return
    from moebench.terminal import print_rows

    print_rows(rows, columns)


main.add_command(audit)
main.add_command(compare)
main.add_command(publish)
main.add_command(run)
main.add_command(trace)
main.add_command(tune)
