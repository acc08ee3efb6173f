"""A model's ``config.json``, with what is read of it of its type, and no count that would build without end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mapconv.checkpoint.filenames import MODEL_CONFIG
from mapconv.checkpoint.gguf.header import Require, is_gguf
from mapconv.checkpoint.gguf.model import gguf_config
from mapconv.errors import CheckpointError
from mapconv.jsonfile import read_object
from mapconv.untrusted.schema import COUNT, NULL, TEXT

_SCHEMA = {
    "model_type": (TEXT, NULL),
    "architectures": ([TEXT], NULL),
    "num_hidden_layers": (COUNT, NULL),
}
#: Fields that say how many of something a class builds, one Python object each, and the most that there are.
_COUNTS = (
    (re.compile(r"(?:layers?|blocks?|depths?|stages?)$"), 10_000),
    (re.compile(r"experts?$"), 100_000),
    (re.compile(r"labels$"), 1_000_000),
)


def read_model_config(folder: Path, require: Require | None = None) -> dict[str, Any]:
    """The configuration of the model in ``folder``, or of the one in a GGUF file.

    ``require`` brings bytes of a file that is not wholly on this disk, before they are read.

    Raises:
        CheckpointError: broken, or a field of another type or beyond any model. FileNotFoundError: absent.
    """
    if is_gguf(folder):
        path, config = folder, gguf_config(folder, require)
    else:
        path = folder / MODEL_CONFIG
        config = read_object(path, CheckpointError, schema=_SCHEMA)
    for place, name, number in _numbers(config, ""):
        for pattern, most in _COUNTS:
            if number > most and pattern.search(name):
                raise CheckpointError(f"{path}: {place} is {number}, expected at most {most:,}: correct it.")
    return config


def _numbers(value: Any, place: str, name: str = "") -> Iterator[tuple[str, str, int]]:
    """(place, name, number) of every whole number; a list's items have the list's name."""
    if type(value) is int:
        yield place, name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{place}.{key}" if place else key, key)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _numbers(item, f"{place}[{number}]", name)
