"""Read a user's data file into rows of one kind: plain text, JSON lines, or Parquet.

A row that cannot be used is counted and named; a file with more than one such row in a hundred is refused.
"""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from mapconv.data.shipped import packaged_text
from mapconv.errors import DataError, DependencyError
from mapconv.wording import size

#: ``text``: documents; ``chat``: conversations; ``labelled``: one text each with its class, for a classifier.
Kind = Literal["text", "chat", "labelled"]
#: The field that tells a row's kind, and the fields that each kind reads.
_KIND_OF: dict[str, Kind] = {"text": "text", "messages": "chat", "input": "labelled"}
_FIELDS = {"text": {"text"}, "chat": {"messages", "tools"}, "labelled": {"input", "label"}}
#: Share of rows that may be unusable before the file as a whole is refused.
_TOLERATED = 0.01
_NAMED = 5
#: Bytes of a line of JSON, and of a text that is not split into rows: what is longer was not written to be read whole.
LONGEST_LINE = 16_000_000
LONGEST_TEXT = 256_000_000


@dataclass(frozen=True)
class Row:
    """One row: ``number`` counts lines of the file (rows of a Parquet file) from 1.

    ``content`` is a text, or for a chat the arguments of the tokenizer's chat template.
    """

    number: int
    content: Any
    label: Any = None


@dataclass(frozen=True)
class Rows:
    """The usable rows of a file; ``from_plain_text`` marks the one row of a text file."""

    path: Path
    kind: Kind
    rows: tuple[Row, ...]
    bad: tuple[BadRow, ...] = ()
    notes: tuple[str, ...] = ()
    from_plain_text: bool = False


@dataclass(frozen=True)
class BadRow:
    number: int
    reason: str


class UnusableRowError(Exception):
    """Why one row cannot be used; what that means for the file is decided when all rows are known."""


def read_rows(path: str | Path | None) -> Rows:
    """The rows of a ``.jsonl`` or ``.parquet`` file, any other file as one text; None: the package's sample text.

    A row has ``text``, or ``messages`` (and ``tools``) for the chat template, or ``input`` with its ``label``.

    Raises:
        DataError: absent, empty, not UTF-8, rows of more than one kind, or too many that cannot be used.
        DependencyError: a Parquet file without pyarrow.
    """
    if path is None:
        return Rows(Path("sample.txt"), "text", (Row(1, packaged_text("sample.txt")),), from_plain_text=True)
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _collect(path, _json_lines(path))
    if suffix == ".parquet":
        return _collect(path, _parquet_rows(path))
    if suffix == ".json":
        raise DataError(f"{path} is one JSON document: write one object per line, and name the file .jsonl.")
    text = _read_utf8(path)
    return Rows(path, "text", (Row(1, text),), from_plain_text=True)


def refuse_many(path: Path, bad: Iterable[BadRow], total: int) -> tuple[str, ...]:
    """A note that names the unusable rows, if there are any.

    Raises:
        DataError: more than one in a hundred of ``total``.
    """
    bad = sorted(bad, key=lambda row: row.number)
    if not bad:
        return ()
    numbers = ", ".join(str(row.number) for row in bad[:_NAMED]) + (", …" if len(bad) > _NAMED else "")
    where = f"line{'s' if len(bad) > 1 else ''} {numbers}: {bad[0].reason}"
    if len(bad) > _TOLERATED * total:
        raise DataError(f"{path}: {len(bad)} of {total} rows cannot be used ({where}): correct or remove them.")
    return (f"{path.name}: {len(bad)} of {total} rows cannot be used and were left out ({where})",)


def _collect(path: Path, entries: Iterator[tuple[int, Any]]) -> Rows:
    """Check every row's form. The first usable row says which kind all must be."""
    kind: Kind | None = None
    rows, bad, unused = [], [], set()
    for number, entry in entries:
        try:
            if isinstance(entry, UnusableRowError):
                raise entry
            found = _kind(entry)
            if kind is not None and found != kind:
                raise DataError(
                    f"{path} mixes kinds of rows: line {number} has {_field_of(found)!r}, those before it "
                    f"{_field_of(kind)!r}: split the file."
                )
            row = _row(number, found, entry)
        except UnusableRowError as reason:
            bad.append(BadRow(number, str(reason)))
            continue
        kind = found
        rows.append(row)
        unused |= entry.keys() - _FIELDS[found]
    if not rows and not bad:
        raise DataError(f"{path} is empty: give a file with rows.")
    if kind is None:
        refuse_many(path, bad, len(bad))
    names = ", ".join(sorted(map(str, unused))[:_NAMED]) + (", …" if len(unused) > _NAMED else "")
    notes = (f"{path.name}: these fields are not used: {names}",) if unused else ()
    return Rows(path, kind or "text", tuple(rows), tuple(bad), notes)


