"""Replay: windows of the recorded tokens, as a layer's ids and weights."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from trace_models import Recorded, made

from moebench.routing.replay import repeats, replay, window
from moebench.trace_file import write_trace

E, K = 8, 2


def test_draws_are_consecutive_windows_of_the_recording(recorded: Recorded) -> None:
    trace = recorded.trace
    for draw in range(5):
        ids, weights = replay(str(recorded.file), 1, 700, draw, 0, K, E)
        rows = slice(draw * 700, (draw + 1) * 700)
        assert ids.dtype == torch.int64
        assert weights.dtype == torch.float32
        assert ids.tolist() == trace.experts[1, rows].tolist()
        assert weights.tolist() == trace.weights[1, rows].tolist()


def test_the_middle_layer_is_taken_where_none_is_named(recorded: Recorded) -> None:
    path = str(recorded.file)
    assert torch.equal(replay(path, None, 50, 0, 3, K, E)[0], replay(path, 1, 50, 0, 3, K, E)[0])
    assert not torch.equal(replay(path, None, 50, 0, 3, K, E)[0], replay(path, 2, 50, 0, 3, K, E)[0])


def test_layers_have_the_numbers_of_the_model(tmp_path: Path) -> None:
    path = str(write_trace(tmp_path / "t.safetensors", made(layers=(3, 60))))
    assert replay(path, 60, 5, 0, 0, 2, 4)[0].tolist() == made().experts[1].tolist()
    with pytest.raises(ValueError, match=r"t\.safetensors: has no layer 1 \(allowed: 3, 60\)"):
        replay(path, 1, 5, 0, 0, 2, 4)


@pytest.mark.parametrize(
    ("recorded_tokens", "tokens"),
    [(6000, 1), (6000, 1500), (6000, 2000), (100, 100), (100, 99), (100, 250), (3, 7), (1, 4)],
)
def test_windows(recorded_tokens: int, tokens: int) -> None:
    """Consecutive, of the asked length, wrapping, and different where the recording allows."""
    seen = []
    for draw in range(4):
        rows = window(recorded_tokens, tokens, draw, seed=5).tolist()
        assert len(rows) == tokens
        assert all((b - a) % recorded_tokens == 1 % recorded_tokens for a, b in pairwise(rows))
        assert min(rows) >= 0
        assert max(rows) < recorded_tokens
        assert rows == window(recorded_tokens, tokens, draw, seed=5).tolist()
        seen.append(rows[0])
    assert len(set(seen)) == min(4, recorded_tokens)
    if 4 * tokens <= recorded_tokens:
        assert (
            len({row for draw in range(4) for row in window(recorded_tokens, tokens, draw, 5).tolist()}) == 4 * tokens
        )


def test_seeds_begin_elsewhere_and_may_be_of_any_size() -> None:
    starts = {int(window(6000, 100, 0, seed)[0]) for seed in range(15)}
    assert len(starts) == 15
    assert 0 <= int(window(6000, 100, 3, 2**63 - 1)[0]) < 6000


def test_a_short_trace_wraps_and_says_so(tmp_path: Path) -> None:
    path = str(write_trace(tmp_path / "t.safetensors", made()))
    ids, _ = replay(path, 0, 12, 0, 0, 2, 4)
    assert ids.tolist() == [made().experts[0, t % 5].tolist() for t in range(12)]
    assert repeats(path, 12)
    assert not repeats(path, 5)


@pytest.mark.parametrize(("top_k", "experts"), [(1, 8), (2, 16), (8, 128)])
def test_layers_of_another_size_are_refused(top_k: int, experts: int, recorded: Recorded) -> None:
    with pytest.raises(ValueError, match=rf"recorded with E=8, K=2; the layer has E={experts}, K={top_k}"):
        replay(str(recorded.file), None, 10, 0, 0, top_k, experts)


def test_a_file_that_is_replaced_is_read_again(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.safetensors", made(T=5))
    replay(str(path), 0, 5, 0, 0, 2, 4)
    other = made(T=6)
    write_trace(path, other)
    os.utime(path, ns=(1, 1))
    assert np.array_equal(replay(str(path), 0, 6, 0, 0, 2, 4)[0].numpy(), other.experts[0])
    path.unlink()
    with pytest.raises(ValueError, match="no such file"):
        replay(str(path), 0, 5, 0, 0, 2, 4)


def test_what_comes_out_may_be_changed(recorded: Recorded) -> None:
    """The kept trace is not the caller's memory."""
    ids, weights = replay(str(recorded.file), 0, 10, 0, 0, K, E)
    ids.zero_()
    weights.zero_()
    again, kept = replay(str(recorded.file), 0, 10, 0, 0, K, E)
    assert again.any()
    assert kept.any()
