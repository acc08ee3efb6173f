"""Words and numbers as mapconv spells them: on a terminal, on a model card and in a report alike."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from typing import TypeGuard

#: What stands where there is no number.
NONE = "–"


def counted(number: int, noun: str) -> str:
    """``1 module``, ``2 modules``, ``1,000 modules``; ``noun`` is the singular of a regular one."""
    return f"{number:,} {noun if number == 1 else f'{noun}s'}"


def count(value: float | None) -> str:
    """``1,234``."""
    if not is_finite(value):
        return _special(value)
    return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.2e}"


def small(value: float | None) -> str:
    """A number near zero: ``0``, ``0.0123`` or ``1.2e-08``."""
    if not is_finite(value):
        return _special(value)
    if value == 0:
        return "0"
    return f"{value:.4f}" if 0.001 <= abs(value) < 1e6 else f"{value:.1e}"


def fixed(value: float | None) -> str:
    """Four decimals: a perplexity, or a number around 1 in a table."""
    return f"{value:.4f}" if is_finite(value) else _special(value)


def gain(value: float | None) -> str:
    """A number around 1 whose distance from 1 matters: ``1.00214``."""
    return f"{value:.5f}" if is_finite(value) else _special(value)


def percent(value: float | None) -> str:
    """A share to two decimals: ``99.28%``."""
    return f"{value:.2%}" if is_finite(value) else _special(value)


def rough_percent(share: float) -> str:
    """A share with no more digits than it deserves: ``54 %``, ``0.4 %``, ``0 %``, ``2e-05 %``."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 10 or value == 0 else f"{value:.2g} %"


def spread(values: Collection[float], spell: Callable[[float], str]) -> str:
    """``1.0012`` where all are spelled alike, else the least and the largest: ``0.9981 … 1.0144``."""
    low, high = spell(min(values)), spell(max(values))
    return low if low == high else f"{low} … {high}"


def size(nbytes: float | None) -> str:
    """Bytes: ``1.2 MB``."""
    if not is_finite(nbytes):
        return _special(nbytes)
    if abs(nbytes) >= 1e18:
        return f"{nbytes:.2e} B"
    units = iter(("B", "KB", "MB", "GB", "TB"))
    unit = next(units)
    while abs(nbytes) >= 1000 and unit != "TB":
        nbytes, unit = nbytes / 1000, next(units)
    return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:,.1f} {unit}"


def seconds(value: float | None) -> str:
    """``0.42 s``, ``12.3 s``, ``5 min 03 s``, ``2 h 05 min``."""
    if not is_finite(value):
        return _special(value)
    if abs(value) < 60:
        return f"{value:.2f} s" if abs(value) < 10 else f"{value:.1f} s"
    if abs(value) >= 1e9:
        return f"{value:.2e} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def rough_seconds(value: float) -> str:
    """An estimate, with no more digits than it deserves: ``5 s``, ``2 min``, ``3 h``."""
    for unit, length in (("h", 3600), ("min", 60)):
        if value >= 1.5 * length:
            return f"{_coarse(value / length)} {unit}"
    return f"{_coarse(max(1.0, value))} s"


def short(value: float) -> str:
    """A label of an axis or a scale: as few digits as tell the value, ``0.2``, ``1e-05``, ``1.004``."""
    return f"{value:.4g}"


def tick(spelled: str) -> str:
    """A spelled number without the zeros that end its decimals: ``1 s`` for ``1.00 s``, ``1e-09`` for ``1.0e-09``."""
    return re.sub(r"\.(\d*?)0+(?!\d)", lambda digits: f".{digits[1]}" if digits[1] else "", spelled)


def is_finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _special(value: float | None) -> str:
    """The word for what is not a finite number."""
    if value is None:
        return NONE
    if math.isnan(value):
        return "NaN"
    return "∞" if value > 0 else "−∞"


def _coarse(value: float) -> int:
    """To one digit: 1, 2, … 9, 10, 20."""
    magnitude = 10 ** max(0, math.floor(math.log10(value)))
    return round(value / magnitude) * magnitude
