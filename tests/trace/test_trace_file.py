"""The file: what is written is read back, and whatever else is one clear line."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from trace_models import Recorded, made

from moebench import trace_file
from moebench.trace_file import NAMES, Trace, printable, read_facts, read_trace, write_trace


def same(one: Trace, other: Trace) -> bool:
    arrays = all(
        getattr(one, n).dtype == getattr(other, n).dtype and np.array_equal(getattr(one, n), getattr(other, n))
        for n in NAMES[:-1]
    )
    return arrays and one.facts == other.facts and dict(one.texts) == dict(other.texts)


@pytest.mark.parametrize(
    ("K", "E", "dtype"), [(2, 4, "uint8"), (2, 256, "uint8"), (3, 257, "uint16"), (12, 65537, "int32"), (1, 1, "uint8")]
)
def test_round_trip(K: int, E: int, dtype: str, tmp_path: Path) -> None:
    trace = made(K=K, E=E)
    assert trace.experts.dtype == dtype
    path = write_trace(tmp_path / "deep" / "t.safetensors", trace)
    assert same(read_trace(path), trace)
    assert read_facts(path) == trace.facts
    assert [each.name for each in path.parent.iterdir()] == ["t.safetensors"]


def test_the_recorded_file_is_compact(recorded: Recorded) -> None:
    trace = recorded.trace
    picks = trace.experts.size
    assert picks == 3 * 6000 * 2
    assert recorded.file.stat().st_size < 5 * picks + 10 * len(trace.tokens) + 10_000


def refused(path: Path) -> str:
    """The one line that both the file's name and what is wrong are in."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is looked at
        read_trace(path)
    line = str(caught.value)
    assert line.startswith(str(path))
    assert line.isprintable()
    assert len(line) < 500
    return line


def test_a_file_cut_short_anywhere(recorded: Recorded, tmp_path: Path) -> None:
    whole = recorded.file.read_bytes()
    path = tmp_path / "cut.safetensors"
    for size in (0, 1, 7, 8, 9, 100, 500, 1000, 2000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path)
    path.write_bytes(whole + b"\0")
    refused(path)


def test_a_byte_flipped_anywhere(tmp_path: Path) -> None:
    """A flip is refused, or (in the spaces after the header) changes nothing."""
    trace = made()
    path = write_trace(tmp_path / "t.safetensors", trace)
    whole = bytearray(path.read_bytes())
    choose = random.Random(0)
    for at in choose.sample(range(len(whole)), 600):
        before = whole[at]
        whole[at] ^= choose.randrange(1, 256)
        path.write_bytes(whole)
        try:
            assert same(read_trace(path), trace), at
        except ValueError as error:
            said = str(error)
            assert said.startswith(str(path)) and said.isprintable()  # noqa: PT018 - most flips raise, not all
        whole[at] = before
    for at in range(len(whole) - trace.weights.nbytes, len(whole)):  # the arrays have no byte that may change
        whole[at] ^= 1
        path.write_bytes(whole)
        refused(path)
        whole[at] ^= 1


def forged(path: Path, facts: Any = None, metadata: Any = None, arrays: Any = None) -> Path:
    """A file with a right checksum over wrong contents."""
    trace = made()
    written = trace_file._arrays(trace) | (arrays or {})
    written = {name: array for name, array in written.items() if array is not None}
    text = facts if isinstance(facts, str) else json.dumps(asdict(trace.facts) | (facts or {}))
    checksum = trace_file._checksum(text, {n: written.get(n, np.zeros(0, np.uint8)) for n in NAMES})
    own = {"format": "moebench-trace", "version": "1", "facts": text, "checksum": checksum}
    own |= metadata or {}
    save_file(written, path, metadata={key: value for key, value in own.items() if value is not None})
    return path


def test_a_forged_file_is_read_when_nothing_is_wrong(tmp_path: Path) -> None:
    assert same(read_trace(forged(tmp_path / "t.safetensors")), made())


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not those of a trace"),
        ('{"routed_experts": 4}', "not those of a trace"),
        ({"extra": 1}, "not those of a trace"),
        ({"model": ""}, "its model is wrong"),
        ({"model": "a\x1b[2Jb"}, "its model is wrong"),
        ({"model_type": "x" * 300}, "its model_type is wrong"),
        ({"tokenizer": 3}, "its tokenizer is wrong"),
        ({"weights_on": "both"}, "output or input"),
        ({"weights_on": []}, "output or input"),
        ({"routed_experts": 10**30}, "whole numbers from 1 to 1048576"),
        ({"routed_experts": 4.0}, "its routed_experts is wrong"),
        ({"routed_experts": True}, "its routed_experts is wrong"),
        ({"routed_experts": 2}, "expert ids outside 0 to 1"),
        ({"routed_experts": 300}, "allowed: uint16"),
        ({"top_k": 5}, "whole numbers from 1 to 4"),
        ({"top_k": 3}, "allowed: uint8 [2, 5, 3]"),
        ({"layers": [0]}, "allowed: uint8 [1, 5, 2]"),
        ({"layers": [1, 1]}, "rising whole numbers"),
        ({"layers": [1, 0]}, "rising whole numbers"),
        ({"layers": [0, "1"]}, "rising whole numbers"),
        ({"layers": []}, "rising whole numbers"),
        ({"layers": "01"}, "rising whole numbers"),
        ({"domains": ["a"]}, "a token is of domain 1 (allowed: 0 to 0)"),
        ({"domains": ["a", "a"]}, "different names"),
        ({"domains": ["a", "\u202eb"]}, "different names"),
        ({"domains": ["a", ["b"]]}, "different names"),
        ({"domains": {"a": 1}}, "different names"),
    ],
)
def test_wrong_facts(facts: Any, line: str, tmp_path: Path) -> None:
    assert line in refused(forged(tmp_path / "t.safetensors", facts))


