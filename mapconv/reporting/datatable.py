"""Long tables: the page carries their rows as data, and its script shows those in view, sorted and filtered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mapconv.reporting.markup import Html, element
from mapconv.reporting.numbers import finite_or_none


@dataclass(frozen=True)
class Column:
    """``choice`` columns have few different texts, to choose one from; hidden ones are seen in a row's details.

    ``cell`` makes a text, a ``numeric`` or a ``linked`` cell of what a row is about; ``width`` is in characters.
    """

    key: str
    label: str
    cell: Callable[[Any], Any]
    kind: Literal["text", "choice", "number"] = "text"
    width: int = 10
    hidden: bool = False


@dataclass(frozen=True)
class DataTable:
    """A row for each of ``items``."""

    key: str
    noun: str
    columns: Sequence[Column]
    items: Sequence[Any]

    def to_json(self) -> dict[str, Any]:
        columns = [
            {"key": c.key, "label": c.label, "kind": c.kind, "width": c.width, "hidden": c.hidden} for c in self.columns
        ]
        rows = [[column.cell(item) for column in self.columns] for item in self.items]
        return {"key": self.key, "noun": self.noun, "columns": columns, "rows": rows}

    def place(self) -> Html:
        """Where the page's script puts the table."""
        without = element("noscript", f"This table of {len(self.items):,} {self.noun} needs JavaScript.")
        return element("div", without, class_="data", data_table=self.key)


def numeric(value: float | None, spell: Callable[[float | None], str]) -> list[Any]:
    """A cell that is sorted by its value, last where it has none, and shown as it is spelled."""
    return [finite_or_none(value), spell(value)]


def linked(text: str, href: str | None) -> Any:
    """A text with a link, which the caller has checked."""
    return text if href is None else {"text": text, "href": href}
