"""Numbers and texts of files that anybody may have written, and how a report takes them."""

from __future__ import annotations

import math
from typing import Any

from mapconv.wording import is_finite


def number(value: Any) -> float | None:
    """A number of a JSON file, not finite ones included; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def finite_or_none(value: float | None) -> float | None:
    return value if is_finite(value) else None


def text(value: Any) -> str:
    """A string of a JSON file; anything else but null as JSON would spell it, cut where it is no longer a word."""
    if value is None:
        return ""
    return value if isinstance(value, str) else str(value)[:200]
