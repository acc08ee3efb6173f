"""Dots on a logarithmic axis, histograms and bars: positions in per cent, so that a page's width is theirs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from mapconv.reporting.markup import Html, element, table
from mapconv.reporting.numbers import finite_or_none
from mapconv.wording import NONE, tick

_BINS = 24


@dataclass(frozen=True)
class Bin:
    """``count`` values from ``low`` (inclusive) to ``high`` (exclusive but in the last bin)."""

    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Histogram:
    """Bins of equal width on their axis; ``zeros`` have no place on a logarithmic one, ``absent`` on none."""

    bins: tuple[Bin, ...]
    logarithmic: bool
    zeros: int
    absent: int


def histogram(values: Sequence[float | None]) -> Histogram:
    """Logarithmic where no value is negative and the positive ones span more than a factor of 20."""
    finite = [value for value in map(finite_or_none, values) if value is not None]
    absent = len(values) - len(finite)
    positive = [value for value in finite if value > 0]
    logarithmic = bool(positive) and min(finite) >= 0 and max(positive) / min(positive) > 20
    shown = positive if logarithmic else finite
    zeros = len(finite) - len(shown)
    if not shown:
        return Histogram((), logarithmic, zeros, absent)
    edges = _log_edges(min(shown), max(shown)) if logarithmic else _linear_edges(min(shown), max(shown))
    counts = [0] * (len(edges) - 1)
    for value in shown:
        counts[_bin_of(value, edges)] += 1
    bins = (Bin(low, high, count) for low, high, count in zip(edges, edges[1:], counts, strict=False))
    return Histogram(tuple(bins), logarithmic, zeros, absent)


def _log_edges(low: float, high: float) -> list[float]:
    """Edges at 10^(k/n) with n bins a decade, from the last at or below ``low`` to the first above ``high``."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    per_decade = next((n for n in (10, 5, 4, 3, 2) if n * (last - first) <= _BINS), 1)
    edges = [_power(step, per_decade) for step in range(first * per_decade, last * per_decade + 1)]
    start = max((n for n, edge in enumerate(edges) if edge <= low), default=0)
    stop = next((n for n, edge in enumerate(edges) if edge >= high and n > start), len(edges) - 1)
    return edges[start : stop + 1]


def _power(step: int, per_decade: int) -> float:
    """10^(step/per_decade), whole decades exactly as they are written."""
    decade, rest = divmod(step, per_decade)
    return float(f"1e{decade}") * 10.0 ** (rest / per_decade)


def _linear_edges(low: float, high: float) -> list[float]:
    if high / 16 - low / 16 < 1e-300:  # one value, or so close that no float lies between
        spread = max(abs(low) * 0.05, 0.5)
        low, high = max(low - spread, -sys.float_info.max), min(high + spread, sys.float_info.max)
    rough = high / 16 - low / 16
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _bin_of(value: float, edges: Sequence[float]) -> int:
    above = next((n for n, edge in enumerate(edges) if edge > value), len(edges) - 1)
    return min(max(above - 1, 0), len(edges) - 2)


def histogram_figure(
    key: str, title: str, about: str, values: Sequence[float | None], spell: Callable[[float | None], str], what: str
) -> Html:
    """A card with the bars, their axis, what they leave out, and their table."""
    found = histogram(values)
    tallest = max((bar.count for bar in found.bins), default=0)
    ranges = [f"{tick(spell(bar.low))} … {tick(spell(bar.high))}" for bar in found.bins]
    bars = [(bar.count / tallest if bar.count else 0.0) for bar in found.bins]
    tips = [f"{said}: {bar.count:,} {what}" for said, bar in zip(ranges, found.bins, strict=True)]
    left_out = [
        f"{count:,} {'is' if count == 1 else 'are'} {said}"
        for count, said in ((found.zeros, "exactly 0, which this axis cannot show"), (found.absent, "without a number"))
        if count
    ]
    axis = "logarithmic axis" if found.logarithmic else ""
    note = "; ".join(filter(None, (axis, *left_out)))
    caption = element("figcaption", element("h3", title), element("p", about, f" ({note})." if note else ""))
    plot = _bars(bars, tips, f"Histogram of {title}.")
    rows = [(said, f"{bar.count:,}") for said, bar in zip(ranges, found.bins, strict=True)]
    rows += [(name, f"{n:,}") for name, n in (("exactly 0", found.zeros), ("no number", found.absent)) if n]
    numbers = table((title, what), rows, caption=f"{title}: how many {what}")
    body = (element("p", f"{tallest:,}", class_="top"), plot, _axis(found, spell)) if found.bins else ()
    details = element("details", element("summary", "Numbers"), numbers)
    return element("figure", caption, *body, details, class_="card", id=f"histogram-{key}")


