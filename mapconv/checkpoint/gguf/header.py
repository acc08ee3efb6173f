"""Read what a GGUF file holds from its header: metadata, and each tensor's name, shape, type and place.

Headers are hostile until proven otherwise: counts and lengths are held to the file's size before anything is read for
them, long arrays (a vocabulary, its merges) are passed over, and every tensor must lie inside the file, alone.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from mapconv.checkpoint.gguf.types import BLOCK_TYPES, KNOWN_TYPES, BlockType
from mapconv.checkpoint.headers import MAX_HEADER_BYTES, MAX_NAME, MAX_SIZE
from mapconv.checkpoint.unchanged import FileSignature
from mapconv.errors import CheckpointError, UnsupportedError
from mapconv.files import open_regular

MAGIC, VERSIONS = b"GGUF", (2, 3)
#: Several times what any model has; each costs a Python object.
_MOST_KEYS, _MOST_TENSORS, _MOST_DIMENSIONS = 10_000, 200_000, 4
#: Longer arrays and texts are passed over: sizes and settings are all that is read here.
_LONGEST_ARRAY, _LONGEST_TEXT = 4_096, 1 << 20
#: Read at a time.
_WINDOW = 1 << 20
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
#: Small tensors that are settings of the model, not weights: their values count as metadata.
SETTING_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

#: Asked for the bytes [start, stop) of a file before they are read.
Require = Callable[[Path, int, int], None]


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its shape in torch's order (GGUF lists the last dimension first) and where its bytes begin."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    start: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.type.elements * self.type.nbytes

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.row_bytes


@dataclass(frozen=True)
class GgufFile:
    """A header: metadata without its long arrays, and the tensors in the order of their bytes."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]
    signature: FileSignature
    settings: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def is_gguf(path: Path) -> bool:
    """Whether a model's path names a GGUF file, by its ending."""
    return path.suffix.lower() == ".gguf"


def read_gguf(path: Path, require: Require | None = None) -> GgufFile:
    """Parse and validate the header of one GGUF file.

    Args:
        path: the file.
        require: where the file is not wholly on this disk, what fetches the bytes that are about to be read.

    Raises:
        CheckpointError: not a GGUF file, or a header that lies about what the file holds. UnsupportedError: a version
            or a block type that mapconv does not read.
    """
    with open_regular(path, CheckpointError) as file:
        signature = FileSignature.of(os.fstat(file.fileno()))
    return _read(path, signature.size, signature if require is None else None, require)


@lru_cache(8)
def _parsed(path: Path, size: int, signature: FileSignature) -> GgufFile:
    return _parse(path, size, None)


def _read(path: Path, size: int, signature: FileSignature | None, require: Require | None) -> GgufFile:
    """A vocabulary takes a moment to pass over, and several parts of a command ask for the same header."""
    return _parse(path, size, require) if signature is None else _parsed(path, size, signature)