def changed(name: str, place: Any, value: float) -> dict[str, Any]:
    array = getattr(made(), name).copy()
    array[place] = value
    return {name: array}


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({"weights": None}, "holds the arrays"),
        ({"more": np.zeros(3)}, "holds the arrays"),
        ({"experts": made().experts.astype(np.int64)}, "its experts are I64 [2, 5, 2]; allowed: uint8 [2, 5, 2]"),
        ({"weights": made().weights.astype(np.float64)}, "allowed: float32 or float16 [2, 5, 2]"),
        ({"weights": made().weights[:, :4]}, "its weights are float32 [2, 4, 2]"),
        ({"tokens": np.zeros((5, 1), np.int32)}, "no list"),
        ({"tokens": np.zeros(0, np.int32)}, "no list"),
        ({"positions": np.zeros(4, np.int32)}, "its positions are int32 [4]"),
        ({"domains": np.zeros(5, np.uint8)}, "its domains are uint8 [5]"),
        (changed("tokens", 2, -1), "its tokens are wrong"),
        (changed("positions", 2, -1), "its positions are wrong"),
        (changed("domains", 2, 2), "of domain 2"),
        (changed("experts", (1, 2, 0), 4), "layer 1: expert ids outside 0 to 3"),
        (changed("experts", (1, 2, 0), made().experts[1, 2, 1]), "layer 1: a token names one expert twice"),
        (changed("weights", (0, 2, 0), np.nan), "layer 0: weights that are not finite"),
        (changed("weights", (0, 2, 0), np.inf), "layer 0: weights that are not finite"),
        ({"texts": np.frombuffer(b"[1]", np.uint8)}, "no JSON object of token ids"),
        ({"texts": np.frombuffer(b"{", np.uint8)}, "no JSON object of token ids"),
        ({"texts": np.frombuffer(b"\xff\xfe", np.uint8)}, "no JSON object of token ids"),
        ({"texts": np.frombuffer(b'{"a": "b"}', np.uint8)}, "no JSON object of token ids"),
        ({"texts": np.frombuffer(b'{"1": 2}', np.uint8)}, "no JSON object of token ids"),
        ({"texts": np.frombuffer(b'{"1": "' + b"x" * 99 + b'"}', np.uint8)}, "at most 64 characters"),
        ({"texts": np.zeros((1, 1), np.uint8)}, "its texts are uint8 [1, 1]"),
        ({"texts": np.zeros((), np.uint8)}, "its texts are uint8 []"),
    ],
)
def test_wrong_arrays(arrays: dict[str, Any], line: str, tmp_path: Path) -> None:
    assert line in refused(forged(tmp_path / "t.safetensors", arrays=arrays))


@pytest.mark.parametrize("K", [2, 12])
def test_an_expert_twice_at_any_two_places(K: int, tmp_path: Path) -> None:
    trace = made(K=K, E=20)
    for one in range(K):
        for other in range(one):
            experts = trace.experts.copy()
            experts[0, 3, one] = experts[0, 3, other]
            with pytest.raises(ValueError, match="names one expert twice"):
                write_trace(tmp_path / "t.safetensors", replace(trace, experts=experts))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("metadata", "line"),
    [
        ({"format": None}, "not a trace that `moebench trace` wrote"),
        ({"format": "pt"}, "not a trace that `moebench trace` wrote"),
        ({"version": "2"}, "version 2; this moebench reads version 1"),
        ({"version": "\x1b[2J"}, "reads version 1"),
        ({"version": None}, "reads version 1"),
        ({"facts": None}, "not JSON"),
        ({"checksum": None}, "checksum"),
        ({"checksum": "0" * 64}, "checksum"),
    ],
)
def test_wrong_metadata(metadata: dict[str, Any], line: str, tmp_path: Path) -> None:
    assert line in refused(forged(tmp_path / "t.safetensors", metadata=metadata))


def test_other_files(tmp_path: Path, recorded: Recorded) -> None:
    assert "no such file" in refused(tmp_path / "none.safetensors")
    assert "not a regular file" in refused(tmp_path)
    weights = next(iter(sorted(recorded.model.glob("*.safetensors"))))
    assert "not a trace that" in refused(weights)
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(recorded.file), plain)
    assert "not a trace that" in refused(plain)


def test_huge_declared_sizes_are_refused_by_the_header(tmp_path: Path) -> None:
    """A small file that says it holds terabytes: nothing is allotted for them."""
    path = tmp_path / "t.safetensors"
    for shape, end in (([2**40], 2**40), ([2**62, 4], 2**64 - 1), ([5], 20)):
        header = json.dumps({"tokens": {"dtype": "U8", "shape": shape, "data_offsets": [0, end]}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 5)
        refused(path)
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    refused(path)


def test_too_large_a_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_trace(tmp_path / "t.safetensors", made())
    monkeypatch.setattr(trace_file, "MAX_BYTES", 100)
    assert "the most a trace may be" in refused(path)


def test_an_earlier_file_stays_when_the_new_one_is_wrong(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.safetensors", made())
    with pytest.raises(ValueError, match="not finite"):
        write_trace(path, replace(made(), weights=made().weights * np.float32(np.nan)))
    assert same(read_trace(path), made())


def test_printable_names() -> None:
    assert printable("a\x1b[31m\u202eb\n") == "a\ufffd[31m\ufffdb\ufffd"
    assert printable("") == "unnamed"
    assert len(printable("x" * 999)) == 200
