"""One [[sweep]] with its defaults and overrides, checked and brought to independent choices. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebench.axes import AXES, Value, axis, shown, typed
from moebench.catalogue.routers import is_file
from moebench.point import DROPLESS
from moebench.shape import NEEDED_BY_PLAIN, PLAIN
from moebench.suite_file import MAX_FAULTS, SweepTable
from moebench.traffic import parse_traffic
from moebench.where import Clause, parse_where

OVERRIDE = "--set"
OF_FILES = ("provider", "router")  # axes whose value may be a Python file's function
CAPACITY_AXES = ("capacity_factor", "capacity_rounding")

Values = Mapping[str, tuple[Value, ...]]


@dataclass(frozen=True)
class Choice:
    """Rows of which a point takes one: a grid axis has one axis a row, zip and points have several.

    Attributes:
        key: where it stands, for errors.
        axes: the axes it sets.
        rows: axis -> value, for all of them.
    """

    key: str
    axes: frozenset[str]
    rows: tuple[dict[str, Value], ...]


@dataclass(frozen=True)
class Sweep:
    """The product of its choices, less what `where` and the layer's own rules leave out.

    Attributes:
        label: file and number, for errors.
        device: "cpu", "cuda" or None for both.
    """

    label: str
    device: str | None
    where: str | None
    clauses: tuple[Clause, ...]
    choices: tuple[Choice, ...]

    def values(self, name: str) -> set[Value]:
        """Every value an axis takes in it."""
        return {row[name] for choice in self.choices if name in choice.axes for row in choice.rows}


def files_named(sweeps: Iterable[Sweep]) -> dict[str, str]:
    """Router files and traces that the sweeps name -> digest of what they hold, which is part of the suite."""
    names = {str(value) for sweep in sweeps for axis in ("router", "traffic") for value in sweep.values(axis)}
    paths = {name.rpartition(":")[0] for name in names if is_file(name)}
    paths |= {str(path) for name in names if name.startswith("trace:") and (path := parse_traffic(name).path)}
    return {path: hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest() for path in sorted(paths)}


def read_values(key: str, given: Mapping[str, Any], faults: list[str]) -> dict[str, tuple[Value, ...]]:
    """Axis -> values of a table of lists or single values, each value once."""
    values = {name: _axis_values(f"{key}.{name}", name, given[name], faults) for name in _known(key, given, faults)}
    faults += [f"{key}.{name}: {shown(value)} is given twice" for name in values for value in _repeated(values[name])]
    return values


def read_overrides(overrides: Mapping[str, Sequence[str]], faults: list[str]) -> dict[str, tuple[Value, ...]]:
    """Axis -> values of `--set axis=value,value`."""
    values = {}
    for name in _known(OVERRIDE, overrides, faults):
        texts = overrides[name]
        listed = [typed(name, text) for text in texts]
        key = override_key(name, texts)
        values[name] = _axis_values(key, name, listed, faults)
        faults += [f"{key}: {shown(value)} is given twice" for value in _repeated(values[name])]
    if "model" in values and any(name in values for name in PLAIN):
        faults.append(f"{OVERRIDE} model: a model and {' or '.join(PLAIN)} cannot both be given")
    return values


def override_key(name: str, texts: Iterable[object]) -> str:
    """How an error names an override."""
    joined = ",".join(str(text) for text in texts)
    return f"{OVERRIDE} {name}={joined}" if joined.isprintable() and len(joined) < 60 else f"{OVERRIDE} {name}"


def read_sweep(
    label: str,
    table: SweepTable,
    defaults: Values,
    seed: int,
    overrides: Values,
    joining: Sequence[str],
    faults: list[str],
) -> Sweep | None:
    """The sweep, or None with what is wrong added to `faults`; the providers in `joining` race wherever others do."""
    before = len(faults)
    written = _written(label, table, faults)
    clauses = _where(label, table.where, faults)
    if len(faults) > before:
        return None
    choices = _override(written, overrides)
    taken = _axes(choices)
    rest: dict[str, tuple[Value, ...]] = {"seed": (seed,)} | _not_displaced(defaults, taken)
    choices += [_grid(f"{label}: defaults.{name}", name, values) for name, values in rest.items() if name not in taken]
    faults += [f"{label}: {fault}" for fault in _incomplete(_axes(choices))]
    faults += [f"{label}: {fault}" for fault in _capacities(choices)]
    choices = [_joined(choice, joining) for choice in choices]
    return None if len(faults) > before else Sweep(label, table.device, table.where, clauses, tuple(choices))


def _capacities(choices: Sequence[Choice]) -> list[str]:
    """Factors that no rounding of the sweep takes."""
    values = {name: {row[name] for each in choices if name in each.axes for row in each.rows} for name in CAPACITY_AXES}
    if "tutel" in values["capacity_rounding"]:
        return []
    low = [factor for factor in values["capacity_factor"] if isinstance(factor, int | float) and factor <= 0]
    return [f"capacity_factor: found {factor:g}; allowed: numbers > 0, or {DROPLESS!r}" for factor in sorted(low)]


def _written(label: str, table: SweepTable, faults: list[str]) -> list[Choice]:
    """The choices of the file itself: explicit rows, zip, grid."""
    points = _rows(f"{label}: points", table.points, faults)
    zipped = _zip(f"{label}: zip", table.zip, faults)
    grid = read_values(f"{label}: grid", table.grid, faults)
    choices = [choice for choice in (points, zipped) if choice]
    choices += [_grid(f"{label}: grid.{name}", name, values) for name, values in grid.items() if values]
    seen: set[str] = set()
    for choice in choices:
        faults += [f"{choice.key}: {name} is given twice" for name in sorted(choice.axes & seen)]
        seen |= choice.axes
    return choices


def _grid(key: str, name: str, values: tuple[Value, ...]) -> Choice:
    return Choice(key, frozenset((name,)), tuple({name: value} for value in values))


def _zip(key: str, given: Mapping[str, Any], faults: list[str]) -> Choice | None:
    names = _known(key, given, faults)
    lengths = {name: len(given[name]) if isinstance(given[name], list) else 1 for name in names}
    columns = {name: _axis_values(f"{key}.{name}", name, given[name], faults) for name in names}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        faults.append(f"{key}: found lists of unequal length ({listed}); all must be equally long")
        return None
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=False)]
    return _choice(key, rows, faults) if rows else None


def _rows(key: str, given: Sequence[Mapping[str, Any]], faults: list[str]) -> Choice | None:
    if any(row.keys() != given[0].keys() for row in given):
        faults.append(f"{key}: the rows must all name the same axes as the first ({', '.join(given[0])})")
        return None
    rows = []
    for number, row in enumerate(given, 1):
        where = f"{key} row {number}"
        rows.append({name: _one(f"{where}.{name}", name, row[name], faults) for name in _known(where, row, faults)})
    if not all(rows):
        faults.append(f"{key}: a row is empty")
        return None
    whole = [{name: value for name, value in row.items() if value is not None} for row in rows]
    return _choice(key, whole, faults) if rows and whole == rows else None


def _choice(key: str, rows: list[dict[str, Value]], faults: list[str]) -> Choice:
    if len(_distinct(rows)) < len(rows):
        faults.append(f"{key}: a row stands twice")
    return Choice(key, frozenset(rows[0]), tuple(rows))


def _distinct(rows: Iterable[dict[str, Value]]) -> tuple[dict[str, Value], ...]:
    return tuple({tuple(row.items()): row for row in rows}.values())


def _known(key: str, given: Mapping[str, Any], faults: list[str]) -> list[str]:
    """The names that are axes; the others are faults."""
    known = []
    for name in given:
        try:
            axis(name)
        except ValueError as error:
            faults.append(f"{key}: {error}")
        else:
            known.append(name)
    return known


def _axis_values(key: str, name: str, given: Any, faults: list[str]) -> tuple[Value, ...]:
    listed = given if isinstance(given, list) else [given]
    if not listed:
        faults.append(f"{key}: is empty; at least one value is needed")
    read = [_one(key, name, value, faults) for value in listed]
    return tuple(value for value in read if value is not None)


def _repeated(values: Iterable[Value]) -> list[Value]:
    seen: set[Value] = set()
    return [value for value in values if value in seen or seen.add(value)]  # type: ignore[func-returns-value]


def _one(key: str, name: str, value: Any, faults: list[str]) -> Value | None:
    """The value as its axis reads it; None where that is a fault, or there are more faults than are shown."""
    if len(faults) > MAX_FAULTS:
        return None
    if isinstance(value, str) and is_file(value) and name in OF_FILES and not key.startswith(OVERRIDE):
        faults.append(f"{key}: found {shown(value)}; a Python file is run only where the command line names it")
        return None
    try:
        return AXES[name].read(value)
    except ValueError as error:
        faults.append(f"{key}: {error}")
        return None


def _where(label: str, text: str | None, faults: list[str]) -> tuple[Clause, ...]:
    try:
        return tuple(parse_where(text)) if text is not None else ()
    except ValueError as error:
        faults.append(f"{label}: where: {error}")
        return ()


def _override(choices: list[Choice], overrides: Values) -> list[Choice]:
    """Overridden axes leave their places, and stand as grid axes of their own."""
    gone = set(overrides) | _displaced(overrides)
    kept = []
    for choice in choices:
        rows = _distinct({name: value for name, value in row.items() if name not in gone} for row in choice.rows)
        if rows[0]:
            kept.append(Choice(choice.key, choice.axes - gone, rows))
    return kept + [_grid(override_key(name, values), name, values) for name, values in overrides.items()]


def _joined(choice: Choice, providers: Sequence[str]) -> Choice:
    """Further providers, for whatever else the rows with a provider say."""
    if "provider" not in choice.axes:
        return choice
    known = {row["provider"] for row in choice.rows}
    more = [{**row, "provider": name} for name in providers if name not in known for row in choice.rows]
    return Choice(choice.key, choice.axes, choice.rows + _distinct(more))


def _displaced(names: Iterable[str]) -> set[str]:
    """A model displaces a plain shape, a plain shape a model."""
    named = set(names)
    return (set(PLAIN) if "model" in named else set()) | ({"model"} if named.intersection(PLAIN) else set())


def _not_displaced(defaults: Values, taken: set[str]) -> dict[str, tuple[Value, ...]]:
    gone = _displaced(taken)
    return {name: values for name, values in defaults.items() if name not in gone}


def _incomplete(axes: set[str]) -> list[str]:
    """What a sweep lacks, or has in two ways."""
    plain = axes.intersection(PLAIN)
    if "model" in axes and plain:
        return [f"model and {' or '.join(sorted(plain))} cannot both be given"]
    needed = ["tokens", "provider"] + ([] if "model" in axes else list(NEEDED_BY_PLAIN) if plain else ["model"])
    home = "needed in grid, zip, points or [defaults]"
    hint = f"; or a plain shape: {', '.join(NEEDED_BY_PLAIN)}"
    return [f"{name}: is missing; {home}{hint if name == 'model' else ''}" for name in needed if name not in axes]


def _axes(choices: Iterable[Choice]) -> set[str]:
    return {name for choice in choices for name in choice.axes}
