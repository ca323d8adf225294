"""The `audit` command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click


@click.command()
@click.argument("files", nargs=-1, metavar="[FILE.py]...")
@click.option(
    "--target", "targets", multiple=True, metavar="NAME[,NAME]", help="Only sm_80, sm_90, sm_100, gfx942, gfx950."
)
@click.option(
    "--kernel", "kernels", multiple=True, metavar="PATTERN", help="Only kernels or builds like this; * and ? work."
)
@click.option("--all", "every", is_flag=True, help="Every declared config; else one of each kernel and target.")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="RUN", help="A run directory; its report then shows the audit."
)
@click.option("--jobs", "-j", type=click.IntRange(0, 512), default=0, help="Compiles at a time.  [default: one a CPU]")
@click.option(
    "--timeout",
    type=click.FloatRange(1, 86400),
    default=300.0,
    show_default=True,
    help="Seconds for one compile; also to run one FILE.",
)
@click.option("--json", "as_json", is_flag=True, help="A list of flat objects on stdout.")
def audit(
    files: tuple[str, ...],
    targets: tuple[str, ...],
    kernels: tuple[str, ...],
    every: bool,
    out: Path | None,
    jobs: int,
    timeout: float,
    as_json: bool,
) -> None:
    """Compile kernels for GPUs that are not here, and say what came out.

    Registers, spills, shared memory, occupancy bound, tensor-core and TMA instructions of each kernel on each target.
    Without FILE: the kernels of moebench_kernels. A FILE declares its own with `builds()`; it is run. What was compiled
    before comes from a cache. No GPU is needed.

    Exit codes: 0 all ok, 1 a fault, 2 bad words or a bad file.

    \b
    Examples:
      moebench audit
      moebench audit --target sm_90 --kernel gemm --all
      moebench audit my_kernels.py --json
      moebench audit --out moebench-runs/quick-20260101-120000
    """
    from moebench.audit.run import Request
    from moebench.audit.run import audit as audited
    from moebench.audit.saved import require_run, write_audit
    from moebench.audit.terminal import Bar, print_audit

    if out is not None:
        require_run(out)
    request = Request(
        files, _split(targets), _split(kernels), all=every, jobs=jobs, timeout_s=timeout, load_timeout_s=timeout
    )
    with Bar() as bar:
        found = audited(request, bar)
    if out is not None:
        click.echo(write_audit(out, found), err=True)
    if as_json:
        from moebench.audit.rows import flat

        click.echo(json.dumps([flat(row) for row in found.rows]))
    else:
        print_audit(found)
    sys.exit(0 if found.ok else 1)


def _split(given: tuple[str, ...]) -> tuple[str, ...]:
    """Names of all; a text without any stays, as a name that nothing has: it must not mean "all"."""
    return tuple(name for text in given for name in [each for each in text.split(",") if each] or [text])
