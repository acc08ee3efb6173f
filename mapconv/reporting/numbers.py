"""Numbers of files that anybody may have written: finite or not at all; and each kind's one spelling in a report."""

from __future__ import annotations

import math
import re
from typing import Any, TypeGuard

NONE = "–"


def number(value: Any) -> float | None:
    """A number of a JSON file, not finite ones included; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def finite_or_none(value: float | None) -> float | None:
    return value if _finite(value) else None


def text(value: Any) -> str:
    """A string of a JSON file; anything else but null as JSON would spell it, cut where it is no longer a word."""
    if value is None:
        return ""
    return value if isinstance(value, str) else str(value)[:200]


def gain(value: float | None) -> str:
    """A number around 1: ``1.00214``."""
    return f"{value:.5f}" if _finite(value) else _special(value)


def small(value: float | None) -> str:
    """A number near zero: ``0``, ``0.0123`` or ``1.23e-08``."""
    if not _finite(value):
        return _special(value)
    if value == 0:
        return "0"
    return f"{value:.4f}" if 0.001 <= abs(value) < 1e6 else f"{value:.2e}"


def count(value: float | None) -> str:
    """``1,234``."""
    if not _finite(value):
        return _special(value)
    return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.2e}"


def size(value: float | None) -> str:
    """Bytes: ``1.2 MB``."""
    if not _finite(value):
        return _special(value)
    if abs(value) >= 1e18:
        return f"{value:.2e} B"
    units = iter(("B", "KB", "MB", "GB", "TB"))
    unit = next(units)
    while abs(value) >= 1000 and unit != "TB":
        value, unit = value / 1000, next(units)
    return f"{value:.0f} B" if unit == "B" else f"{value:,.1f} {unit}"


def seconds(value: float | None) -> str:
    """``0.42 s``, ``12.3 s``, ``5 min 03 s``, ``2 h 05 min``."""
    if not _finite(value):
        return _special(value)
    if abs(value) < 60:
        return f"{value:.2f} s" if abs(value) < 10 else f"{value:.1f} s"
    if abs(value) >= 1e9:
        return f"{value:.2e} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def short(value: float) -> str:
    """A label of an axis or a scale: as few digits as tell the value, ``0.2``, ``1e-05``, ``1.004``."""
    return f"{value:.4g}"


def tick(spelled: str) -> str:
    """A spelled number without the zeros that end its decimals: ``1 s`` for ``1.00 s``, ``1e-09`` for ``1.00e-09``."""
    return re.sub(r"\.(\d*?)0+(?!\d)", lambda digits: f".{digits[1]}" if digits[1] else "", spelled)


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _special(value: float | None) -> str:
    """The word for what is not a finite number."""
    if value is None:
        return NONE
    if math.isnan(value):
        return "NaN"
    return "∞" if value > 0 else "−∞"
