"""The axes a suite sweeps: what each takes and how a value is read. No torch.

A value is read from TOML (already typed) or from text (`--set`), checked, and
brought to one spelling, so that two spellings of one value are one point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from moebench import providers
from moebench.catalogue.models import resolve_layer
from moebench.catalogue.names import nearest
from moebench.catalogue.routers import ROUTERS, is_file
from moebench.catalogue.spec import ACTIVATIONS, SHARED_COMBINES
from moebench.point import (
    DIRECTIONS,
    DROP_ORDERS,
    DROPLESS,
    LAYOUTS,
    PHASES,
    PRECISIONS,
    ROUNDINGS,
    SCOPES,
)
from moebench.traffic import parse_traffic

Value = int | float | str

CUSTOM = "custom"
ALLOWED_ROUTERS = "a name of `moebench list routers`, or path/to/file.py:function"
ROUTER_MODES = ("inference", "training")
MAX_WHOLE = 2**30
MAX_SHOWN = 60


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        read: checks a value and gives its one spelling; ValueError says what was found and what is allowed.
        part: "layer", "problem" (the rest of a Problem) or "variant".
        number: whether `where` compares it as a number.
    """

    read: Callable[[object], Value]
    part: str
    number: bool = False


def shown(value: object) -> str:
    """A value as an error shows it: one line, not long."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**MAX_SHOWN else "a huge number"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def read_whole(least: int) -> Callable[[object], Value]:
    """Reader of whole numbers >= least."""

    def read(value: object) -> Value:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_WHOLE:
            raise ValueError(f"found {shown(value)}; allowed: whole numbers from {least} to {MAX_WHOLE}")
        return value

    return read


def read_name(allowed: Iterable[str]) -> Callable[[object], Value]:
    """Reader of one of the given names."""
    names = tuple(allowed)

    def read(value: object) -> Value:
        if value not in names:
            hint = nearest(value, names) if isinstance(value, str) else ""
            listed = ", ".join(name or '""' for name in names)
            raise ValueError(f"found {shown(value)}{hint} (allowed: {listed})")
        return str(value)

    return read


def read_capacity(value: object) -> Value:
    """A number, or "dropless"; 0 and below only make sense to the rounding "tutel" (`moebench.expand` says so)."""
    if value == DROPLESS:
        return DROPLESS
    if isinstance(value, int | float) and not isinstance(value, bool) and -MAX_WHOLE <= value <= MAX_WHOLE:
        return float(value)
    hint = nearest(value, (DROPLESS,)) if isinstance(value, str) else ""
    raise ValueError(f'found {shown(value)}{hint} (allowed: finite numbers > 0, or "{DROPLESS}")')


def read_model(value: object) -> Value:
    """A preset's id, with `:kind` where a model has several kinds of MoE layer."""
    if not isinstance(value, str):
        raise ValueError(f"found {shown(value)}; allowed: a model's id (`moebench list models`)")
    _bounded(value, 100)
    spec, layers = resolve_layer(value)
    return f"{spec.id}:{layers.name}" if layers.name else spec.id


def read_provider(value: object) -> Value:
    """A provider's name, an entry point's, or path/to/file.py:function."""
    if not isinstance(value, str):
        raise ValueError(f"found {shown(value)}; allowed: {providers.ALLOWED}")
    _bounded(value, 1000)
    if not providers.is_known(value):
        raise ValueError(providers.unknown(value[:100]))
    return value


def read_router(value: object) -> Value:
    """A router's name, or path/to/file.py:function."""
    if isinstance(value, str) and is_file(value):
        _bounded(value, 1000)
        if not Path(value.rpartition(":")[0]).expanduser().is_file():
            raise ValueError(f"found {shown(value)}; there is no such file")
        return value
    if not isinstance(value, str) or value not in ROUTERS:
        hint = nearest(value, ROUTERS) if isinstance(value, str) else ""
        raise ValueError(f"found {shown(value)}{hint} (allowed: {ALLOWED_ROUTERS})")
    return value


def read_traffic(value: object) -> Value:
    """A traffic pattern in its canonical spelling; a trace must be a whole one."""
    if not isinstance(value, str):
        raise ValueError(f"found {shown(value)}; allowed: a traffic pattern such as 'zipf:1.2'")
    _bounded(value, 1000)
    traffic = parse_traffic(value)
    if traffic.path is not None:
        from moebench.trace_file import read_trace  # numpy is not needed by other suites

        read_trace(Path(traffic.path).expanduser())
    return str(traffic)


def _bounded(text: str, most: int) -> None:
    if len(text) > most or not text.isprintable():
        raise ValueError(f"found {shown(text)}; allowed: one line of at most {most} characters")


AXES: dict[str, Axis] = {
    "model": Axis(read_model, "layer"),
    "hidden_size": Axis(read_whole(1), "layer", number=True),
    "expert_ffn_size": Axis(read_whole(1), "layer", number=True),
    "activation": Axis(read_name(ACTIVATIONS), "layer"),
    "experts": Axis(read_whole(1), "layer", number=True),
    "top_k": Axis(read_whole(1), "layer", number=True),
    "granularity": Axis(read_whole(1), "layer", number=True),
    "router": Axis(read_router, "layer"),
    "router_mode": Axis(read_name(ROUTER_MODES), "layer"),
    "groups": Axis(read_whole(1), "layer", number=True),
    "topk_groups": Axis(read_whole(1), "layer", number=True),
    "slots": Axis(read_whole(1), "layer", number=True),
    "shared_combine": Axis(read_name(SHARED_COMBINES), "layer"),
    "shared_experts": Axis(read_whole(0), "layer", number=True),
    "shared_ffn_size": Axis(read_whole(0), "layer", number=True),
    "tokens": Axis(read_whole(1), "problem", number=True),
    "traffic": Axis(read_traffic, "problem"),
    "direction": Axis(read_name(DIRECTIONS), "problem"),
    "phase": Axis(read_name(PHASES), "problem"),
    "seed": Axis(read_whole(0), "problem", number=True),
    "provider": Axis(read_provider, "variant"),
    "precision": Axis(read_name(PRECISIONS), "variant"),
    "capacity_factor": Axis(read_capacity, "variant", number=True),
    "capacity_rounding": Axis(read_name(ROUNDINGS), "variant"),
    "drop_order": Axis(read_name(DROP_ORDERS), "variant"),
    "layout": Axis(read_name(LAYOUTS), "variant"),
    "scope": Axis(read_name(SCOPES), "variant"),
}


def axis(name: str) -> Axis:
    """The axis called `name`.

    Raises:
        ValueError: no such axis; the nearest names are given.
    """
    if name not in AXES:
        raise ValueError(f"unknown axis {shown(name)}{nearest(name, AXES)} (axes: {', '.join(AXES)})")
    return AXES[name]


def typed(name: str, text: str) -> object:
    """Text of the command line as TOML would have typed it on this axis."""
    if not AXES[name].number:
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def comparable(name: str, value: Value) -> Value:
    """The value as `where` sees it: "dropless" is infinite capacity."""
    return math.inf if name == "capacity_factor" and value == DROPLESS else value
