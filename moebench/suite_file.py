"""A suite file as written: TOML, its schema, and its faults. No torch.

Values of axes are checked when the suite is expanded; here stand the keys, the
types and what a file must have.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moebench.axes import AXES, shown
from moebench.catalogue.names import nearest

MAX_BYTES = 1 << 20
MAX_FAULTS = 50
MAX_KEY_PARTS = 50
KEY_PART = re.compile(r"""[\w-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'""")


class SuiteError(ValueError):
    """A suite that cannot be run; one line for each fault.

    Attributes:
        faults: `file: key: what was found, what is allowed`.
    """

    def __init__(self, faults: Iterable[str]) -> None:
        every = list(faults)
        kept = every[:MAX_FAULTS]
        self.faults = kept + (["... and more"] if len(every) > len(kept) else [])
        super().__init__("\n".join(self.faults))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Budget(_Strict):
    """How long measuring may take.

    Attributes:
        seconds_per_point: cap on the sampling of one point.
        seconds_total: cap on the whole run; null: none. What it cuts off is `skipped`.
        min_samples: samples a point gets at least (fewer where one call takes over 0.5 s).
        deadline_seconds: a message to the worker that is not answered by then is a `timeout`.
        energy_window_seconds, energy_trials, energy_cool_down_seconds: length and number of the energy windows of an
            arm, and the rest before each.
    """

    seconds_per_point: float = Field(default=2.0, gt=0, le=86_400)
    seconds_total: float | None = Field(default=None, gt=0)
    min_samples: int = Field(default=10, ge=1, le=100_000)
    deadline_seconds: float = Field(default=120.0, gt=0, le=86_400)
    energy_window_seconds: float = Field(default=5.0, ge=0.1, le=3600)
    energy_trials: int = Field(default=3, ge=1, le=100)
    energy_cool_down_seconds: float = Field(default=5.0, ge=0, le=3600)


class Modes(_Strict):
    """Modes of the process that change numbers; each holds for the whole suite and stands in every row.

    Attributes:
        threads: torch's threads inside an operator; null: as many as PyTorch takes.
        cores: logical cores to stay on; null: all that the process may use.
        tf32: whether fp32 GEMMs may round their inputs to TF32.
        reduced_precision_reductions: whether fp16 and bf16 GEMMs may add up in their own precision (PyTorch's default).
    """

    threads: int | None = Field(default=None, ge=1, le=4096)
    cores: list[int] | None = Field(default=None, min_length=1, max_length=4096)
    tf32: bool = False
    reduced_precision_reductions: bool = True


class SweepTable(_Strict):
    """One [[sweep]]: product of grid, zip rows and explicit rows."""

    device: Literal["cpu", "cuda"] | None = None
    where: str | None = None
    grid: dict[str, Any] = {}
    zip: dict[str, Any] = {}
    points: list[dict[str, Any]] = []


class SuiteFile(_Strict):
    """A whole suite file.

    Attributes:
        timer: of a GPU; "auto" is the best that a call allows (`moebench.measure.latency.TIMERS`).
        cache: "cold": calls rotate, so that none finds its data in the cache; "hot": every call is the same.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    question: str = Field(min_length=1, max_length=300)
    energy: bool = False
    timer: Literal["auto", "cuda_graph", "cuda_events", "cuda_profiler"] = "auto"
    cache: Literal["cold", "hot"] = "cold"
    seed: int = Field(default=0, ge=0, le=2**30)
    replicates: int = Field(default=1, ge=1, le=1000)
    budget: Budget = Budget()
    modes: Modes = Modes()
    defaults: dict[str, Any] = {}
    sweep: list[SweepTable] = Field(min_length=1, max_length=100)


def shipped() -> list[str]:
    """Names of the suites that come with moebench."""
    return sorted(entry.name.removesuffix(".toml") for entry in _folder().iterdir() if entry.name.endswith(".toml"))


def read_source(source: str) -> tuple[str, str]:
    """(file name for errors, text) of a shipped suite's name or a path to a .toml file.

    Raises:
        SuiteError: there is none, or it is not readable text of a sensible size.
    """
    if not is_path(source):
        names = shipped()
        if source not in names:
            hint = nearest(source, names)
            listed = ", ".join(names)
            raise SuiteError([f"unknown suite {shown(source)}{hint} (shipped: {listed}; or a path to a .toml file)"])
        return f"{source}.toml", (_folder() / f"{source}.toml").read_text(encoding="utf-8")
    return source, _read_text(Path(source))


def is_path(source: str) -> bool:
    """Whether it names a file rather than a shipped suite."""
    return source.endswith(".toml") or "/" in source or "\\" in source


def parse(file: str, text: str) -> SuiteFile:
    """Text as a SuiteFile.

    Raises:
        SuiteError: with every fault of keys and types.
    """
    if _has_endless_key(text):
        raise SuiteError([f"{file}: is not TOML: a key has more than {MAX_KEY_PARTS} parts"])
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        what = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise SuiteError([f"{file}: is not TOML: {what}"]) from None
    try:
        return SuiteFile.model_validate(table)
    except ValidationError as error:
        raise SuiteError(f"{file}: {_fault(detail)}" for detail in error.errors(include_url=False)) from None


def _folder() -> Any:
    return files("moebench_suites")


def _read_text(path: Path) -> str:
    try:
        if path.is_dir():
            raise SuiteError([f"{path}: is a folder; a suite is a .toml file"])
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, SuiteError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SuiteError([f"{shown(str(path))}: cannot be read: {reason}"]) from None
    if len(data) > MAX_BYTES:
        raise SuiteError([f"{path}: is larger than {MAX_BYTES} bytes, the most a suite file may have"])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SuiteError([f"{path}: is not UTF-8 text (byte {error.start})"]) from None


def _has_endless_key(text: str) -> bool:
    """Whether it holds something like a.a.a.a...: tomllib needs memory that grows with the square of its parts."""
    outline = KEY_PART.sub("k", text).translate({ord(" "): None, ord("\t"): None})
    return "k." * MAX_KEY_PARTS in outline


def _fault(detail: Any) -> str:
    key, parent = _key(detail["loc"]), detail["loc"][:-1]
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key{_hint(str(detail['loc'][-1]), parent)}"
    if detail["type"] == "missing":
        return f"{key}: is missing"
    return f"{key}: found {shown(detail['input'])}; {detail['msg'][:1].lower()}{detail['msg'][1:]}"


def _key(loc: tuple[int | str, ...]) -> str:
    """`sweep 2: grid.tokens` for ("sweep", 1, "grid", "tokens"); keys that are not plain are quoted."""
    words = [str(part) if isinstance(part, int) or re.fullmatch(r"[\w-]{1,60}", part) else shown(part) for part in loc]
    if len(words) > 1 and words[0] == "sweep" and isinstance(loc[1], int):
        return ": ".join([f"sweep {loc[1] + 1}", ".".join(words[2:])]).removesuffix(": ")
    return ".".join(words)


def _hint(key: str, parent: tuple[int | str, ...]) -> str:
    schema: type[BaseModel] = SuiteFile
    if parent:
        tables: dict[str, type[BaseModel]] = {"budget": Budget, "modes": Modes}
        schema = tables.get(str(parent[0]), SweepTable)
    allowed = list(schema.model_fields)
    home = " (an axis: it belongs in grid, zip, points or defaults)" if key in AXES else ""
    return f"{home or nearest(key, allowed)} (allowed: {', '.join(allowed)})"
