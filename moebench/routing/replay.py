"""Replaying a trace: windows of recorded routing as the ids and weights of a layer."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from moebench.trace_file import Trace, read_facts, read_trace
from moebench.trace_fit import check_fit, place_of

DRAWS = 4  # that rotate; a long trace gives each its own window, a short one moves on by a quarter


def replay(
    path: str, layer: int | None, tokens: int, draw_index: int, seed: int, top_k: int, routed_experts: int
) -> tuple[Tensor, Tensor]:
    """T consecutive tokens of one layer of a trace.

    Draw d begins d * T tokens after draw 0, or d quarters of the trace where it holds fewer than four windows; the seed
    turns draw 0 to another beginning. Past its end the trace goes on at its start: where it is shorter than T, the
    same tokens come again, and the load is that of fewer tokens than T (`repeats` says so).

    Args:
        path: a file of `moebench trace`.
        layer: the model's number of the layer, as the trace has it; None for the middle one.
        tokens: T.
        draw_index: which draw.
        seed: the problem's, the same for all its draws.
        top_k, routed_experts: K and E of the layer that takes the traffic.

    Returns:
        ids int64 [T, K] and weights float32 [T, K], in the recorded order, the weights as the experts got them.

    Raises:
        ValueError: the file is no trace, has no such layer, or is of another E or K; one line.
    """
    trace = _trace(path, *_stamp(path))
    check_fit(path, trace.facts, top_k, routed_experts)
    at = place_of(path, trace.facts, layer)
    rows = window(len(trace.tokens), tokens, draw_index, seed)
    ids = torch.from_numpy(trace.experts[at].astype("int64"))[rows]
    return ids, torch.from_numpy(trace.weights[at].astype("float32"))[rows]


def window(recorded: int, tokens: int, draw_index: int, seed: int) -> Tensor:
    """Which of the recorded tokens a draw takes: int64 [T]."""
    step = tokens if DRAWS * tokens <= recorded else max(1, recorded // DRAWS)
    start = (seed * DRAWS + draw_index) * step % recorded
    return (torch.arange(tokens) + start) % recorded


def repeats(path: str, tokens: int) -> bool:
    """Whether a draw of T tokens holds some recorded token twice."""
    return len(_trace(path, *_stamp(path)).tokens) < tokens


def _stamp(path: str) -> tuple[int, int]:
    # A file that is replaced while a process runs is read again.
    file = Path(path)
    if not file.is_file():
        read_facts(file)
    found = file.stat()
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=2)
def _trace(path: str, *stamp: int) -> Trace:
    return read_trace(Path(path))
