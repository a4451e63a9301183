"""Numbers as people read them: 1.27 M, 0.54x, 12.3 ms, with a no-break space before the unit."""

from __future__ import annotations

import math
from typing import Any

MISSING = "–"
_SMALL = 0.1
_NBSP = "\u00a0"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits; very small and very large ones as powers of ten."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 6:
        text = f"{value:,.{max(0, digits - 1 - exponent)}f}"
    else:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        text = f"{mantissa}{_NBSP}×{_NBSP}10{str(int(power)).translate(_SUPERSCRIPT)}"
    return text.replace("-", "−")


def tick(value: float) -> str:
    """A round number on an axis, without trailing zeros."""
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return number(value, 2)
    return f"{value:.6g}".replace("-", "−")


def fixed(value: float | None, places: int = 2) -> str:
    """A number with so many decimal places."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{round(value, places) + 0.0:,.{places}f}".replace("-", "−")  # no minus zero


def signed(value: float, places: int = 2) -> str:
    """A difference with its sign: +0.19 or −1.19."""
    text = fixed(value, places)
    return f"+{text}" if value > 0 and text != MISSING and float(text.replace(",", "")) else text


def p_value(value: float) -> str:
    """A p-value: how probable such a difference is by chance alone."""
    return "below 0.001" if value < 0.001 else fixed(value, 3)


def count(value: int, singular: str, plural: str | None = None) -> str:
    """A number with its noun: 1 class, 2 classes."""
    return f"{value:,} {singular if value == 1 else plural or singular + 's'}"


def scaled(value: float | None, unit: str = "") -> str:
    """A count with a decimal prefix: 1.27 M, or 4.90 MB when the unit is B."""
    if value is None or not math.isfinite(value):
        return MISSING
    size, prefixes = float(value), ["", "k", "M", "G", "T"]
    while abs(size) >= 999.5 and len(prefixes) > 1:
        size, prefixes = size / 1000, prefixes[1:]
    text = f"{size:.0f}" if prefixes[0] == "" else f"{size:#.3g}".rstrip(".")
    return f"{text}{_NBSP}{prefixes[0]}{unit}".rstrip(_NBSP)


def size(value: float | None) -> str:
    """Bytes with a decimal prefix."""
    return scaled(value, "B")


def ms(value: float | None) -> str:
    """A latency in milliseconds."""
    return f"{number(value)}{_NBSP}ms" if _known(value) else MISSING


def pct(value: float | None, places: int = 2) -> str:
    """A percentage that is given in percent."""
    return f"{fixed(value, places)}{_NBSP}%" if _known(value) else MISSING


def share(value: float | None) -> str:
    """A share in [0, 1] as a percentage, below 10 % with two digits."""
    if value is not None and 0 < abs(value) < _SMALL:
        return f"{_two_digits(100 * value)}{_NBSP}%"
    return MISSING if value is None else pct(100 * value, 0)


def times(value: float | None) -> str:
    """A ratio: 0.54x, below 0.1 with two digits."""
    if value is not None and 0 < abs(value) < _SMALL:
        return f"{_two_digits(value)}×"
    return f"{fixed(value)}×" if _known(value) else MISSING


def _two_digits(value: float) -> str:
    return number(float(f"{value:.1e}"), 2)  # rounded first, so that 0.0996 is 0.10 and not 0.100


def seconds(value: float | None) -> str:
    """A duration in seconds, minutes or hours."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value < 60:
        return f"{number(value, 2)}{_NBSP}s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}{_NBSP}min {rest}{_NBSP}s"
    return f"{minutes // 60}{_NBSP}h {minutes % 60}{_NBSP}min"


def interval(low: float, high: float, places: int = 2) -> str:
    """A 95 % interval in words: 0.61 to 1.02."""
    return f"{fixed(low, places)} to {fixed(high, places)}"


def opposite(low: float, high: float, places: int = 2) -> str:
    """The interval of a drop as that of a change: 0.61 to 1.02 becomes −1.02 to −0.61."""
    return interval(-high, -low, places)


def strict(value: Any) -> Any:
    """Plain data for JSON, which has no NaN: as text it survives every parser, and pydantic reads it as a number."""
    match value:
        case dict():
            return {key: strict(item) for key, item in value.items()}
        case list():
            return [strict(item) for item in value]
        case float() if not math.isfinite(value):
            return str(value)
        case _:
            return value
