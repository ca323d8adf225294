"""Scrub: private text out of a run before others read it. Numbers are never touched.

Absolute paths keep their last part, or what lies in an installed package (`torch/nn/functional.py`); paths of the
system (`/sys`, `/proc`, `/usr`, ...) stay. Names of users, as home folders tell them, and of the host, e-mail
addresses, and values of environment variables that say nothing of the method become USER, HOST and `...`.
"""

from __future__ import annotations

import getpass
import platform
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from moebench.record import Manifest

Clean = Callable[[str], str]
MOST_PASSES = 8  # what is left of a path can look like one again
IDENTITY = ("provider", "model", "router", "traffic", "suite", "device")  # columns by which rows are told apart

_END = r"""\s'"`<>|;,:()\[\]{}="""
_PATH = re.compile(
    rf"""(?P<quote>['"])(?P<quoted>(?:file://)?(?:~[\w.-]*)?/[^'"\n]*\s[^'"\n]*)(?P=quote)"""  # with spaces in it
    rf"""|(?<![\w/.~\\-])(?:file://)?(?:~[\w.-]*)?/(?!/)[^{_END}]+"""
    rf"""|(?<![\w/.])(?:\.\./)+[^{_END}]+"""
    rf"""|(?<![\w/.~])~[\w.-]+(?![\w/])"""
)
_SYSTEM = re.compile(r"/(sys|proc|dev(?!/shm)|usr|etc|lib|lib64|bin|sbin)(/|$)")
_INSTALLED = re.compile(r".*/(?:site|dist)-packages/")
_KERNELS = re.compile(r".*/(?=moebench_kernels/\w+\.py)")
_HOME = re.compile(r"/(?:(?:home|Users)/[^/]+|root)/?$|~[\w.-]*/?$")
_USER = re.compile(r"/(?:home|Users)/([\w.-]+)|(?<![\w/])~([\w.-]+)/|torchinductor_([A-Za-z0-9.-]+)")
_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b")
_METHOD = (
    "CUDA|CUBLAS|CUDNN|CUTLASS|NVIDIA|NCCL|HIP|ROCM|TORCH|PYTORCH|TORCHINDUCTOR|TRITON|OMP|MKL|KMP|GOMP|OPENBLAS|"
    "MOEBENCH|PYTHON"
)
_ALWAYS = "HOME|USER|LOGNAME|HOSTNAME|HOST|PWD|OLDPWD|PATH|SHELL|MAIL|TMP|TEMP|TMPDIR"
_VARIABLE = re.compile(rf"\b(?!(?:{_METHOD})_)((?:{_ALWAYS})|[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)=(?:'[^']*'|\"[^\"]*\"|\S+)")
# Facts about a machine that say nothing of what it can do.
_PRIVATE_KEY = re.compile(
    r"host(_?name)?|node(_?name)?|fqdn|user(_?name)?|login|home|cwd|env(iron(ment)?)?|argv|ip(_?address)?|mac|"
    r".*(uuid|serial).*",
    re.IGNORECASE,
)
# Names that say nothing of anybody.
_NOBODY = {"root", "user", "users", "home", "admin", "runner", "ubuntu", "debian", "test", "host", "localhost", "local"}


def scrubbed(manifest: Manifest, table: pa.Table) -> tuple[Manifest, pa.Table]:
    """A run without private text; `published` of the manifest names the fields that were changed.

    Args:
        table: of `moebench.analyse.load.arrow_schema`.
    """
    clean = _cleaner(manifest, table)
    before = manifest.model_dump(exclude={"published"})
    after = {name: _cleaned(value, clean) for name, value in before.items()}
    after["machine"] = {key: value for key, value in after["machine"].items() if not _PRIVATE_KEY.fullmatch(key)}
    cleaned_table, columns = _cleaned_table(table, clean)
    changed = [name for name in before if before[name] != after[name]] + [f"column {name}" for name in columns]
    earlier = manifest.published or []
    return Manifest(**after, published=list(dict.fromkeys([*earlier, *changed]))), cleaned_table


def _cleaner(manifest: Manifest, table: pa.Table) -> Clean:
    """What cleans one text of this run, the same way wherever it stands."""
    identities = _identities(manifest, table)
    texts = [*_texts(manifest.model_dump()), *(text for name in _text_columns(table) for text in _values(table, name))]
    paths, people = _short_paths(identities), _people(texts, identities)

    def once(text: str) -> str:
        text = _VARIABLE.sub(r"\1=...", text)
        text = _PATH.sub(lambda found: _replaced(found, paths), text)
        text = _EMAIL.sub("USER@HOST", text)
        for name, stand_in in people.items():
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", stand_in, text)
        return text

    @cache
    def clean(text: str) -> str:
        for _ in range(MOST_PASSES):
            before, text = text, once(text)
            if text == before:
                break
        return text

    return clean


