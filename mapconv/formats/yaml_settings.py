"""The settings that some trainers write as YAML beside an adapter's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mapconv.errors import AdapterError
from mapconv.files import read_bytes
from mapconv.untrusted import yamltext
from mapconv.untrusted.schema import Schema, fault

_LONGEST = 1 << 20


def read_settings(path: Path, schema: Schema) -> dict[str, Any]:
    """The table in a YAML file; ``schema`` has the types of the fields that the caller reads.

    Raises:
        AdapterError: absent, too long, no YAML table, or with a field of another type.
    """
    try:
        content = read_bytes(path, AdapterError, limit=_LONGEST)
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing: get it from where the weights beside it are from.") from None
    try:
        loader, node = yamltext.parse(content, longest=_LONGEST)
        table = None if node is None else yamltext.construct(loader, node)
    except yamltext.YamlError as error:
        raise AdapterError(f"{path}, line {error.line}: {error}.") from None
    if not isinstance(table, dict):
        raise AdapterError(f"{path} holds no table: get the file again.")
    wrong = fault(table, schema)
    if wrong is not None:
        raise AdapterError(f"{path}: {wrong}.")
    return table
