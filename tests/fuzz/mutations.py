"""Ways to spoil a file: its bytes, its words, or the structure of what it holds."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from typing import Any

WORDS = (
    b"", b"[", b"]", b"{", b"}", b'"', b"'", b'"""', b"=", b",", b":", b"\n", b"\r\n", b"\\", b"#", b"\x00",
    b"\xff\xfe", b"0", b"-1", b"1e999", b"-0.0", b"nan", b"NaN", b"inf", b"-Infinity", b"null", b"true",
    b"9" * 400, b"0x10", b"1_0", b"1979-05-27T07:32:00Z", b"[[sweep]]", b"[sweep.grid]", b"where = '",
    b" * 9 ** 9 ** 9", b" or ", b"not ", b"**",
    "é".encode(), "\u2028".encode(), "\U0001f600".encode(), b"\xef\xbb\xbf", b"\\ud800", b"[" * 3000, b"(" * 300,
    b"-" * 300, b"a." * 60, b"zipf:", b"trace:/dev/zero", b"trace:", b"active:0.5@", b".py:f", b"experts", b"[red]",
)  # fmt: skip
ODD = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, -(2**70), 10**30, 0.0, -0.0, 0.5, 1e-300, 1e300, float("inf"),
    float("-inf"), float("nan"), "", " ", "x", "0", "nan", "\x00", "\ud800", "\u2028", "é" * 50, "x" * 5000,
    "[red]x[/red]", "<script>", "a\nb", "trace:/dev/zero", "zipf:1e400", "active:0@1", "../x.py:f", "dropless",
    "softmax_topk", [], {},
    [[]], [{}], {"": ""}, {"a": {"a": {"a": 1}}}, list(range(50)), ["torch-loop"] * 3, [None], [float("nan")],
)  # fmt: skip


def spoiled_bytes(data: bytes, chance: random.Random, pool: tuple[bytes, ...] = WORDS) -> bytes:
    """Between one and four cuts, insertions, repetitions, exchanges or flips."""
    for _ in range(chance.randint(1, 4)):
        data = chance.choice(BYTE_WAYS)(data, chance, pool)
    return data


def spoiled(value: Any, chance: random.Random) -> Any:
    """A copy of plain data with between one and three places replaced, removed, exchanged, wrapped or renamed."""
    value = copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        holder, key = chance.choice(_places(value)) if _places(value) else (None, None)
        if holder is None or chance.random() < 0.01:
            return chance.choice(ODD)
        chance.choice(PLACE_WAYS)(holder, key, chance)
    return value


def toml(value: Any) -> str:
    """Plain data as TOML, tables inline; what TOML cannot hold (null) is written as a word that is not TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(str(key))} = {toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return _text(value) if isinstance(value, str) else str(value)


def toml_file(table: Any) -> str:
    """A TOML file of plain data, a line for each key."""
    if not isinstance(table, dict):
        return f"x = {toml(table)}\n"
    return "".join(f"{_text(str(key))} = {toml(value)}\n" for key, value in table.items())


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (holder, key) in plain data."""
    found, waiting = [], [value]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        found += [(holder, key) for key in keys]
        waiting += [holder[key] for key in keys]
    return found


def _span(data: bytes, chance: random.Random, longest: int = 40) -> tuple[int, int]:
    start = chance.randint(0, len(data))
    return start, min(len(data), start + chance.randint(0, longest))


def _cut(data: bytes, chance: random.Random, pool: tuple[bytes, ...]) -> bytes:
    start, end = _span(data, chance)
    return data[:start] + data[end:]


def _insert(data: bytes, chance: random.Random, pool: tuple[bytes, ...]) -> bytes:
    start, _ = _span(data, chance)
    return data[:start] + chance.choice(pool) + data[start:]


def _replace(data: bytes, chance: random.Random, pool: tuple[bytes, ...]) -> bytes:
    words = list(re.finditer(rb"[\w.+-]+|\"[^\"\n]*\"", data))
    if not words:
        return data + chance.choice(pool)
    word = chance.choice(words)
    return data[: word.start()] + chance.choice([*pool, chance.choice(words).group()]) + data[word.end() :]


def _repeat(data: bytes, chance: random.Random, pool: tuple[bytes, ...]) -> bytes:
    start, end = _span(data, chance, 80)
    return data[:end] + data[start:end] * chance.choice((1, 1, 2, 50, 500)) + data[end:]


def _end(data: bytes, chance: random.Random, pool: tuple[bytes, ...]) -> bytes:
    return data[: chance.randint(0, len(data))]


def _flip(data: bytes, chance: random.Random, pool: tuple[bytes, ...]) -> bytes:
    if not data:
        return data
    place = chance.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]


def _exchange_lines(data: bytes, chance: random.Random, pool: tuple[bytes, ...]) -> bytes:
    lines = data.split(b"\n")
    one, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    lines[one], lines[other] = lines[other], lines[one]
    return b"\n".join(lines)


BYTE_WAYS: tuple[Callable[[bytes, random.Random, tuple[bytes, ...]], bytes], ...] = (
    _cut, _insert, _replace, _replace, _replace, _repeat, _end, _flip, _exchange_lines,
)  # fmt: skip


def _odd(holder: Any, key: Any, chance: random.Random) -> None:
    holder[key] = copy.deepcopy(chance.choice(ODD))


def _near(holder: Any, key: Any, chance: random.Random) -> None:
    """A value of the same type, a little or far off."""
    value = holder[key]
    if isinstance(value, bool):
        holder[key] = not value
    elif isinstance(value, int):
        holder[key] = value + chance.choice((-value, -1, 1, value, 10**6, 10**12, -2 * value))
    elif isinstance(value, float):
        holder[key] = value * chance.choice((0.0, -1.0, 1e-12, 1e12, 1e300))
    elif isinstance(value, str):
        holder[key] = spoiled_bytes(value.encode(errors="replace"), chance).decode(errors="replace")
    else:
        _odd(holder, key, chance)


def _remove(holder: Any, key: Any, chance: random.Random) -> None:
    del holder[key]


def _wrap(holder: Any, key: Any, chance: random.Random) -> None:
    holder[key] = chance.choice(([holder[key]], {"x": holder[key]}, [holder[key]] * chance.choice((2, 200))))


def _rename(holder: Any, key: Any, chance: random.Random) -> None:
    if isinstance(holder, dict):
        holder[chance.choice((f"{key}s", key[:-1], key.upper(), "x", "model", "a.b", "é"))] = holder.pop(key)


def _exchange(holder: Any, key: Any, chance: random.Random) -> None:
    keys = list(holder) if isinstance(holder, dict) else range(len(holder))
    other = chance.choice(keys)
    holder[key], holder[other] = holder[other], holder[key]


def _deepen(holder: Any, key: Any, chance: random.Random) -> None:
    for _ in range(chance.choice((3, 30, 90))):
        holder[key] = [holder[key]]


PLACE_WAYS = (_odd, _odd, _near, _near, _near, _remove, _wrap, _rename, _exchange, _deepen)
