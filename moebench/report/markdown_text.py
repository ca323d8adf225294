"""Pieces of Markdown: text that stays text, tables, code. Nothing here writes HTML."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

LONGEST = 300  # characters of a text from a file
# Marks of flags in a cell: superscript letters, so that no HTML is needed.
LETTERS = "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ"
# What GitHub's Markdown, its mathematics and its emoji would take for markup.
_MARKUP = re.compile(r"[\\`*_{}\[\]<>|#~$&@!]|:(?=//|[a-z0-9_+-]+:)|(?<=\bwww)\.", re.IGNORECASE)
# What begins a list, a rule or an underline where it begins a line.
_OPENING = re.compile(r"^(\d{1,9}(?=[.)](?:\s|$))|(?=[-+=]))")


def escaped(text: str) -> str:
    """Text that Markdown and the HTML inside it leave as it is, on one line."""
    plain = " ".join(_visible(text).split())
    return _OPENING.sub(r"\1\\", _MARKUP.sub(r"\\\g<0>", plain))


def short(text: str) -> str:
    """`escaped`, and cut where it is very long."""
    return escaped(text if len(text) <= LONGEST else f"{text[:LONGEST]}…")


def table(head: Sequence[str], lines: Iterable[Sequence[str]], align: str = "") -> list[str]:
    """A table of cells that are Markdown already.

    Args:
        align: "l" or "r" for each column; the first is text and the others are numbers where it says nothing.
    """
    sides = (align or "l").ljust(len(head), "r")
    rule = ["---" if side == "l" else "---:" for side in sides[: len(head)]]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *lines)]


def code(text: str) -> list[str]:
    """A block of shell code that nothing in it can end."""
    lines = _visible(text).splitlines() or [""]
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{fence}sh", *lines, fence]


def left_out(shown: int, total: int, what: str) -> list[str]:
    """A line that says how many are not shown, if any."""
    return ["", f"{total - shown:,} more {what} not shown; `results.parquet` has all."] if total > shown else []


def _visible(text: str) -> str:
    """Without what is not seen, and turns or hides what is: control characters but newlines, marks of direction."""
    return "".join(
        character if character.isspace() or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co") else "�"
        for character in text
    )
