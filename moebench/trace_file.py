"""Trace files: which experts each token of a real model run went to, and with which weights. No torch.

A safetensors file of six arrays, L layers, T tokens, K picks a token, E experts:

experts    [L, T, K]  uint8 where E <= 256, uint16 where E <= 65536, else int32; the picks in the model's own order
weights    [L, T, K]  float32 or float16, as the experts got them: scaled and normalised by the model's own router
tokens     [T]        int32, token ids
positions  [T]        int32, place in the sequence that was run
domains    [T]        uint16, index into the names of the domains (one domain a text)
texts      [bytes]    uint8, a JSON object: token id -> its text, for tokens whose text is known

The rest is metadata: format, version, `facts` (a JSON object, see `Facts`) and a checksum over facts and arrays, so
that a file damaged in any place is refused. Nothing in it is code; names in it are single printable lines.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FORMAT = "moebench-trace"
VERSION = "1"
NAMES = ("experts", "weights", "tokens", "positions", "domains", "texts")
MAX_BYTES, MAX_TEXTS_BYTES = 64 * 2**30, 64 * 2**20
MAX_EXPERTS, MAX_TOP_K, MAX_LAYERS, MAX_LAYER, MAX_DOMAINS = 2**20, 1024, 4096, 10**6, 2**16
MAX_NAME = 200
MAX_TEXT = 64
WEIGHTS_ON = ("output", "input")
_DTYPES = {"U8": "uint8", "U16": "uint16", "I32": "int32", "F16": "float16", "F32": "float32"}

Array = NDArray[Any]


@dataclass(frozen=True)
class Facts:
    """What a trace says of itself.

    Attributes:
        model: name of the checkpoint's folder.
        model_type: the family, as in config.json.
        routed_experts: E.
        top_k: K.
        layers: the model's own number of each recorded layer, rising; dense layers have none.
        domains: names of the texts.
        tokenizer: how text became tokens.
        weights_on: "output", or "input" where the weight multiplies what the expert reads (Llama 4).
        dtype: the model's while it ran.
        made_by: moebench's version.
    """

    model: str
    model_type: str
    routed_experts: int
    top_k: int
    layers: tuple[int, ...]
    domains: tuple[str, ...]
    tokenizer: str
    weights_on: str
    dtype: str
    made_by: str


@dataclass(frozen=True, eq=False)
class Trace:
    """A trace in memory; arrays as in the file."""

    facts: Facts
    experts: Array
    weights: Array
    tokens: Array
    positions: Array
    domains: Array
    texts: Mapping[int, str] = field(default_factory=dict)


def expert_dtype(routed_experts: int) -> str:
    """The smallest of the three dtypes that holds ids below E."""
    return "uint8" if routed_experts <= 2**8 else "uint16" if routed_experts <= 2**16 else "int32"


def printable(text: str, most: int = MAX_NAME) -> str:
    """A name as a trace may hold it: one printable line, no control or direction codes."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:most]).strip() or "unnamed"


