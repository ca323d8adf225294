"""Marked blocks of a Markdown page: found, checked, replaced."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from moebench.report import markdown_text

START, END = "<!-- published: {} -->", "<!-- end of published -->"
_START = re.compile(r"<!-- published: (.*) -->")
NOTHING = "Nothing is published yet."
MARK = "†"  # of a number that has a flag


def blocks_of(page: Path) -> dict[str, list[str]]:
    """Name -> the lines between its marks.

    Raises:
        ValueError: the page cannot be read, or a mark stands twice, alone or inside another block.
    """
    found: dict[str, list[str]] = {}
    inside: str | None = None
    for number, line in enumerate(_read(page).split("\n"), 1):
        mark = _START.fullmatch(line.strip())
        if mark:
            if inside is not None:
                raise ValueError(f"{page}: line {number}: the block {inside!r} before it has no end")
            inside = mark[1]
            if inside in found:
                raise ValueError(f"{page}: line {number}: the block {inside!r} stands there twice")
            found[inside] = []
        elif line.strip() == END:
            if inside is None:
                raise ValueError(f"{page}: line {number}: an end without a block")
            inside = None
        elif inside is not None:
            found[inside].append(line)
    if inside is not None:
        raise ValueError(f"{page}: the block {inside!r} has no end")
    return found


def stale(page: Path, fresh: Mapping[str, str]) -> list[str]:
    """Names of the page's blocks that say something else than `fresh`.

    Raises:
        ValueError: as `blocks_of`; or the blocks of the page are not those of `fresh`.
    """
    found = blocks_of(page)
    for name in fresh:
        if name not in found:
            raise ValueError(f"{page}: lacks the line {START.format(name)}")
    for name in found:
        if name not in fresh:
            raise ValueError(f"{page}: nothing is known of a block {name!r}")
    return [name for name, text in fresh.items() if "\n".join(found[name]) != text]


def rewritten(page: Path, fresh: Mapping[str, str]) -> str:
    """The page's text with its blocks replaced; `stale` has found no fault in it."""
    lines, inside = [], False
    for line in _read(page).split("\n"):
        mark = _START.fullmatch(line.strip())
        inside = inside and line.strip() != END
        if not inside:
            lines.append(line)
        if mark:
            inside = True
            lines.append(fresh[mark[1]])
    return "\n".join(lines)


def table(heads: Sequence[str], lines: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """A Markdown table; the last `numbers` columns are set to the right. Cells are Markdown already."""
    return "\n".join(markdown_text.table(heads, lines, "l" * (len(heads) - numbers) + "r" * numbers))


def words(text: object, most: int = 120) -> str:
    """Text from a file, short, and never markup."""
    plain = " ".join(str(text).split())
    return markdown_text.escaped(plain if len(plain) <= most else f"{plain[: most - 1]}…")


def _read(page: Path) -> str:
    try:
        return page.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{page}: no such file; run this at the top of a checkout of moebench") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{page}: cannot be read: {error}") from None
