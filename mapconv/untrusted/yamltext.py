"""YAML of strangers: values without aliases, which multiply, without deep nesting, and without Python's exceptions."""

from __future__ import annotations

from typing import Any

_MOST_NESTING = 16
#: Python prints no longer ones, and no field of ours counts so far.
_LARGEST = 2**64


class YamlError(ValueError):
    """What is wrong, and the line, counted from 1."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def parse(text: str | bytes, *, longest: int) -> tuple[Any, Any]:
    """(loader, node): the tree of a document, from which ``construct`` makes values; the node is None for an empty one.

    ``longest`` is the most that is read: a megabyte takes about a second.

    Raises:
        YamlError: not YAML, too long, or with an alias or nesting that no file of this field has.
    """
    import yaml

    if len(text) > longest:
        raise YamlError(1, f"longer than {longest:,} bytes")
    loader_class = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _refuse_traps(yaml, loader_class(text))
        loader = loader_class(text)
        return loader, loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise YamlError(mark.line + 1 if mark else 1, f"not YAML ({_short(error)})") from None


def construct(loader: Any, node: Any) -> Any:
    """The value of a node.

    Raises:
        YamlError: a value that its tag does not allow, such as the 30th of February.
    """
    try:
        value = loader.construct_object(node, deep=True)
    except Exception as error:  # its constructors raise whatever int(), date() and a table of words raise
        raise YamlError(node.start_mark.line + 1, f"not a value ({_short(error)})") from None
    if _has_huge_number(value):
        raise YamlError(node.start_mark.line + 1, "not a value (a number of more than 64 bits)")
    return value


def _refuse_traps(yaml: Any, loader: Any) -> None:
    """Before anything is built from them."""
    depth = 0
    while loader.check_event():
        event = loader.get_event()
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > _MOST_NESTING:
            raise YamlError(event.start_mark.line + 1, "anchors, aliases and deep nesting are not allowed here")


def _has_huge_number(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_huge_number(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple | set):
        return any(map(_has_huge_number, value))
    return isinstance(value, int) and abs(value) > _LARGEST


def _short(error: Exception) -> str:
    text = getattr(error, "problem", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:160]
