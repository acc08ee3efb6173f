"""Heat maps of an adapter: one value for each layer and module type, as coloured cells and as a table of numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mapconv.reporting.layout import Layout
from mapconv.reporting.markup import Html, element, table
from mapconv.reporting.numbers import finite_or_none
from mapconv.reporting.scales import Scale
from mapconv.wording import NONE, short

#: Columns between two numbers below a map.
_TICKS = 5


@dataclass(frozen=True)
class Measure:
    """A number that every module has, or may have: ``values`` are in the modules' order.

    Where several modules share a place, the map shows their ``combined`` value.
    """

    key: str
    title: str
    about: str
    values: Sequence[float | None]
    scale: Scale
    spell: Callable[[float | None], str]
    combined: Literal["median", "largest"] = "median"

    def at(self, members: Sequence[int]) -> float | None:
        """The value of one place on the map: None where no module there has a finite one."""
        values = [value for member in members if (value := finite_or_none(self.values[member])) is not None]
        if not values:
            return None
        return max(values) if self.combined == "largest" else statistics.median(values)

    def said_at(self, members: Sequence[int]) -> str:
        """That value in words, with what it stands for."""
        value = self.at(members)
        if value is None:
            return self.spell(self.values[members[0]]) if members else "no value"
        if len(members) == 1:
            return self.spell(value)
        found = [v for member in members if (v := finite_or_none(self.values[member])) is not None]
        span = f"{self.spell(min(found))} … {self.spell(max(found))}"
        return f"{self.spell(value)} ({self.combined} of {len(members)}: {span})"

    @property
    def finite(self) -> list[float]:
        return [value for value in map(finite_or_none, self.values) if value is not None]

    @property
    def span(self) -> str:
        found = self.finite
        if not found:
            return "no values"
        low, high = self.spell(min(found)), self.spell(max(found))
        return f"{low} throughout" if low == high else f"{low} … {high}"

    @property
    def summary(self) -> str:
        found = self.finite
        if not found:
            return "No module has a value."
        if min(found) == max(found):
            return f"{self.spell(found[0])} in all {len(found):,} modules."
        return f"{self.span}, median {self.spell(statistics.median(found))}, over {len(found):,} modules."

    @property
    def constant(self) -> bool:
        """Whether every module has the same value, which one line says better than a map."""
        return len(set(self.finite)) == 1 and len(self.finite) == len(self.values)

    @property
    def colours(self) -> str:
        """What the colours stand for, in words."""
        scale = self.scale
        if scale.high <= scale.low:
            return ""
        low, high = self.spell(scale.low), self.spell(scale.high)
        if scale.middle is None:
            return f" The colours run from {low}, the faintest, to {high}, the strongest."
        return f" Blue is below {self.spell(scale.middle)}, down to {low}; orange is above it, up to {high}."


def heat_map(measure: Measure, layout: Layout) -> Html:
    """A figure whose cells have numbers for pointer, keyboard and the table below it; a constant is one line."""
    if measure.constant:
        line = element("p", f"{measure.about} {measure.summary}")
        return element(
            "figure", element("figcaption", element("h3", measure.title), line), class_="card", id=f"map-{measure.key}"
        )
    missing = False
    children: list[Html] = []
    for row, name in enumerate(layout.types):
        children.append(element("b", name, data_row=row, title=name))
        for column in range(len(layout.layers)):
            members = layout.members.get((row, column), ())
            value = measure.at(members)
            missing = missing or value is None
            children.append(
                element(
                    "i",
                    data_at=f"{row},{column}",
                    data_v=measure.said_at(members),
                    style=None if value is None else f"background:{measure.scale.variable(value)}",
                    class_="none" if value is None else None,
                )
            )
    grid = element(
        "div",
        *children,
        element("b", "layer", class_="axis"),
        *_ticks(layout.layers),
        class_="heat cells",
        style=f"--columns:{len(layout.layers)}",
        tabindex="0",
        role="group",
        aria_label=f"Heat map of {measure.title}. {measure.summary} Arrow keys go from cell to cell.",
        data_title=measure.title,
        data_columns=" ".join("-" if layer is None else str(layer) for layer in layout.layers),
    )
    text = f"{measure.about} {measure.summary}{measure.colours}"
    about = element("div", element("h3", measure.title), element("p", text))
    return element(
        "figure",
        element("figcaption", about, _legend(measure, missing), class_="with-legend"),
        element("div", grid, class_="wide"),
        _numbers(measure, layout),
        class_="card",
        id=f"map-{measure.key}",
    )


def _ticks(layers: Sequence[int | None]) -> list[Html]:
    """Every fifth layer's number, and a dash for the modules that have none."""
    ticks = []
    for column, layer in enumerate(layers):
        if layer is None or layer % _TICKS == 0:
            ticks.append(element("span", NONE if layer is None else layer, style=f"grid-column:{column + 2}"))
    return ticks


def _legend(measure: Measure, missing: bool) -> Html:
    scale = measure.scale
    parts: list[Html] = []
    if measure.finite:
        flat = scale.high <= scale.low
        color = scale.variable(scale.low) if flat else f"var(--{scale.kind}-ramp)"
        spell = measure.spell if flat or scale.kind == "d" else short
        numbers = [element("span", spell(tick)) for tick in scale.ticks]
        bar = element("div", class_="ramp flat" if flat else "ramp", style=f"background:{color}")
        parts.append(element("div", bar, element("div", *numbers, class_="numbers"), class_="scale"))
    if missing:
        parts.append(element("span", element("i", class_="none"), "no value", class_="key"))
    return element("div", *parts, class_="legend")


def _numbers(measure: Measure, layout: Layout) -> Html:
    """The same numbers, a row for each layer."""
    rows = []
    for column, layer in enumerate(layout.layers):
        found = (layout.members.get((row, column), ()) for row in range(len(layout.types)))
        cells = (measure.said_at(members) if members else NONE for members in found)
        rows.append(("no layer" if layer is None else layer, *cells))
    numbers = table(("layer", *layout.types), rows, caption=f"{measure.title} by layer and module type")
    return element("details", element("summary", "Numbers"), numbers)