def write_trace(path: Path, trace: Trace) -> Path:
    """Write a trace, whole or not at all; an earlier file is replaced.

    Raises:
        ValueError: the trace is not one that `read_trace` would take, in one line.
    """
    facts = json.dumps(asdict(trace.facts))
    arrays = _arrays(trace)
    _check_facts(asdict(trace.facts), path)
    _check_layout(trace.facts, {name: (a.dtype.name, a.shape) for name, a in arrays.items()}, path)
    _check_values(trace, path)
    _texts(arrays["texts"], path)
    metadata = {"format": FORMAT, "version": VERSION, "facts": facts, "checksum": _checksum(facts, arrays)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(arrays, partial, metadata=metadata)
        os.replace(partial, path)
    except SafetensorError as error:
        raise ValueError(f"{path}: cannot be written: {one_line(error)}") from None
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_facts(path: Path) -> Facts:
    """Only what the file says of itself; its arrays are neither read nor checked. ValueError as of `read_trace`."""
    with _opened(path) as file:
        return _facts(file.metadata(), path)[0]


def read_trace(path: Path) -> Trace:
    """A trace, with everything about it checked.

    Raises:
        ValueError: missing, damaged, cut short, too large, of another version, ids out of range or twice in a token,
            weights that are not finite: one line that names the file and what is allowed.
    """
    with _opened(path) as file:
        metadata = file.metadata()
        facts, text = _facts(metadata, path)
        if set(file.keys()) != set(NAMES):
            raise ValueError(f"{path}: a trace holds the arrays {', '.join(NAMES)} and no others")
        _check_layout(facts, {name: _declared(file.get_slice(name)) for name in NAMES}, path)
        arrays = {name: file.get_tensor(name) for name in NAMES}
    if _checksum(text, arrays) != metadata.get("checksum"):
        raise ValueError(f"{path}: damaged: its checksum does not fit its contents; record it again")
    texts = _texts(arrays.pop("texts"), path)
    trace = Trace(facts, texts=texts, **arrays)
    _check_values(trace, path)
    return trace


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, with one clear error for each way it cannot be read."""
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file; a trace is a file that `moebench trace` wrote")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES // 2**30} GiB, the most a trace may be")
    try:
        file: Any = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a trace, or damaged: {one_line(error)}") from None
    with file:
        yield file


def _facts(metadata: Mapping[str, str] | None, path: Path) -> tuple[Facts, str]:
    if not metadata or metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: not a trace that `moebench trace` wrote")
    if metadata.get("version") != VERSION:
        found = printable(metadata.get("version", ""), 20)
        raise ValueError(f"{path}: a trace of version {found}; this moebench reads version {VERSION}")
    try:
        found = json.loads(metadata.get("facts", ""))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: damaged: its facts are not JSON") from None
    checked = _check_facts(found, path)
    return Facts(**checked), metadata["facts"]


def _check_facts(found: Any, path: Path) -> dict[str, Any]:
    if not isinstance(found, dict) or set(found) != {each.name for each in fields(Facts)}:
        raise ValueError(f"{path}: its facts are not those of a trace")

    def need(name: str, right: bool, allowed: str) -> None:
        if not right:
            raise ValueError(f"{path}: its {name} is wrong (allowed: {allowed})")

    name = f"one printable line of 1 to {MAX_NAME} characters"
    for key in ("model", "model_type", "tokenizer", "dtype", "made_by"):
        need(key, _is_name(found[key]), name)
    need("weights_on", found["weights_on"] in WEIGHTS_ON, " or ".join(WEIGHTS_ON))
    E, layers, domains = found["routed_experts"], found["layers"], found["domains"]
    need("routed_experts", _is_whole(E, 1, MAX_EXPERTS), f"whole numbers from 1 to {MAX_EXPERTS}")
    most = min(E, MAX_TOP_K)
    need("top_k", _is_whole(found["top_k"], 1, most), f"whole numbers from 1 to {most}")
    right = isinstance(layers, list | tuple) and 1 <= len(layers) <= MAX_LAYERS
    right = right and all(_is_whole(layer, 0, MAX_LAYER) for layer in layers) and list(layers) == sorted(set(layers))
    need("layers", right, f"1 to {MAX_LAYERS} rising whole numbers from 0 to {MAX_LAYER}")
    right = isinstance(domains, list | tuple) and 1 <= len(domains) <= MAX_DOMAINS
    right = right and all(_is_name(each) for each in domains) and len(set(domains)) == len(domains)
    need("domains", right, f"1 to {MAX_DOMAINS} different names, each {name}")
    return {**found, "layers": tuple(layers), "domains": tuple(domains)}


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= MAX_NAME and value.isprintable()


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _declared(array: Any) -> tuple[str, tuple[int, ...]]:
    code = array.get_dtype()
    return _DTYPES.get(code, code), tuple(array.get_shape())


def _check_layout(facts: Facts, found: Mapping[str, tuple[str, tuple[int, ...]]], path: Path) -> None:
    shape = found["tokens"][1]
    if len(shape) != 1 or not 1 <= shape[0] < 2**31:
        raise ValueError(f"{path}: its tokens are no list of 1 to {2**31 - 1}")
    picks = (len(facts.layers), shape[0], facts.top_k)
    floats = found["weights"][0] if found["weights"][0] in ("float16", "float32") else "float32 or float16"
    expected = {
        "experts": (expert_dtype(facts.routed_experts), picks),
        "weights": (floats, picks),
        "tokens": ("int32", shape),
        "positions": ("int32", shape),
        "domains": ("uint16", shape),
        "texts": ("uint8", (*found["texts"][1], 0)[:1]),
    }
    for name, (dtype, size) in expected.items():
        if found[name] != (dtype, size):
            declared, shape = found[name]
            raise ValueError(f"{path}: its {name} are {declared} {list(shape)}; allowed: {dtype} {list(size)}")
    if found["texts"][1][0] > MAX_TEXTS_BYTES:
        raise ValueError(f"{path}: its texts are longer than {MAX_TEXTS_BYTES} bytes")


def _check_values(trace: Trace, path: Path) -> None:
    facts = trace.facts
    for name in ("tokens", "positions"):
        if getattr(trace, name).min() < 0:
            raise ValueError(f"{path}: its {name} are wrong (allowed: whole numbers from 0)")
    if trace.domains.max() >= len(facts.domains):
        raise ValueError(f"{path}: a token is of domain {trace.domains.max()} (allowed: 0 to {len(facts.domains) - 1})")
    for layer, ids, weights in zip(facts.layers, trace.experts, trace.weights, strict=True):
        where = f"{path}: layer {layer}:"
        if ids.max() >= facts.routed_experts or ids.min() < 0:
            raise ValueError(f"{where} expert ids outside 0 to {facts.routed_experts - 1}")
        if any((one == other).any() for one, other in _pairs(ids)):
            raise ValueError(f"{where} a token names one expert twice; its experts have to differ")
        if not np.isfinite(weights).all():
            raise ValueError(f"{where} weights that are not finite; only finite ones are allowed")


def _pairs(ids: Array) -> Iterator[tuple[Array, Array]]:
    """Columns that must differ: sorting first leaves only neighbours, pairs of a few columns are quicker."""
    K = ids.shape[1]
    if K > 8:
        ids = np.sort(ids, axis=1)
        return ((ids[:, k], ids[:, k + 1]) for k in range(K - 1))
    columns = np.ascontiguousarray(ids.T)
    return ((columns[i], columns[j]) for i in range(K) for j in range(i))


def _arrays(trace: Trace) -> dict[str, Array]:
    text = json.dumps({str(token): text for token, text in trace.texts.items()}).encode()
    arrays = {name: np.ascontiguousarray(getattr(trace, name)) for name in NAMES[:-1]}
    return arrays | {"texts": np.frombuffer(text, dtype=np.uint8)}


def _texts(raw: Array, path: Path) -> dict[int, str]:
    wrong = ValueError(f"{path}: its texts are no JSON object of token ids and texts of at most {MAX_TEXT} characters")
    try:
        found = json.loads(raw.tobytes())
    except (ValueError, RecursionError):
        raise wrong from None
    if not isinstance(found, dict) or not all(_is_text(*each) for each in found.items()):
        raise wrong
    return {int(token): text for token, text in found.items()}


def _is_text(token: str, text: Any) -> bool:
    return bool(re.fullmatch(r"[0-9]{1,10}", token)) and isinstance(text, str) and len(text) <= MAX_TEXT


def _checksum(facts: str, arrays: Mapping[str, Array]) -> str:
    digest = hashlib.sha256(facts.encode())
    for name in NAMES:
        digest.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def one_line(error: BaseException) -> str:
    """An error of a library as part of a line."""
    return printable(" ".join(str(error).split()))
