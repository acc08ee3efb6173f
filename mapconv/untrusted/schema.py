"""The types that a reader needs from a file that anybody may have written, and the sentence for what is not so.

A schema is a ``Kind``; a list with one schema, of which each item is one; a table of the fields that are read (others
are free, and a field that is absent counts as null); ``Each``; or a tuple of alternatives.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from mapconv.wording import counted


@dataclass(frozen=True)
class Kind:
    """A plain value: the words for it, and the test."""

    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Each:
    """A table of any names, each value of which fits ``schema``."""

    schema: Any


Schema: TypeAlias = "Kind | Each | list[Any] | dict[str, Any] | tuple[Any, ...]"

TEXT = Kind("a text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
NULL = Kind("null", lambda value: value is None)
TABLE = Kind("a table", lambda value: isinstance(value, dict))
#: bool is an int to isinstance; larger whole numbers than torch's and a file system's count nothing.
COUNT = Kind("a whole number of at least 0", lambda value: type(value) is int and 0 <= value < 2**63)


def _is_finite(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


NUMBER = Kind("a number", _is_finite)


def fault(value: Any, schema: Schema, place: str = "") -> str | None:
    """What is wrong with the first value that does not fit, or None: ``modules[3].rank is "4", expected …``."""
    if isinstance(schema, Kind):
        return None if schema.holds(value) else _fault(place, value, schema.words)
    if isinstance(schema, tuple):
        return _fault_of_all(value, schema, place)
    if isinstance(schema, list):
        if not isinstance(value, list):
            return _fault(place, value, "a list")
        found = (fault(item, schema[0], f"{place}[{number}]") for number, item in enumerate(value))
    else:
        if not isinstance(value, dict):
            return _fault(place, value, "a table")
        parts = dict.fromkeys(value, schema.schema) if isinstance(schema, Each) else schema
        dot = f"{place}." if place else ""
        found = (fault(value.get(name), part, f"{dot}{name}") for name, part in parts.items())
    return next((text for text in found if text is not None), None)


def with_nulls(value: Any, schema: Schema) -> Any:
    """A value that fits, with null for each field that is absent, so that all of them may be looked up."""
    if isinstance(schema, tuple):
        schema = next((part for part in schema if fault(value, part) is None), schema[0])
    if isinstance(schema, list):
        return [with_nulls(item, schema[0]) for item in value]
    if isinstance(schema, Each):
        return {name: with_nulls(item, schema.schema) for name, item in value.items()}
    if isinstance(schema, dict):
        return value | {name: with_nulls(value.get(name), part) for name, part in schema.items()}
    return value


def _fault_of_all(value: Any, schemas: tuple[Any, ...], place: str) -> str | None:
    for schema in schemas:
        text = fault(value, schema, place)
        if text is None:
            return None
        if isinstance(value, list | dict) and type(schema) is type(value):
            return text  # of the alternative that was meant
    return _fault(place, value, " or ".join(map(_words, schemas)))


def _words(schema: Schema) -> str:
    if isinstance(schema, Kind):
        return schema.words
    return "a list" if isinstance(schema, list) else "a table"


def _fault(place: str, value: Any, expected: str) -> str:
    return f"{place or 'it'} is {shown(value)}, expected {expected}"


def shown(value: Any) -> str:
    """A value as JSON, or what is sure to be told apart from a whole one: where a text was cut, how long a table is."""
    text = json.dumps(value, default=str)
    if len(text) <= 60:
        return text
    if isinstance(value, str):
        return f'{json.dumps(value[:50])[:-1]}…"'
    if isinstance(value, list | dict):
        return f"<{type(value).__name__} of {counted(len(value), 'item')}>"
    return f"{text[:50]}…"
