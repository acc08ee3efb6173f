"""The ledger of a run, ``OUT/ledger.jsonl``: one line an attempt at an entry, of which the last counts.

Only the coordinating process writes it. Lines are appended and flushed to the disk after the output that they speak of
was renamed into place, so that whatever is killed, a line that says done is right when it is written. A last line that
a kill cut short is removed by the next run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from sys import intern
from typing import Any, BinaryIO

from mapconv.errors import CatalogError
from mapconv.jsonfile import finite
from mapconv.untrusted.schema import NUMBER
from mapconv.version import __version__

LEDGER_FILE = "ledger.jsonl"
LEDGER_VERSION = 1
_LONGEST_LINE = 1 << 20
#: The fields of every line, null where an entry did not come so far. Of an entry with several sources, ``source``,
#: ``stat`` and ``content`` are lists.
FIELDS = (
    "entry", "fingerprint", "status", "kind", "error", "source", "base", "output", "method", "rank", "modules",
    "worst_error", "median_error", "parameters", "nbytes", "kl", "seconds", "attempts", "finished", "stat", "content",
    "merged", "pushed", "stage",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Seen:
    """What a resumed run needs to know of an entry's last line."""

    done: bool
    fingerprint: str
    #: Of each source, in the entry's order; ``contents`` of what was converted.
    stats: tuple[str, ...]
    contents: tuple[str, ...]
    base: str | None
    kind: str | None
    error: str | None


class Ledger:
    """An open ledger, to append to. Use it as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: dict[str, Seen] = {}
        self.broken = 0
        for line in read_lines(path):
            self.broken += line is None
            if line is not None:
                self.seen[line["entry"]] = _seen(line)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        _repair(self._descriptor)
        if os.fstat(self._descriptor).st_size == 0:
            self._write([{"ledger": LEDGER_VERSION, "mapconv_version": __version__}])

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)

    def append(self, tables: Sequence[dict[str, Any]]) -> None:
        """Write lines and flush them to the disk; one flush serves all of them."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        lines: list[dict[str, Any]] = [dict.fromkeys(FIELDS) | table | {"finished": now} for table in tables]
        self._write(lines)
        for line in lines:
            self.seen[line["entry"]] = _seen(line)

    def _write(self, tables: Sequence[dict[str, Any]]) -> None:
        data = memoryview("".join(f"{json.dumps(finite(table), allow_nan=False)}\n" for table in tables).encode())
        while data:
            data = data[os.write(self._descriptor, data) :]
        os.fsync(self._descriptor)


def read_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Each line whose fields have their types; None for one that has not. A ledger that is absent has no lines.

    Raises:
        CatalogError: not a ledger, or one of another version.
    """
    if path.exists():
        for table in read_tables(path):
            yield table if table is not None and _is_entry(table) else None


def read_tables(path: Path) -> Iterator[dict[str, Any] | None]:
    """Each line behind the first, as the table that it holds; None for one that cannot be read.

    The unfinished last line of a run that was killed is passed over.

    Raises:
        CatalogError: not a ledger, or one of another version.
    """
    with open(path, "rb") as file:
        if _read_header(file, path) is None:
            return
        while line := file.readline(_LONGEST_LINE):
            if line.endswith(b"\n"):
                yield _parse(line)
            elif len(line) == _LONGEST_LINE:
                yield None
                while (rest := file.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass


def ledger_version(path: Path) -> str:
    """The version of mapconv that began a ledger; empty where it does not say.

    Raises:
        CatalogError: not a ledger, one of another version, or one that has not been begun.
    """
    with open(path, "rb") as file:
        header = _read_header(file, path)
    if header is None:
        raise CatalogError(f"{path} is a ledger without its first line: run `mapconv catalog run` again.")
    version = header.get("mapconv_version")
    return version if isinstance(version, str) else ""


def _read_header(file: BinaryIO, path: Path) -> dict[str, Any] | None:
    """A ledger's first line; None if a kill came while it was written."""
    first = file.readline(_LONGEST_LINE)
    if not first.endswith(b"\n") and len(first) < _LONGEST_LINE:
        return None
    header = _parse(first)
    if header is None or header.get("ledger") != LEDGER_VERSION:
        raise CatalogError(f"{path} is not a ledger that this version of mapconv can read: choose another folder.")
    return header


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        table = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return table if isinstance(table, dict) else None


_TEXTS = ("entry", "fingerprint", "status")
_TEXTS_OR_NULL = ("kind", "error", "base", "finished")
_OF_SOURCES = ("stat", "content")
_NUMBERS = ("worst_error", "nbytes", "kl", "seconds")


def _is_entry(table: dict[str, Any]) -> bool:
    """Whether every field that is used has its type."""
    get = table.get
    return (
        {type(get(name)) for name in _TEXTS} == {str}
        and table["status"] in ("done", "failed")
        and {type(get(name)) for name in _TEXTS_OR_NULL} <= {str, type(None)}
        and all(_texts(get(name)) is not None for name in _OF_SOURCES)
        and all(number is None or NUMBER.holds(number) for number in map(get, _NUMBERS))
    )


def _texts(value: Any) -> tuple[str, ...] | None:
    """A value of each source, which a list has of several; None for what is neither text nor a list of texts."""
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    return tuple(values) if all(isinstance(item, str) for item in values) else None


def _seen(line: dict[str, Any]) -> Seen:
    done = line["status"] == "done"
    base, kind = line.get("base"), line.get("kind")
    return Seen(
        done=done,
        fingerprint=line["fingerprint"],
        stats=_texts(line.get("stat")) or (),
        contents=_texts(line.get("content")) or (),
        base=None if base is None else intern(base),  # a handful of bases, and thousands of lines
        kind=None if kind is None else intern(kind),
        error=None if done else line.get("error"),
    )


def _repair(descriptor: int) -> None:
    """Cut off what follows the last line's end: a line that a kill tore."""
    size = position = os.fstat(descriptor).st_size
    while position > 0:
        start = max(0, position - (1 << 16))
        found = os.pread(descriptor, position - start, start).rfind(b"\n")
        if found >= 0:
            position = start + found + 1
            break
        position = start
    if position < size:
        os.ftruncate(descriptor, position)
        os.fsync(descriptor)
