"""One small model, trained for a few seconds on real text, and its trace: what the tests of this folder look at."""

from __future__ import annotations

import argparse
import inspect
import json
import textwrap
from pathlib import Path

import pytest
from trace_models import Recorded, save, traced, train

from moebench.trace_file import read_trace

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A byte-level OLMoE trained on our docs (English) and on the standard library (Python), then traced."""
    folder = tmp_path_factory.mktemp("traced")
    texts = (folder / "english.md", folder / "python.py")
    lines = [line for path in sorted((CHECKOUT / "docs").glob("*.md")) for line in path.read_text().splitlines()]
    texts[0].write_text("\n".join(line for line in lines if len(line) > 60 and not set("|`{=") & set(line)))
    texts[1].write_text("\n".join(inspect.getsource(module) for module in (argparse, textwrap, json)))
    model = save(train([path.read_bytes() for path in texts]), folder / "tiny-olmoe")
    file = folder / "trace.safetensors"
    arguments = [arg for path in texts for arg in ("--text", str(path))]
    done = traced(str(model), *arguments, "--tokens", "3000", "--window", "100", "--out", str(file))
    assert done.exit_code == 0, done.output
    return Recorded(model, texts, file, read_trace(file))
