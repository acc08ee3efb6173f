"""A model in one GGUF file or in the parts of a split one, and what lies beside it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mapconv.checkpoint.filenames import MODEL_CONFIG
from mapconv.checkpoint.gguf.config import config_of, sizes_of
from mapconv.checkpoint.gguf.header import GgufFile, Require, is_gguf, read_gguf
from mapconv.errors import CheckpointError
from mapconv.files import check_regular
from mapconv.jsonfile import read_object

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
_DTYPES = {"F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class GgufModel:
    """The headers of a model's files; the first has the metadata."""

    files: tuple[GgufFile, ...]

    @property
    def first(self) -> GgufFile:
        return self.files[0]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, by GGUF's names."""
        return {tensor.name: tensor.shape for file in self.files for tensor in file.tensors}

    @property
    def dtype(self) -> str:
        """What the weights are written as: the 16 bits that most of them have, float32 where all are, else bfloat16.

        Vectors are float32 in every GGUF file, and some small matrices too.
        """
        sizes: Counter[str] = Counter()
        for tensor in (tensor for file in self.files for tensor in file.tensors):
            if len(tensor.shape) > 1:
                sizes[tensor.type.name] += tensor.stop - tensor.start
        if set(sizes) == {"F32"}:
            return "float32"
        halves = {name: size for name, size in sizes.items() if name in _DTYPES}
        return _DTYPES[max(halves, key=halves.__getitem__)] if halves else "bfloat16"


def part_names(name: str) -> list[str]:
    """The files of the model that ``name`` is the first part of; itself alone where it is no part."""
    match = _PART.fullmatch(name)
    if match is None:
        return [name]
    stem, _, count, ending = match.groups()
    return [f"{stem}-{number:05d}-of-{count}{ending}" for number in range(1, int(count) + 1)]


def read_gguf_model(path: Path, require: Require | None = None) -> GgufModel:
    """The headers of the model in ``path`` and its further parts.

    Raises:
        CheckpointError: a part that is not the first, that is missing, or of another model. And as ``read_gguf``.
    """
    names = part_names(path.name)
    if path.name != names[0]:
        raise CheckpointError(f"{path} is a part of a split model: give its first part, {path.with_name(names[0])}.")
    first = read_gguf(path, require)
    count = first.metadata.get("split.count", 1)
    if count > 1 and count != len(names):
        raise CheckpointError(
            f"{path} is one of {count:,} parts, which are found by their names (NAME-00001-of-{count:05d}.gguf): give "
            "them those names."
        )
    files = [first]
    for number, name in enumerate(names[1:], 1):
        other = path.with_name(name)
        try:
            check_regular(other, CheckpointError)
        except FileNotFoundError:
            raise CheckpointError(f"{path} goes on in {name}, which is not beside it: download that too.") from None
        files.append(read_gguf(other, require))
        if files[-1].metadata.get("split.no") != number:
            raise CheckpointError(f"{other} is not part {number + 1} of {path}: download both again.")
    shapes = Counter(tensor.name for file in files for tensor in file.tensors)
    if not shapes:
        raise CheckpointError(f"{path} holds no tensors: it is not a whole model.")
    twice = [name for name, found in shapes.items() if found > 1]
    if twice:
        raise CheckpointError(f"{path}: the tensor {twice[0]} is in two of its parts: download them again.")
    return GgufModel(tuple(files))


def gguf_config(path: Path, require: Require | None = None) -> dict[str, Any]:
    """The configuration of the model in ``path``: of the ``config.json`` beside it, else from its own metadata.

    Raises:
        CheckpointError, UnsupportedError: as ``config_of``.
    """
    model = read_gguf_model(path, require)
    beside = _beside(path, model)
    return config_of(model.first, model.shapes, model.dtype) if beside is None else beside


def small_files(place: Path) -> Path:
    """Where a model's configuration and tokenizer are: its folder, or a GGUF file with none of its own beside it."""
    if not is_gguf(place):
        return place
    return place if _beside(place, read_gguf_model(place)) is None else place.parent


def notes_beside(place: Path, require: Require | None = None) -> list[str]:
    """What a user is told of the ``config.json`` beside a model's GGUF file, where it is not that model's."""
    if not is_gguf(place):
        return []
    model, config = read_gguf_model(place, require), _stored(place)
    other = None if config is None else _difference(config, model)
    if config is None or other is None:
        return []
    key, size = other
    return [
        f"the {MODEL_CONFIG} beside {place.name} is of another model and is not used: its {key} is "
        f"{config.get(key)}, and that of the file is {size}"
    ]


def _beside(path: Path, model: GgufModel) -> dict[str, Any] | None:
    """The ``config.json`` in the file's folder, if it is this model's: of its class and its sizes."""
    config = _stored(path)
    return config if config is not None and _difference(config, model) is None else None


def _stored(path: Path) -> dict[str, Any] | None:
    try:
        return read_object(path.parent / MODEL_CONFIG, CheckpointError)
    except FileNotFoundError:
        return None


def _difference(config: Mapping[str, Any], model: GgufModel) -> tuple[str, Any] | None:
    """The first size that a configuration has otherwise, with the model's own."""
    return next(((key, size) for key, size in sizes_of(model.first).items() if config.get(key) != size), None)
