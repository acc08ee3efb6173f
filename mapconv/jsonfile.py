"""JSON as mapconv reads and prints it: objects only, one sentence for what is broken, and no NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mapconv.errors import MapconvError
from mapconv.files import SMALL, read_bytes
from mapconv.untrusted.schema import Schema
from mapconv.untrusted.schema import fault as schema_fault

#: No file of this field nests deeper, and what walks through a table may recurse.
MOST_NESTING = 64

#: How the text begins that Git-LFS puts in a file's place until the file is pulled.
LFS_POINTER = b"version https://git-lfs"


def read_object(
    path: Path,
    kind: type[MapconvError],
    *,
    schema: Schema | None = None,
    advice: str = "download it again",
    limit: int = SMALL,
) -> dict[str, Any]:
    """The table in a JSON file of at most ``limit`` bytes, which lies in its folder (``mapconv.files``).

    ``schema`` has the types of the fields that the caller reads.

    Raises:
        kind: no regular file of that folder, too long, not JSON, not an object, nested too deeply, with half a
            surrogate pair in a text, or with a field of another type.
        FileNotFoundError: absent; what that means is the caller's to say.
    """
    content = read_bytes(path, kind, limit=limit)
    if content.startswith(LFS_POINTER):
        raise kind(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder.")
    try:
        table = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise kind(f"{path} is not JSON ({error}): {advice}.") from None
    if not isinstance(table, dict):
        raise kind(f"{path} holds {type(table).__name__}, expected an object: {advice}.")
    fault = _unusable(table, content)
    if fault is None and schema is not None:
        fault = schema_fault(table, schema)
    if fault is not None:
        raise kind(f"{path}: {fault}: {advice}.")
    return table


def _unusable(table: dict[str, Any], content: bytes) -> str | None:
    """What makes a table that is JSON a trap for whoever walks through it or writes it."""
    # Few brackets cannot nest deeply; and only an escape can spell half a character.
    if content.count(b"[") + content.count(b"{") > MOST_NESTING:
        level: list[Any] = [table]
        for _ in range(MOST_NESTING):
            level = [item for held in level for item in _items(held) if isinstance(item, dict | list)]
        if level:
            return f"it nests deeper than {MOST_NESTING} levels"
    if b"\\u" in content:
        try:
            json.dumps(table, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return "a text holds half a surrogate pair, which no file can hold"
    return None


def _items(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object (``object_pairs_hook``) in which no name stands twice: readers differ in which of the two counts.

    Raises:
        ValueError: with the name.
    """
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return table


def finite(value: Any) -> Any:
    """``value`` with null in place of every number that is not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