def _parse(path: Path, size: int, require: Require | None) -> GgufFile:
    with open_regular(path, CheckpointError) as file:
        cursor = _Cursor(path, file.fileno(), size, require)
        start = cursor.take(min(8, size))
        if start[:4] != MAGIC:
            raise CheckpointError(f"{path} does not begin as a GGUF file does: download it again.")
        version = int.from_bytes(start[4:], "little")
        if version not in VERSIONS:
            raise UnsupportedError(
                f"{path} is a GGUF file of version {version:,}, and mapconv reads 2 and 3 (little-endian): convert the "
                "model again with a current llama.cpp."
            )
        tensors, keys = cursor.number("Q"), cursor.number("Q")
        if tensors > _MOST_TENSORS or keys > _MOST_KEYS:
            raise cursor.wrong(f"claims {tensors:,} tensors and {keys:,} settings")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = cursor.text("a setting's name", MAX_NAME)
            if key in metadata:
                raise cursor.wrong(f"has the setting {key} twice")
            metadata[key] = _value(cursor, key)
        described = [_tensor(cursor) for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise cursor.wrong(f"has general.alignment {alignment!r}, expected a power of two")
        placed = _placed(cursor, described, -(-cursor.position // alignment) * alignment)
        settings = {tensor.name: _floats(cursor, tensor) for tensor in placed if tensor.name in SETTING_TENSORS}
        return GgufFile(path, metadata, placed, FileSignature.of(os.fstat(file.fileno())), settings)


def _value(cursor: _Cursor, key: str) -> Any:
    """A setting's value; None for an array or a text that is passed over."""
    kind = cursor.number("I")
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind])
    if kind == _TEXT:
        return cursor.long_text()
    if kind != _ARRAY:
        raise cursor.wrong(f"has the setting {key} of an unknown type ({kind})")
    kind, count = cursor.number("I"), cursor.number("Q")
    if kind == _TEXT:
        cursor.skip_texts(count)
        return None
    if kind not in _SCALARS:
        raise cursor.wrong(f"has the setting {key}, an array of an unknown type ({kind})")
    code = _SCALARS[kind]
    if count > _LONGEST_ARRAY:
        cursor.skip(count * struct.calcsize(code))
        return None
    return list(struct.unpack(f"<{count}{code}", cursor.take(count * struct.calcsize(code))))


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], BlockType, int]:
    """(name, shape, type, offset) of the next tensor's entry."""
    name = cursor.text("a tensor's name", MAX_NAME)
    dimensions = cursor.number("I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise cursor.wrong(f"gives {name} {dimensions:,} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    number, offset = cursor.number("I"), cursor.number("Q")
    kind = BLOCK_TYPES.get(number)
    if kind is None:
        known = KNOWN_TYPES.get(number, f"number {number}")
        raise UnsupportedError(
            f"{cursor.path}: {name} is stored as {known}, a GGUF type that mapconv does not read: give a file in "
            "another quantization, or the 16-bit model."
        )
    if not all(shape) or math.prod(shape) > MAX_SIZE or shape[-1] % kind.elements:
        raise cursor.wrong(f"gives {name} the shape {list(shape)} in {kind.name} blocks of {kind.elements}")
    return name, shape, kind, offset


def _placed(cursor: _Cursor, described: list[tuple[str, tuple[int, ...], BlockType, int]], start: int):
    tensors = sorted(
        (GgufTensor(name, shape, kind, start + offset) for name, shape, kind, offset in described),
        key=lambda tensor: (tensor.start, tensor.stop),
    )
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise cursor.wrong("has two tensors of one name")
    position = start
    for tensor in tensors:
        if tensor.start < position:
            raise cursor.wrong(f"lays {tensor.name} over the tensor before it")
        position = tensor.stop
    if position > cursor.size:
        raise CheckpointError(
            f"{cursor.path} is {cursor.size:,} bytes long but its header describes {position:,}: it is truncated, "
            "download it again."
        )
    return tuple(tensors)


def _floats(cursor: _Cursor, tensor: GgufTensor) -> tuple[float, ...]:
    count = math.prod(tensor.shape)
    if tensor.type.name != "F32" or count > _LONGEST_ARRAY:
        raise cursor.wrong(f"has {tensor.name} as {tensor.type.name} {list(tensor.shape)}, expected a few floats")
    return struct.unpack(f"<{count}f", cursor.at(tensor.start, 4 * count))


class _Cursor:
    """Reads forward through a header, a window at a time, and never beyond the file's size or a header's limit."""

    def __init__(self, path: Path, descriptor: int, size: int, require: Require | None) -> None:
        self.path, self.size, self.position = path, size, 0
        self._descriptor, self._require = descriptor, require
        self._window, self._start = b"", 0

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} {what}: the header cannot be trusted, download the file again.")

    def at(self, start: int, count: int) -> bytes:
        """Bytes from anywhere in the file."""
        if self._require is not None:
            self._require(self.path, start, start + count)
        data = os.pread(self._descriptor, count, start)
        if len(data) < count:
            raise CheckpointError(f"{self.path} ends within its header: it is truncated, download it again.")
        return data

    def take(self, count: int) -> bytes:
        position = self.position
        self.skip(count)
        if position < self._start or position + count > self._start + len(self._window):
            length = min(max(count, _WINDOW), self.size - position)
            self._window, self._start = self.at(position, length), position
        return self._window[position - self._start : position - self._start + count]

    def skip(self, count: int) -> None:
        self.position += count
        if self.position > min(self.size, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{self.path} claims a header of {self.position:,} bytes or more in a file of {self.size:,}: it is "
                "truncated or not a GGUF file, download it again."
            )

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def text(self, what: str, longest: int) -> str:
        length = self.number("Q")
        if length > longest:
            raise self.wrong(f"has {what} of {length:,} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.wrong(f"has {what} that is not UTF-8") from None

    def long_text(self) -> str | None:
        """A text, unless it is too long to be a setting or is broken."""
        length = self.number("Q")
        if length > _LONGEST_TEXT:
            self.skip(length)
            return None
        return self.take(length).decode(errors="replace")

    def skip_texts(self, count: int) -> None:
        if count > MAX_HEADER_BYTES // 8:
            raise self.wrong(f"has an array of {count:,} texts")
        end = self.position
        for _ in range(count):
            # A vocabulary has hundreds of thousands: the window is looked into without a call for each.
            place = end - self._start
            if not 0 <= place <= len(self._window) - 8:
                self.position = end
                self.take(8)
                place = 0
            end += 8 + _LENGTH.unpack_from(self._window, place)[0]
        self.position = end
        self.skip(0)
