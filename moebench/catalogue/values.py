"""A config.json's values, each read as what it has to be. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MAX_COUNT = 10**9  # no published size comes near; what is larger is damage
MAX_LAYERS = 10_000  # layers are listed one by one


class Values:
    """The keys of one config object over its family's defaults; errors name the file and the key.

    A name is `key`, `key|other spelling`, `outer.inner`, or `=3`, which stands for the number itself.
    """

    def __init__(self, where: str, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.where = where
        self._config = config
        self._defaults = defaults

    def raw(self, name: str) -> Any:
        """The value under the first spelling that has one, else its default, else None; an explicit null is None."""
        if name.startswith("="):
            return int(name[1:])
        looked = {key: self._look(key) for key in name.split("|")}
        given = [value for found, value in looked.values() if found and value is not None]
        silent = [self._defaults[key] for key, (found, _) in looked.items() if not found and key in self._defaults]
        return next(iter(given + silent), None)

    def _look(self, key: str) -> tuple[bool, Any]:
        here: Any = self._config
        for part in key.split("."):
            if here is None:
                return False, None
            if not isinstance(here, Mapping):
                raise self.fault(key.rpartition(".")[0], here, "an object")
            if part not in here:
                return False, None
            here = here[part]
        return True, here

    def fault(self, name: str, found: object, allowed: str) -> ValueError:
        """The error for a value that cannot be."""
        shown = _shown(found)
        return ValueError(f"{self.where}: {name.split('|')[0]} is {shown}; it must be {allowed}")

    def count(self, name: str, least: int = 1, most: int = MAX_COUNT) -> int:
        """A whole number."""
        value = self.raw(name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.fault(name, value, f"a whole number, {least} to {most}")
        return value

    def optional_count(self, name: str, least: int = 0) -> int | None:
        """A whole number, or None where it is null or left out."""
        return None if self.raw(name) is None else self.count(name, least)

    def same_count(self, name: str) -> int:
        """A whole number, or a list of one such number for every layer, all equal."""
        value = self.raw(name)
        if not isinstance(value, list):
            return self.count(name)
        distinct = {item for item in value if isinstance(item, int) and not isinstance(item, bool)}
        if len(distinct) != 1 or not all(isinstance(item, int) for item in value):
            raise self.fault(name, value, "one whole number, the same for every layer")
        return Values(self.where, {name.split("|")[0]: distinct.pop()}, {}).count(name)

    def number(self, name: str) -> float:
        """A finite number above 0."""
        value = self.raw(name)
        bad = isinstance(value, bool) or not isinstance(value, (int, float))
        if bad or not 0 < value < math.inf or value > MAX_COUNT:
            raise self.fault(name, value, "a number above 0")
        return float(value)

    def flag(self, name: str) -> bool:
        """true or false; null or left out is false."""
        value = self.raw(name)
        if value is not None and not isinstance(value, bool):
            raise self.fault(name, value, "true or false")
        return bool(value)

    def text(self, name: str) -> str:
        """A string."""
        value = self.raw(name)
        if not isinstance(value, str):
            raise self.fault(name, value, "text")
        return value

    def names(self, name: str) -> list[str] | None:
        """A list of strings, or None where it is null or left out."""
        value = self.raw(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise self.fault(name, value, "a list of names")
        return value

    def indices(self, name: str, below: int) -> list[int] | None:
        """A list of layer numbers under `below`, or None where it is null or left out."""
        value = self.raw(name)
        if value is None:
            return None
        whole = isinstance(value, list) and all(type(item) is int and 0 <= item < below for item in value)
        if not whole:
            raise self.fault(name, value, f"a list of layer numbers, 0 to {below - 1}")
        return list(value)


def _shown(found: object) -> str:
    if found is None:
        return "missing or null"
    try:
        text = repr(found)
    except ValueError:  # a whole number of more digits than Python prints
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."
