"""From a value to a colour that the colour-blind can read: a scale, its two palettes, its legend.

A page names its colours by number (``s0`` … ``s32`` of a sequential scale, ``d0`` … of a diverging one), and the
style sheet gives each a light and a dark value: more is always further from the background.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

LEVELS = 33

Kind = Literal["s", "d"]
#: Cividis, which reads alike with and without colour vision, paler or darker where it meets the background; and blue
#: to orange by way of grey.
_STOPS: dict[tuple[Kind, str], tuple[str, ...]] = {
    ("s", "light"): ("#fbf3cf", "#ecdc8a", "#cdbd70", "#a89e75", "#868479", "#666a70", "#434e6c", "#1a386f", "#00224e"),
    ("s", "dark"): ("#17294d", "#2c406b", "#434e6c", "#61656f", "#7d7c78", "#9b9476", "#bcae6c", "#dec958", "#fee838"),
    ("d", "light"): ("#06407a", "#2f7cb8", "#8dbbdd", "#eceae6", "#eeb987", "#cd6f24", "#883803"),
    ("d", "dark"): ("#8fd0ff", "#4b9fde", "#2b5f8a", "#2f3237", "#8a5426", "#d9853b", "#ffc48a"),
}


@dataclass(frozen=True)
class Scale:
    """Values from ``low`` to ``high`` on a palette; ``middle`` is where a diverging one is neutral."""

    kind: Kind
    low: float
    high: float
    middle: float | None = None

    def level(self, value: float) -> int:
        if self.high <= self.low:
            return LEVELS // 2 if self.kind == "d" else 0
        part = (value / 2 - self.low / 2) / (self.high / 2 - self.low / 2)  # no overflow, whatever a file says
        return round(min(max(part, 0.0), 1.0) * (LEVELS - 1))

    def variable(self, value: float) -> str:
        return f"var(--{self.kind}{self.level(value)})"

    def color(self, value: float) -> str:
        """The light palette's colour, for pictures."""
        return ramp(self.kind, "light")[self.level(value)]

    @property
    def ticks(self) -> Sequence[float]:
        if self.high <= self.low:
            return (self.low,)
        return (self.low, self.low / 2 + self.high / 2 if self.middle is None else self.middle, self.high)


def diverging(values: Iterable[float], middle: float, least: float = 0.0) -> Scale:
    """As far to both sides of ``middle`` as the furthest value, ``least`` at the least: rounding is not a pattern."""
    reach = max((abs(value - middle) for value in values), default=0.0)
    reach = max(reach, least)
    return Scale("d", middle - reach, middle + reach, middle)


def sequential(values: Iterable[float]) -> Scale:
    """From 0 to the largest value; from the smallest where that is over half of it, or little would be told apart.

    Then too the scale spans a tenth of the largest value, so that what hardly differs looks like it; what does not
    differ at all has one colour.
    """
    found = [value for value in values if value >= 0]
    high, low = max(found, default=0.0), min(found, default=0.0)
    if low < high:
        low = 0.0 if low <= high / 2 else min(low, 0.9 * high)
    return Scale("s", low, high)


def spanning(values: Iterable[float | None]) -> Scale:
    """From the least to the largest finite value: for a number whose pattern matters more than its size."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    return Scale("s", min(found, default=0.0), max(found, default=0.0))


def ramp(kind: Kind, theme: str) -> list[str]:
    """All colours of a palette, lowest first."""
    stops = [tuple(bytes.fromhex(stop[1:])) for stop in _STOPS[kind, theme]]
    colors = []
    for level in range(LEVELS):
        position = level / (LEVELS - 1) * (len(stops) - 1)
        index = min(int(position), len(stops) - 2)
        mixed = (round(a + (b - a) * (position - index)) for a, b in zip(stops[index], stops[index + 1], strict=True))
        colors.append("#" + bytes(mixed).hex())
    return colors


def palette_css() -> str:
    """The colours as custom properties, and the ramp that a legend shows."""
    lines = []
    kinds: tuple[Kind, ...] = ("s", "d")
    for kind in kinds:
        pairs = zip(ramp(kind, "light"), ramp(kind, "dark"), strict=True)
        lines += [f"--{kind}{level}:light-dark({light},{dark});" for level, (light, dark) in enumerate(pairs)]
        stops = ",".join(f"var(--{kind}{level})" for level in range(0, LEVELS, 2))
        lines.append(f"--{kind}-ramp:linear-gradient(90deg,{stops});")
    return ":root{" + "".join(lines) + "}"
