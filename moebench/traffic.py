"""Traffic: how tokens fall on experts, as a suite writes it. No torch.

balanced            every expert gets the same number of tokens, exactly
uniform             each token draws its experts independently and uniformly
zipf:ALPHA          expert popularity falls as rank^-ALPHA
active:FRACTION@T   skew solved so that T tokens are expected to reach FRACTION of the experts
router              the layer's own router on random hidden states
trace:FILE[@LAYER]  recorded routing (`moebench trace`), of the middle MoE layer where none is named
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import get_close_matches

FORMS = ("balanced", "uniform", "zipf:ALPHA", "active:FRACTION@T", "router", "trace:FILE[@LAYER]")
PATTERNS = tuple(form.partition(":")[0] for form in FORMS)


@dataclass(frozen=True)
class Traffic:
    """A parsed traffic pattern; `str` gives its canonical spelling.

    Attributes:
        pattern: one of `PATTERNS`.
        alpha: exponent of `zipf`, finite, >= 0.
        fraction: share of active experts of `active`, 0 < fraction <= 1.
        at_tokens: number of tokens at which `fraction` holds, >= 1.
        path: file of `trace`.
        trace_layer: which of the model's layers, as the trace numbers them; None: the middle one.
    """

    pattern: str
    alpha: float | None = None
    fraction: float | None = None
    at_tokens: int | None = None
    path: str | None = None
    trace_layer: int | None = None

    def __str__(self) -> str:
        if self.pattern == "zipf":
            return f"zipf:{_plain(self.alpha)}"
        if self.pattern == "active":
            return f"active:{_plain(self.fraction)}@{self.at_tokens}"
        if self.pattern == "trace":
            return f"trace:{self.path}" + ("" if self.trace_layer is None else f"@{self.trace_layer}")
        return self.pattern


def parse_traffic(text: str) -> Traffic:
    """Read one of `FORMS`.

    Raises:
        ValueError: it is none of them, or its numbers are out of range.
    """
    pattern, colon, rest = text.partition(":")
    if pattern not in PATTERNS:
        near = get_close_matches(pattern, PATTERNS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"traffic {_shown(text)} is not known{hint} (allowed: {', '.join(FORMS)})")
    if pattern == "zipf":
        return Traffic(pattern, alpha=_alpha(text, rest))
    if pattern == "active":
        fraction, at_tokens = _active(text, rest)
        return Traffic(pattern, fraction=fraction, at_tokens=at_tokens)
    if pattern == "trace":
        path, at, layer = rest.rpartition("@")
        named = bool(at) and layer.isascii() and layer.isdigit()
        if not (path if named else rest):
            raise ValueError("traffic 'trace' needs a file: trace:FILE, or trace:FILE@LAYER")
        return Traffic(pattern, path=path, trace_layer=int(layer)) if named else Traffic(pattern, path=rest)
    if colon:
        raise ValueError(f"traffic {_shown(text)}: {pattern} takes no argument")
    return Traffic(pattern)


def _alpha(text: str, argument: str) -> float:
    alpha = _number(argument)
    if alpha is None or alpha < 0:
        raise ValueError(f"traffic {_shown(text)}: ALPHA in zipf:ALPHA is a finite number >= 0")
    return alpha


def _active(text: str, argument: str) -> tuple[float, int]:
    share, _, count = argument.partition("@")
    fraction, tokens = _number(share), _number(count)
    if fraction is None or not 0 < fraction <= 1 or tokens is None or tokens < 1 or tokens != int(tokens):
        raise ValueError(
            f"traffic {_shown(text)}: in active:FRACTION@T, 0 < FRACTION <= 1 and T is a whole number >= 1"
        )
    return fraction, int(tokens)


def _number(text: str) -> float | None:
    """A finite number written in plain ASCII, or None."""
    if not text.isascii() or "_" in text or text != text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return abs(value) if value == 0 else value if math.isfinite(value) else None


def _plain(number: float | None) -> str:
    """Shortest spelling that reads back to the same number; whole numbers without a point."""
    return repr(number).removesuffix(".0")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
