"""The `trace` command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from moebench.trace_file import Trace


@click.command()
@click.argument("model", type=click.Path(path_type=Path), metavar="MODEL_DIR")
@click.option(
    "--text", "texts", multiple=True, required=True, type=click.Path(path_type=Path), metavar="FILE",
    help="UTF-8 text to read; its name is its domain. Repeatable.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("trace.safetensors"), show_default=True
)
@click.option("--tokens", type=click.IntRange(1, 2**24), default=4096, show_default=True, help="At most, of each text.")
@click.option("--window", type=click.IntRange(1, 2**20), default=1024, show_default=True, help="Tokens run at once.")
@click.option("--layers", metavar="N[,A-B]", help="The model's numbers of the layers to keep.  [default: all]")
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True)
@click.option("--half", is_flag=True, help="Keep weights as float16: a smaller file.")
@click.option("--json", "as_json", is_flag=True, help="A list of flat objects, one a layer, on stdout.")
def trace(
    model: Path,
    texts: tuple[Path, ...],
    out: Path,
    tokens: int,
    window: int,
    layers: str | None,
    device: str,
    half: bool,
    as_json: bool,
) -> None:
    """Record where a real model sends its tokens, as a file to replay as traffic and to look at in a report.

    MODEL_DIR is a Hugging Face checkpoint on this disk: config.json and safetensors. Its own tokenizer reads the texts,
    or their bytes do where it has none. Nothing is downloaded, and no code of the checkpoint is run.

    Exit codes: 0 recorded, 1 no such device or too little memory, 2 bad words, a bad file or a family that cannot be
    traced.

    \b
    Examples:
      moebench trace Mixtral-8x7B-v0.1 --text wiki.txt --text code.py --out mixtral.safetensors
      moebench trace OLMoE-1B-7B-0924 --text wiki.txt --layers 0,7,15 --tokens 100000
      moebench run suite prefill --set model=olmoe-1b-7b --set traffic=trace:trace.safetensors@7
    """
    kept = None if layers is None else numbers(layers)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out}: a trace is a .safetensors file")

    import torch

    from moebench.trace_file import write_trace
    from moebench.tracing import record

    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    bar: Any = click.progressbar(length=1, label="tokens", file=sys.stderr)
    with bar:

        def progress(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        found = record(
            model, texts, tokens=tokens, window=window, layers=kept, device=where, half=half, progress=progress
        )
    write_trace(out, found)
    if as_json:
        click.echo(json.dumps(_rows(found)))
    else:
        facts = found.facts
        click.echo(f"{out}: {facts.model_type}, {len(facts.layers)} layers, {len(found.tokens):,} tokens", err=True)
        click.echo(f"E={facts.routed_experts}, K={facts.top_k}; tokenizer: {facts.tokenizer}", err=True)
        click.echo(out)


def numbers(text: str) -> list[int]:
    """Layer numbers: `0,7,12-15`."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        ends = (first, last) if dash else (first, first)
        if not all(end.isascii() and end.isdecimal() and len(end) <= 6 for end in ends) or int(ends[0]) > int(ends[1]):
            raise ValueError(f"--layers {text[:60]!r}: allowed are numbers and ranges, such as 0,7,12-15")
        found += range(int(ends[0]), int(ends[1]) + 1)
    return sorted(set(found))


def _rows(found: Trace) -> list[dict[str, Any]]:
    from moebench.report.traces import layer_rows

    return [{"model_type": found.facts.model_type, "tokens": len(found.tokens), **row} for row in layer_rows(found)]