def _replaced(found: re.Match[str], paths: dict[str, str]) -> str:
    quote, path = found["quote"] or "", found["quoted"] or found[0]
    return f"{quote}{paths.get(path) or _last_parts(path)}{quote}"


def _last_parts(path: str) -> str:
    """Of an absolute path what says nothing about the machine."""
    path = path.removeprefix("file://")
    if re.fullmatch(r"/[^/]+", path) and not _HOME.match(path):
        return path  # `/s` of a rate, or a folder at the top, which says nothing
    for inside in (_INSTALLED, _KERNELS):
        if inside.match(path):
            return inside.sub("", path)
    if _SYSTEM.match(path):
        return path
    if _HOME.match(path):
        return "~"
    _, _, module = path.rpartition("/moebench/")
    if module.endswith(".py") and (Path(__file__).parents[1] / module).is_file():
        return f"moebench/{module}"
    return path.rstrip("/").rpartition("/")[2].lstrip("~") or "~"


def _short_paths(identities: Iterable[str]) -> dict[str, str]:
    """The paths that tell arms apart -> names that still do: `k.py`, then `2/k.py`."""
    known = dict.fromkeys(identities)
    taken = {part for text in known for part in re.split(r"[:@,]", text)}
    short: dict[str, str] = {}
    for path in dict.fromkeys(found["quoted"] or found[0] for text in known for found in _PATH.finditer(text)):
        name = _last_parts(path)
        names = [name, *(f"{number}/{name}" for number in range(2, len(known) + 3))]
        short[path] = next(name for name in names if name == path or name not in taken)
        taken.add(short[path])
    return short


def _people(texts: Iterable[str], identities: Iterable[str]) -> dict[str, str]:
    """Names of users and of this host -> what stands in; none that the run has a use for as a word."""
    words = {word.lower() for text in identities for word in re.findall(r"[A-Za-z0-9]+", _PATH.sub("", text))}
    users = {name for text in texts for found in _USER.finditer(text) for name in found.groups() if name}
    host = platform.node()
    names = {**dict.fromkeys([*users, _me()], "USER"), host: "HOST", host.partition(".")[0]: "HOST"}
    kept = {name: by for name, by in names.items() if len(name) >= 3 and name.lower() not in _NOBODY | words}
    return dict(sorted(kept.items(), key=lambda item: (-len(item[0]), item[0])))


def _me() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a number without a name, as in containers
        return ""


def _identities(manifest: Manifest, table: pa.Table) -> list[str]:
    own = [manifest.providers, manifest.joined, manifest.overrides, manifest.files, manifest.versions]
    return [*_texts(own), *(text for name in IDENTITY for text in _values(table, name))]


def _texts(value: Any) -> list[str]:
    """Every text in plain data, keys too."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, inner in value.items() for text in (str(key), *_texts(inner))]
    return [text for inner in value for text in _texts(inner)] if isinstance(value, (list, tuple)) else []


def _cleaned(value: Any, clean: Clean) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(str(key)): _cleaned(inner, clean) for key, inner in value.items()}
    return type(value)(_cleaned(inner, clean) for inner in value) if isinstance(value, (list, tuple)) else value


def _text_columns(table: pa.Table) -> list[str]:
    texts = (pa.string(), pa.list_(pa.string()))
    return [field.name for field in table.schema if field.type in texts]


def _values(table: pa.Table, name: str) -> list[str]:
    """Each text of a column once, in order."""
    column = table[name]
    column = pc.list_flatten(column) if pa.types.is_list(column.type) else column
    return [text for text in pc.unique(column).to_pylist() if text is not None]


def _cleaned_table(table: pa.Table, clean: Clean) -> tuple[pa.Table, list[str]]:
    """The table with clean texts, and the columns in which there was something to clean."""
    changed = []
    for name in _text_columns(table):
        new = {text: clean(text) for text in _values(table, name)}
        if any(text != cleaned for text, cleaned in new.items()):
            field = table.schema.field(name)
            values = [_cleaned(value, new.__getitem__) for value in table[name].to_pylist()]
            table = table.set_column(table.column_names.index(name), field, pa.array(values, field.type))
            changed.append(name)
    return table, changed
