"""Numbers as people read them: three significant digits, a unit, an interval."""

from __future__ import annotations

import math

_TIMES = ((1e3, "s"), (1.0, "ms"), (1e-3, "µs"), (1e-6, "ns"))
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def significant(value: float, digits: int = 3) -> str:
    """`value` to that many significant digits, no exponent between 1e-4 and 1e6."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if not -4 <= exponent < 6:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e+")
    decimals = max(0, digits - 1 - exponent)
    return f"{value:,.{decimals}f}"


def time_text(ms: float) -> str:
    """A time given in ms, in the unit that suits it."""
    return _scaled(ms, _TIMES)


def bytes_text(count: float) -> str:
    """A size given in bytes, in decimal units."""
    return _scaled(count, _BYTES)


def ratio_text(ratio: float, low: float, high: float) -> str:
    """'1.31× (1.27–1.36)'; without the bracket where there is no interval."""
    # A bound just off 1 decides between a win and a tie: it must not read as 1.
    digits = 4 if any("1.00" == significant(bound) != f"{bound:g}" for bound in (low, high)) else 3
    text = f"{significant(ratio, digits)}×"
    return text if math.isnan(low) else f"{text} ({significant(low, digits)}–{significant(high, digits)})"


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    size, unit = next(((size, unit) for size, unit in units if abs(value) >= size), units[-1])
    return f"{significant(value / size)} {unit}"
