"""Read what a checkpoint holds (names, shapes, dtypes, byte ranges) from headers alone.

Headers are hostile until proven otherwise: nothing is allocated because a header claims a size, and every byte range
must lie inside its file, with neither overlap nor hole, as the safetensors format demands.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

from mapconv.adapter import ITEM_SIZES, TensorRef
from mapconv.checkpoint.sidecars import check_folder
from mapconv.checkpoint.unchanged import FileMark
from mapconv.errors import CheckpointError
from mapconv.files import LARGE, open_regular
from mapconv.jsonfile import read_object
from mapconv.untrusted.schema import NULL, TABLE, TEXT, Each

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_INDEX = {"weight_map": Each(TEXT), "metadata": (TABLE, NULL)}
#: The format's own limit on the header's length (safetensors' MAX_HEADER_SIZE).
MAX_HEADER_BYTES = 100_000_000
#: The largest size that a file system or torch can speak of, and the most dimensions of a torch tensor.
MAX_SIZE, MAX_DIMENSIONS = 2**63 - 1, 64
#: Several times the longest path of any model's module: names are compared with each other, letter by letter.
MAX_NAME = 1_000


@dataclass(frozen=True)
class TensorFile:
    """One safetensors file: its tensors in the order of their bytes, its string metadata, and its state when read."""

    path: Path
    tensors: tuple[TensorRef, ...]
    metadata: dict[str, str]
    mark: FileMark


class ByteSource(Protocol):
    """Where the bytes of a file come from that is not wholly on this disk (``mapconv.hub.ranges``)."""

    def require(self, file: Path, start: int, stop: int) -> None:
        """Return once the bytes [start, stop) of ``file`` are on the disk; other files than its own are there."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights: one safetensors file, or several with an index; ``source`` None is all on this disk."""

    folder: Path
    files: tuple[TensorFile, ...]
    index_metadata: dict[str, Any] | None = None
    tensors: dict[str, TensorRef] = field(default_factory=dict)
    source: ByteSource | None = None

    @property
    def nbytes(self) -> int:
        return sum(ref.nbytes for ref in self.tensors.values())

    @property
    def marks(self) -> dict[Path, FileMark]:
        """The files that must not change while they are read: those of a base on the Hub grow by what is read."""
        return {file.path: file.mark for file in self.files} if self.source is None else {}


def read_tensor_file(path: Path) -> TensorFile:
    """Parse and validate the header of one safetensors file; the tensors' values are not read.

    Raises:
        CheckpointError: not a safetensors file, or a header that lies about what the file holds.
    """
    header_bytes, status = _header_bytes(path)
    size = status.st_size
    try:
        header = json.loads(header_bytes.decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a header that is not JSON ({error}): download the file again.") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a header that is no JSON object: download the file again.")
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
            raise CheckpointError(f"{path}: tensor {ref.name} {fault}: the header is not to be trusted.")
        position = stop
    if position != size:
        raise CheckpointError(
            f"{path} is {size:,} bytes long but its header describes {position:,}: the file is "
            f"{'truncated' if size < position else 'too long'}, download it again."
        )
    return TensorFile(path, tuple(ref for _, _, ref in placed), metadata, FileMark.of(status))


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of the model in ``folder``.

    A single ``model.safetensors`` wins over an index, as it does in transformers.

    Raises:
        CheckpointError: no safetensors weights, an index and shards that do not agree, or a link out of the folder.
    """
    check_folder(folder, CheckpointError)
    single = folder / SINGLE_FILE
    if single.exists():
        return _checkpoint(folder, [read_tensor_file(single)], None)
    index_path = folder / INDEX_FILE
    if index_path.exists():
        return _read_sharded(folder, index_path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give the base model's folder with --base.")
    if any(folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder} holds its weights as a pickle (.bin) only, and mapconv reads safetensors: convert the model "
            "with save_pretrained() first."
        )
    raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: it is not a model folder.")


def _read_sharded(folder: Path, index_path: Path) -> Checkpoint:
    index = read_object(index_path, CheckpointError, schema=_INDEX, limit=LARGE)
    weight_map = index["weight_map"]
    if not weight_map:
        raise CheckpointError(f"{index_path} has no weight_map: download it again.")
    shard_names = sorted(set(weight_map.values()))
    for name in shard_names:
        # The name must not lead elsewhere; a link, of which the Hub's cache is made, is checked when it is opened.
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise CheckpointError(f"{index_path} points outside its folder ({name}): refusing to follow it.")
        if not os.path.exists(folder / name):  # false, where Path.exists() raises, for a name that can be no file's
            raise CheckpointError(f"{index_path} lists {name}, which is not in {folder}: download the missing shard.")
    files = [read_tensor_file(folder / name) for name in shard_names]
    checkpoint = _checkpoint(folder, files, index.get("metadata") or {})
    for name, shard in weight_map.items():
        ref = checkpoint.tensors.get(name)
        if ref is None or ref.file.name != shard:
            raise CheckpointError(f"{index_path} says that {name} is in {shard}, but it is not: download both again.")
    return checkpoint


def _checkpoint(folder: Path, files: list[TensorFile], index_metadata: dict[str, Any] | None) -> Checkpoint:
    tensors: dict[str, TensorRef] = {}
    for file in files:
        for ref in file.tensors:
            if ref.name in tensors:
                raise CheckpointError(
                    f"{folder}: tensor {ref.name} is in {tensors[ref.name].file.name} and {file.path.name}."
                )
            tensors[ref.name] = ref
    if not tensors:
        raise CheckpointError(f"{folder} holds no tensors: its safetensors files are empty.")
    return Checkpoint(folder, tuple(files), index_metadata, tensors)


def _header_bytes(path: Path) -> tuple[bytes, os.stat_result]:
    """The header's JSON bytes and the file's state, after checking the claimed length against both limits."""
    with open_regular(path, CheckpointError) as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        prefix = file.read(8)
        if not prefix:
            raise CheckpointError(f"{path} is empty: download it again.")
        if prefix == b"version ":
            raise CheckpointError(f"{path} is a Git-LFS pointer, not the weights: run `git lfs pull` in its folder.")
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
        raise CheckpointError(f"{path}: the tensor name {name!r} is no valid Unicode: the header is not to be trusted.")
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


def _naturals(value: Any) -> bool:
    # bool is an int to isinstance, and JSON's true must not pass for a size of 1.
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MAX_SIZE for item in value)


def _is_text(value: Any) -> bool:
    """Whether this is a string that can be written again: JSON's escapes can spell half a character (``\\ud800``)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return table