def bars_figure(
    key: str, title: str, about: str, values: Sequence[tuple[str, float]], spell: Callable[[float], str], what: str
) -> Html:
    """A card with a bar for each named value of at least 0, and their table; ``what`` the names are of."""
    tallest = max(value for _, value in values)
    shares = [value / tallest if tallest else 0.0 for _, value in values]
    plot = _bars(shares, [f"{what} {name}: {spell(value)}" for name, value in values], f"{title}.")
    labels = [
        element("span", values[n][0], style=f"left:{100 * (n + 0.5) / len(values):.3f}%")
        for n in range(0, len(values), max(1, math.ceil(len(values) / 12)))
    ]
    axis = element("div", *labels, class_="axis", aria_hidden="true")
    numbers = table((what, title), [(name, spell(value)) for name, value in values], caption=title)
    return element(
        "figure",
        element("figcaption", element("h3", title), element("p", about)),
        element("p", spell(tallest), class_="top"),
        plot,
        axis,
        element("details", element("summary", "Numbers"), numbers),
        class_="card",
        id=f"bars-{key}",
    )


def _bars(shares: Sequence[float], tips: Sequence[str], label: str) -> Html:
    """Bars by their part of the height, each with its words."""
    bars = [
        element("i", element("u", style=f"height:{100 * share:.2f}%"), data_at=f"0,{number}", data_tip=tip)
        for number, (share, tip) in enumerate(zip(shares, tips, strict=True))
    ]
    label = f"{label} Arrow keys go from bar to bar."
    return element("div", *bars, class_="bars cells", tabindex="0", role="group", aria_label=label)


def _axis(found: Histogram, spell: Callable[[float | None], str]) -> Html:
    """Up to five edges by number, where they stand."""
    edges = [found.bins[0].low, *(bar.high for bar in found.bins)]
    wanted = range(len(edges))
    if found.logarithmic:
        decades = [n for n in wanted if f"{edges[n]:.6e}".startswith("1.000000e")]
        wanted = decades if len(decades) > 1 else [0, len(edges) - 1]
    every = max(1, math.ceil(len(wanted) / 5))
    labels = [
        element("span", tick(spell(edges[n])), style=f"left:{100 * n / (len(edges) - 1):.2f}%") for n in wanted[::every]
    ]
    return element("div", *labels, class_="axis", aria_hidden="true")


def _on_axis(value: float | None) -> TypeGuard[float]:
    """Whether a logarithmic axis has a place for the value."""
    return value is not None and math.isfinite(value) and value > 0


def dots_figure(
    key: str,
    title: str,
    about: str,
    rows: Sequence[tuple[str, float | None, str]],
    spell: Callable[[float | None], str],
) -> Html:
    """Named values on one logarithmic axis: (name, value, what it is). 0 and what is not finite stand as words."""
    values = [value for _, value, _ in rows if _on_axis(value)]
    first = math.floor(math.log10(min(values))) if values else 0
    last = max(math.ceil(math.log10(max(values))), first + 1) if values else 1

    def part(power: float) -> str:
        return f"{100 * (power - first) / (last - first):.2f}%"

    lines = []
    for number, (name, value, what) in enumerate(rows):
        dot = element("u", style=f"left:{part(math.log10(value))}") if _on_axis(value) else None
        track = element("i", dot, data_at=f"{number},0", data_tip=f"{name}: {spell(value)}. {what}")
        lines += [element("b", name), track, element("span", spell(value), class_="said")]
    every = max(1, math.ceil((last - first) / 6))
    labels = [
        element("span", f"1e{power:+03d}" if abs(power) > 4 else f"{10.0**power:g}", style=f"left:{part(power)}")
        for power in range(first, last + 1, every)
    ]
    lines += [element("b", class_="axis"), element("div", *labels, class_="axis", aria_hidden="true")]
    lines.append(element("span"))
    plot = element(
        "div",
        *lines,
        class_="dots cells",
        style=f"--decades:{last - first}",
        tabindex="0",
        role="group",
        aria_label=f"{title}. Up and down go from line to line.",
    )
    numbers = table(("", title, ""), [(name, spell(value), what) for name, value, what in rows], caption=title)
    return element(
        "figure",
        element("figcaption", element("h3", title), element("p", about)),
        plot,
        element("details", element("summary", "Numbers"), numbers),
        class_="card",
        id=f"dots-{key}",
    )


def share_table(title: str, rows: Sequence[tuple[str, int, int]]) -> Html:
    """A table of (name, done, failed) with a bar for each, as long as its share of the longest."""
    longest = max((done + failed for _, done, failed in rows), default=1) or 1
    cells = [
        (
            name or NONE,
            f"{done:,}",
            f"{failed:,}",
            element(
                "div",
                element("i", class_="done", style=f"width:{100 * done / longest:.2f}%"),
                element("i", class_="failed", style=f"width:{100 * failed / longest:.2f}%"),
                class_="share",
            ),
        )
        for name, done, failed in rows
    ]
    return table((title, "done", "failed", ""), cells, caption=f"Entries by {title}", class_="plain shares")
