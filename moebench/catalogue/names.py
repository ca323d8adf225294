"""Nearest names, for errors. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean a, b?"`, or nothing where no known name is close."""
    # difflib's time grows with length; names are short, pasted text is not.
    close = get_close_matches(name[:80], list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""
