"""What a catalog file says, with its lines; and what is wrong with it, all at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mapconv.errors import CatalogError


@dataclass(frozen=True)
class Record:
    """One entry as the file has it, and the lines of its keys: ``lines["upgrade", "rank"]``."""

    table: Any
    line: int
    lines: Mapping[tuple[str, ...], int] = field(default_factory=dict)

    def line_of(self, *keys: str) -> int:
        return next((self.lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.lines), self.line)


class Faults:
    """What is wrong with a catalog, in the order of its lines (None in a folder of adapters, which has none);
    ``check`` raises all of it as one error.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: list[tuple[int | None, str]] = []

    def add(self, line: int | None, text: str) -> None:
        self._found.append((line, text))

    def check(self) -> None:
        if not self._found:
            return
        found = sorted(self._found, key=lambda item: item[0] or 0)
        lines = "\n".join(f"  {text}" if line is None else f"  line {line}: {text}" for line, text in found)
        count = len(self._found)
        raise CatalogError(f"{self._path} has {count} fault{'s' if count > 1 else ''}, nothing was converted:\n{lines}")
