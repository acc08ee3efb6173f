"""The ledger of a catalog run as the report shows it: what a line lacks is absent, not an error."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mapconv.catalog.ledger import LEDGER_FILE, ledger_version, read_tables
from mapconv.reporting.numbers import number, text


@dataclass(frozen=True)
class Entry:
    """The last line of one entry of the catalog; numbers may be absent or not finite.

    ``stage`` is where an entry failed (upgrade, verify, merge, push); ``merged`` and ``pushed`` say what else was made.
    """

    name: str
    status: str
    kind: str
    error: str
    source: str
    base: str
    output: str
    method: str
    finished: str
    fingerprint: str
    stage: str
    merged: str
    pushed: str
    rank: float | None
    modules: float | None
    worst_error: float | None
    median_error: float | None
    parameters: float | None
    nbytes: float | None
    kl: float | None
    seconds: float | None
    attempts: float | None

    @property
    def done(self) -> bool:
        return self.status == "done"


@dataclass(frozen=True)
class Ledger:
    """``unreadable`` counts whole lines that are not entries; the torn last one of a killed run is passed over."""

    folder: Path
    mapconv_version: str
    entries: tuple[Entry, ...]
    unreadable: int

    @property
    def done(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.done)

    @property
    def failed(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if not entry.done)

    @cached_property
    def _root(self) -> Path:
        return self.folder.resolve()

    def inside(self, entry: Entry) -> Path | None:
        """The entry's output folder if it exists within the ledger's own; a path that leads out of it is none."""
        if not entry.output or "\0" in entry.output:
            return None
        try:
            path = (self._root / entry.output).resolve()
            return path if path.is_relative_to(self._root) and path != self._root and path.is_dir() else None
        except (OSError, RuntimeError, ValueError):
            return None


def read_ledger(folder: Path) -> Ledger:
    """The entries of ``folder``'s ledger, in the order in which they first appear.

    Raises:
        CatalogError: the first line is not a ledger's, or another version's.
    """
    version, entries, unreadable = ledger_version(folder / LEDGER_FILE), {}, 0
    for line in read_tables(folder / LEDGER_FILE):
        if line is None or not isinstance(line.get("entry"), str):
            unreadable += 1
        else:
            entries[line["entry"]] = _entry(line)
    return Ledger(folder, version, tuple(entries.values()), unreadable)


def href(path: Path, folder: Path) -> str:
    """A relative link, percent-encoded, from a page in ``folder`` to a file or folder; both are resolved already."""
    way = os.path.relpath(path, folder)
    return quote(way if way.startswith("..") else f"./{way}", errors="surrogateescape")


def _entry(found: Mapping[str, Any]) -> Entry:
    words = (
        "status", "kind", "error", "source", "base", "output", "method", "finished", "fingerprint", "stage", "merged",
        "pushed",
    )  # fmt: skip
    counts = (
        "rank", "modules", "worst_error", "median_error", "parameters", "nbytes", "kl", "seconds", "attempts",
    )  # fmt: skip
    fields: dict[str, Any] = {word: text(found.get(word)) for word in words}
    if isinstance(found.get("source"), list):
        fields["source"] = text(" + ".join(map(text, found["source"])))
    fields |= {name: number(found.get(name)) for name in counts}
    return Entry(name=found["entry"], **fields)