def _kind(entry: Any) -> Kind:
    if not isinstance(entry, dict):
        raise UnusableRowError(f"it holds {type(entry).__name__}, expected an object")
    # A Parquet file has every column in every row: null stands for absent.
    fields = [name for name in _KIND_OF if entry.get(name) is not None]
    if not fields:
        raise UnusableRowError("it has none of the fields text, messages, input")
    if len(fields) > 1:
        raise UnusableRowError(f"it has {' and '.join(fields)}, so its kind is unclear")
    return _KIND_OF[fields[0]]


def _row(number: int, kind: Kind, entry: dict[str, Any]) -> Row:
    content = entry[_field_of(kind)]
    if kind == "chat":
        return Row(number, _conversation(content, entry.get("tools")))
    if not isinstance(content, str):
        raise UnusableRowError(f"{_field_of(kind)} is {type(content).__name__}, expected a string")
    if not content.strip():
        raise UnusableRowError(f"{_field_of(kind)} is empty")
    return Row(number, _whole_characters(content), entry.get("label"))


def _conversation(messages: Any, tools: Any) -> dict[str, Any]:
    if not isinstance(messages, list) or not messages:
        raise UnusableRowError("messages is not a list of messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UnusableRowError("a message has no role")
        if not isinstance(message.get("content"), str | list | None):
            raise UnusableRowError("a message's content is neither a string nor a list")
    if tools is not None and not isinstance(tools, list):
        raise UnusableRowError("tools is not a list")
    return {"conversation": messages, "tools": tools or None}


def _whole_characters(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # "\ud800" is half a character, which JSON can spell and UTF-8 cannot
        raise UnusableRowError("its text holds half a surrogate pair") from None
    return text


def _field_of(kind: Kind) -> str:
    return next(field for field, name in _KIND_OF.items() if name == kind)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    empty = True
    # Split at line feeds alone: a string may hold other characters that Python calls line ends.
    for number, line in _lines(path):
        if line is None:
            yield number, UnusableRowError(f"it is longer than {size(LONGEST_LINE)}")
        elif line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, UnusableRowError(f"it is not JSON ({error})")
        else:
            continue
        empty = False
    if empty:
        raise _empty(path)


def _lines(path: Path) -> Iterator[tuple[int, str | None]]:
    """The lines of a UTF-8 file with their numbers; None for one that is longer than any row, which is not held."""
    position = 0
    try:
        with path.open("rb") as file:
            for number in itertools.count(1):
                line = file.readline(LONGEST_LINE + 1)
                if not line:
                    return
                if len(line) > LONGEST_LINE:
                    position += len(line) + _skip_line(file, line)
                    yield number, None
                    continue
                # A byte order mark is not text.
                yield number, _decoded(path, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, position)
                position += len(line)
    except OSError as error:
        raise _unreadable(path, error) from None


def _skip_line(file: BinaryIO, line: bytes) -> int:
    """Read to the end of the line that ``line`` begins; returns how many bytes that took."""
    skipped = 0
    while line and not line.endswith(b"\n"):
        line = file.readline(LONGEST_LINE)
        skipped += len(line)
    return skipped


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DependencyError(f"{path} needs pyarrow, which reads Parquet: pip install 'mapconv[data]'.") from None
    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                batch.validate(full=True)  # offsets and text: a broken page is not an error until it is looked at
                for entry in batch.to_pylist():
                    number += 1
                    yield number, entry
    except OSError as error:
        raise _unreadable(path, error) from None
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the latter for the names of its columns
        raise DataError(f"{path} is not a Parquet file ({_first_line(error)}): write it again.") from None


def _read_utf8(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST_TEXT + 1)
    except OSError as error:
        raise _unreadable(path, error) from None
    if len(content) > LONGEST_TEXT:
        raise DataError(
            f"{path} is one text of more than {size(LONGEST_TEXT)}: give a part, or .jsonl with a document a line."
        )
    text = _decoded(path, content.removeprefix(codecs.BOM_UTF8), 0)
    if not text.strip():
        raise _empty(path)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decoded(path: Path, content: bytes, position: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = position + error.start
        raise DataError(f"{path} is not UTF-8 text (byte {byte}): convert it, or give another file.") from None


def _empty(path: Path) -> DataError:
    return DataError(f"{path} is empty: give a file with text.")


def _unreadable(path: Path, error: OSError) -> DataError:
    reason = error.strerror or _first_line(error)
    return DataError(f"{path} cannot be read ({reason}): give a text, .jsonl or .parquet file with --data.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
