"""Read what a checkpoint holds (names, shapes, dtypes, byte ranges) from headers alone.

Headers are hostile until proven otherwise: nothing is allocated because a header claims a size, and every byte range
must lie inside its file, with neither overlap nor hole, as the safetensors format demands.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mapconv.adapter import ITEM_SIZES, TensorRef
from mapconv.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: The format's own limit on the header's length (safetensors' MAX_HEADER_SIZE).
MAX_HEADER_BYTES = 100_000_000
#: The largest size that a file system or torch can speak of, and the most dimensions of a torch tensor.
MAX_SIZE, MAX_DIMENSIONS = 2**63 - 1, 64


@dataclass(frozen=True)
class TensorFile:
    """One safetensors file: its tensors in the order of their bytes, and its string metadata."""

    path: Path
    tensors: tuple[TensorRef, ...]
    metadata: dict[str, str]


class ByteSource(Protocol):
    """Where the bytes of a file come from that is not wholly on this disk (``mapconv.hub.ranges``)."""

    def require(self, file: Path, start: int, stop: int) -> None:
        """Return once the bytes [start, stop) of ``file`` are on the disk; other files than its own are there."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights: one safetensors file, or several with an index; ``source`` None is all on this disk.

    Where ``files`` show a quantized model as one of plain weights, ``stored_files`` are what they really hold.
    """

    folder: Path
    files: tuple[TensorFile, ...]
    index_metadata: dict[str, Any] | None = None
    tensors: dict[str, TensorRef] = field(default_factory=dict)
    source: ByteSource | None = None
    stored_files: tuple[TensorFile, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(ref.nbytes for ref in self.tensors.values())


def read_tensor_file(path: Path) -> TensorFile:
    """Parse and validate the header of one safetensors file; the tensors' values are not read.

    Raises:
        CheckpointError: not a safetensors file, or a header that lies about what the file holds.
    """
    header_bytes, size = _header_bytes(path)
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
    refs = sorted(
        (_tensor_ref(path, name, entry, data_start) for name, entry in header.items()),
        key=lambda ref: (ref.start, ref.stop),
    )
    position = data_start
    for ref in refs:
        if ref.start != position:
            fault = "overlaps the tensor before it" if ref.start < position else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {ref.name} {fault}: the header is not to be trusted.")
        position = ref.stop
    if position != size:
        raise CheckpointError(
            f"{path} is {size:,} bytes long but its header describes {position:,}: the file is "
            f"{'truncated' if size < position else 'too long'}, download it again."
        )
    return TensorFile(path, tuple(refs), metadata)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of the model in ``folder``.

    A single ``model.safetensors`` wins over an index, as it does in transformers.

    Raises:
        CheckpointError: no safetensors weights, or an index and shards that do not agree.
    """
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
    if any(folder.glob("*.gguf")):
        raise CheckpointError(
            f"{folder} holds its weights as GGUF, and mapconv reads safetensors: give the model that they were made "
            "from with --base."
        )
    raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: it is not a model folder.")


def _read_sharded(folder: Path, index_path: Path) -> Checkpoint:
    try:
        index = json.loads(index_path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index_path} is not JSON ({error}): download it again.") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has no weight_map: download it again.")
    shard_names = sorted({str(name) for name in weight_map.values()})
    for name in shard_names:
        # A shard may be a symlink (the Hub cache is made of them), but its *name* must not lead elsewhere.
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise CheckpointError(f"{index_path} points outside its folder ({name}): refusing to follow it.")
        if not os.path.exists(folder / name):  # false, where Path.exists() raises, for a name that can be no file's
            raise CheckpointError(f"{index_path} lists {name}, which is not in {folder}: download the missing shard.")
    files = [read_tensor_file(folder / name) for name in shard_names]
    metadata = index.get("metadata")
    checkpoint = _checkpoint(folder, files, metadata if isinstance(metadata, dict) else {})
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


def _header_bytes(path: Path) -> tuple[bytes, int]:
    """The header's JSON bytes and the file's size, after checking the claimed length against both limits."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
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
        return file.read(length), size


def _tensor_ref(path: Path, name: str, entry: Any, data_start: int) -> TensorRef:
    if not _is_text(name):
        raise CheckpointError(f"{path}: the tensor name {name!r} is no valid Unicode: the header is not to be trusted.")
    where = f"{path}: tensor {name}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} is described by {type(entry).__name__}, expected an object.")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise CheckpointError(f"{where} has dtype {dtype!r}, which mapconv does not know.")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{where} has shape {shape!r}, expected a list of sizes.")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has data_offsets {offsets!r}, expected [start, stop].")
    ref = TensorRef(path, name, dtype, tuple(shape), data_start + offsets[0])
    if ref.nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where} of shape {list(shape)} and dtype {dtype} needs {ref.nbytes:,} bytes, but its header gives it "
            f"{offsets[1] - offsets[0]:,}."
        )
    return ref


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
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"the name {name!r} stands twice")
        table[name] = value
    return table
