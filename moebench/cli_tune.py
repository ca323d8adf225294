"""The `tune` command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")
DTYPES = ("bf16", "fp16", "fp32")


@click.command()
@click.option("--model", "models", multiple=True, metavar="M[,M]", help="Presets (`moebench list models`).")
@click.option("--shape", "shapes", multiple=True, metavar="E,D,F,K", help="A plain SwiGLU layer. Repeatable.")
@click.option("--tokens", default="16,128,1024,8192", show_default=True, metavar="T[,T]", help="Tokens of a call.")
@click.option("--dtype", "dtypes", default="bf16", show_default=True, metavar="D[,D]", help="Of bf16, fp16, fp32.")
@click.option("--backward", is_flag=True, help="Also the products of the backward.")
@click.option("--keep", type=click.IntRange(1, 1000), default=24, show_default=True, help="Candidates raced a case.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="The file.  [default: DEVICE.json]")
@click.option("--resume", is_flag=True, help="Go on with the file in --out; what it holds is not raced again.")
@click.option("--dry-run", is_flag=True, help="Say what would be raced, and stop. Needs no GPU.")
@click.option("--target", type=click.Choice(TARGETS), default="sm_90", show_default=True, help="With --dry-run: for.")
@click.option("--json", "as_json", is_flag=True, help="A list of flat objects on stdout.")
@click.pass_context
def tune(
    ctx: click.Context,
    models: tuple[str, ...],
    shapes: tuple[str, ...],
    tokens: str,
    dtypes: str,
    backward: bool,
    keep: int,
    out: Path | None,
    resume: bool,
    dry_run: bool,
    target: str,
    as_json: bool,
) -> None:
    """Find the fastest tiles of the grouped GEMMs for the GPU here, and write them to a file that the kernels load.

    With --backward also those of the backward's products, the weight gradients among them.

    Candidates are thinned by a cost model and by the compiler's report, then checked, and raced in shuffled
    rounds against the shipped tile, which stays where nothing is clearly faster. The kernels use the file that
    MOEBENCH_TILES names. Ctrl-C loses only the case in hand; --resume goes on.

    Exit codes: 0 all good, 1 some product has no right tile or there is no GPU, 2 bad words or a bad file, 130
    interrupted.

    \b
    Examples:
      moebench tune --model qwen3-30b-a3b,olmoe-1b-7b --out h200.json
      moebench tune --shape 128,2048,768,8 --tokens 32768 --backward
      moebench tune --model mixtral-8x7b --dry-run --target gfx942
      MOEBENCH_TILES=h200.json moebench run suite prefill
    """
    from moebench.tune.case import cases, layers_of

    if not dry_run and ctx.get_parameter_source("target") is not click.core.ParameterSource.DEFAULT:
        raise click.UsageError("--target goes with --dry-run; tuning is for the GPU here")

    layers = layers_of(_split(models), shapes)
    if not layers:
        raise click.UsageError("name layers to tune with --model or --shape")
    every = cases(layers, _numbers(tokens), _names(dtypes), backward=backward)
    if dry_run:
        from moebench.tune.show import print_fields
        from moebench.tune.thin import thin

        print_fields(thin(every, target, keep), target, as_json)
        return
    from moebench.tune.run import tune as tuned
    from moebench.tune.show import LiveTuning

    try:
        with LiveTuning() as live:
            kept = tuned(every, out, keep=keep, resume=resume, progress=live.progress)
    except KeyboardInterrupt:
        click.echo("moebench: interrupted; the same command with --resume goes on", err=True)
        ctx.exit(130)
    click.echo(json.dumps(_entries(kept.path)) if as_json else kept.path)
    if kept.failed:
        click.echo(f"moebench: {kept.failed} without a tile that gives a right answer: see {kept.path}", err=True)
        ctx.exit(1)


def _entries(path: Path) -> list[dict[str, Any]]:
    from moebench.tune.show import flat_entries

    return flat_entries(json.loads(path.read_text()))


def _split(given: tuple[str, ...]) -> list[str]:
    return [name for text in given for name in text.split(",") if name]


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and 0 < int(part) <= 2**24 for part in parts):
        raise ValueError(f"--tokens {text!r}: found something else than whole numbers from 1 to {2**24}")
    return [int(part) for part in parts]


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in DTYPES:
            raise ValueError(f"--dtype {name!r} is unknown (allowed: {', '.join(DTYPES)})")
    return names
