"""One small model, trained for a few seconds on real text, and its trace: what the tests of this folder look at."""

from __future__ import annotations

import argparse
import inspect
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from trace_models import save, tiny

from moebench.cli import Commands
from moebench.cli_trace import trace
from moebench.trace_file import Trace, read_trace

CHECKOUT = Path(__file__).parents[2]
STEPS, BATCH, LENGTH = 150, 16, 64


@dataclass(frozen=True)
class Recorded:
    """A trained model's folder, the texts it read, and the file the command wrote."""

    model: Path
    texts: tuple[Path, ...]
    file: Path
    trace: Trace


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A byte-level OLMoE trained on our docs (English) and on the standard library (Python), then traced."""
    folder = tmp_path_factory.mktemp("traced")
    texts = (folder / "english.md", folder / "python.py")
    english = "\n".join(path.read_text() for path in sorted((CHECKOUT / "docs").glob("*.md")))
    texts[0].write_text(english)
    texts[1].write_text("\n".join(inspect.getsource(module) for module in (argparse, textwrap, json)))
    model = save(train([path.read_bytes() for path in texts]), folder / "tiny-olmoe")
    file = folder / "trace.safetensors"
    arguments = [arg for path in texts for arg in ("--text", str(path))]
    done = traced(str(model), *arguments, "--tokens", "3000", "--window", "100", "--out", str(file))
    assert done.exit_code == 0, done.output
    return Recorded(model, texts, file, read_trace(file))


def traced(*words: str):
    """The command, with a user's mistakes turned into lines as under `moebench`."""
    return CliRunner().invoke(Commands(commands={"trace": trace}), ["trace", *words])


def train(texts: list[bytes]) -> torch.nn.Module:
    """Next-byte prediction for a few seconds, enough that bytes and domains prefer experts."""
    model = tiny("olmoe", hidden_size=64, head_dim=16, intermediate_size=32).train()
    streams = [torch.tensor(list(text)) for text in texts]
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        stream = streams[step % len(streams)]
        starts = torch.randint(len(stream) - LENGTH, (BATCH,), generator=generator)
        batch = stream[starts[:, None] + torch.arange(LENGTH)]
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 4.0, "an untrained model has log(256) = 5.5"
    return model.eval()
