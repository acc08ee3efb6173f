"""Read what a safetensors file holds (names, shapes, dtypes, byte ranges) from its header alone.

Headers are hostile until proven otherwise: nothing is allocated because a header claims a size, and every byte range
must lie inside its file, with neither overlap nor hole, as the safetensors format demands.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import OrderedDict
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from threading import Lock
from typing import Any, TypeGuard

from mapconv.adapter import ITEM_SIZES, TensorRef
from mapconv.checkpoint.unchanged import FileSignature
from mapconv.errors import CheckpointError
from mapconv.files import open_regular
from mapconv.jsonfile import without_duplicates

#: The format's own limit on the header's length (safetensors' MAX_HEADER_SIZE).
MAX_HEADER_BYTES = 100_000_000
#: The largest size that a file system or torch can speak of, and the most dimensions of a torch tensor.
MAX_SIZE, MAX_DIMENSIONS = 2**63 - 1, 64
#: Tensors of models' files whose records a process keeps.
KEPT_TENSORS = 20_000
#: Several times the longest path of any model's module: names are compared with each other, letter by letter.
MAX_NAME = 1_000


@dataclass(frozen=True)
class TensorFile:
    """One safetensors file: its tensors in the order of their bytes, its string metadata, and its state when read."""

    path: Path
    tensors: tuple[TensorRef, ...]
    metadata: dict[str, str]
    signature: FileSignature


_kept: OrderedDict[tuple[str, Path], TensorFile] = OrderedDict()
_lock = Lock()


def read_model_file(path: Path) -> TensorFile:
    """As ``read_tensor_file``, of a file that many adapters are placed on: parsed anew only when it has changed."""
    with open_regular(path, CheckpointError) as file:
        signature = FileSignature.of(os.fstat(file.fileno()))
    key = os.path.abspath(path), path
    with _lock:
        known = _kept.get(key)
    if known is None or known.signature != signature:
        known = read_tensor_file(path)
    with _lock:
        _kept[key] = known
        _kept.move_to_end(key)
        while sum(len(kept.tensors) for kept in _kept.values()) > KEPT_TENSORS:
            _kept.popitem(last=False)
    return known


def read_tensor_file(path: Path) -> TensorFile:
    """Parse and validate the header of one safetensors file; the tensors' values are not read.

    Raises:
        CheckpointError: not a safetensors file, or a header that lies about what the file holds.
    """
    header_bytes, status = _header_bytes(path)
    size = status.st_size
    try:
        header = json.loads(header_bytes.decode(), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a header that is not JSON ({error}): download the file again.") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a header that is not a JSON object: download the file again.")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(map(_is_text, [*metadata, *metadata.values()])):
        raise CheckpointError(f"{path} has __metadata__ that is not a table of strings: download the file again.")
    data_start = 8 + len(header_bytes)
    placed = [_tensor_ref(path, name, entry, data_start) for name, entry in header.items()]
    placed.sort(key=itemgetter(0, 1))
    position = data_start
    for start, stop, ref in placed:
        if start != position:
            fault = "overlaps the tensor before it" if start < position else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {ref.name} {fault}: the header cannot be trusted.")
        position = stop
    if position != size:
        raise CheckpointError(
            f"{path} is {size:,} bytes long but its header describes {position:,}: the file is "
            f"{'truncated' if size < position else 'too long'}, download it again."
        )
    return TensorFile(path, tuple(ref for _, _, ref in placed), metadata, FileSignature.of(status))


def _header_bytes(path: Path) -> tuple[bytes, os.stat_result]:
    """The header's JSON bytes and the file's state, after checking the claimed length against both limits."""
    with open_regular(path, CheckpointError) as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        prefix = file.read(8)
        if not prefix:
            raise CheckpointError(f"{path} is empty: download it again.")
        if prefix == b"version ":
            raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder.")
        if len(prefix) < 8:
            raise CheckpointError(f"{path} is only {size} bytes long: it is not a safetensors file.")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES or length > size - 8:
            raise CheckpointError(
                f"{path} claims a header of {length:,} bytes in a file of {size:,}: it is truncated or not a "
                "safetensors file, download it again."
            )
        return file.read(length), status


def _tensor_ref(path: Path, name: str, entry: Any, data_start: int) -> tuple[int, int, TensorRef]:
    """(start, stop, tensor) of one entry of the header."""
    if not _is_text(name):
        raise CheckpointError(f"{path}: the tensor name {name!r} is not valid Unicode: the header cannot be trusted.")
    if len(name) > MAX_NAME:
        raise CheckpointError(
            f"{path}: the tensor name {name[:60]!r}… has {len(name):,} characters, expected at most {MAX_NAME:,}: the "
            "header is not to be trusted."
        )
    if not isinstance(entry, dict):
        raise _wrong(path, name, f"is described by {type(entry).__name__}, expected an object.")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise _wrong(path, name, f"has dtype {dtype!r}, which mapconv does not know.")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise _wrong(path, name, f"has shape {shape!r}, expected a list of sizes.")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _wrong(path, name, f"has data_offsets {offsets!r}, expected [start, stop].")
    start, stop = offsets
    nbytes = math.prod(shape) * ITEM_SIZES[dtype]
    if nbytes != stop - start:
        raise _wrong(
            path,
            name,
            f"of shape {list(shape)} and dtype {dtype} needs {nbytes:,} bytes, but its header gives it "
            f"{stop - start:,}.",
        )
    return data_start + start, data_start + stop, TensorRef(path, name, dtype, tuple(shape), data_start + start)


def _wrong(path: Path, name: str, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: tensor {name} {what}")


def _naturals(value: Any) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        # bool is an int to isinstance, and JSON's true must not pass for a size of 1.
        return False
    return not value or (min(value) >= 0 and max(value) <= MAX_SIZE)


def _is_text(value: Any) -> bool:
    """Whether this is a string that can be written again: JSON's escapes can spell half a character (``\\ud800``)."""
    if not isinstance(value, str):
        return False
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
