"""What a checkpoint holds, read from headers alone: one safetensors file, several with an index, or a GGUF file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from mapconv.adapter import TensorRef
from mapconv.checkpoint.filenames import PIPELINE_FILE, STEMS, weights_files
from mapconv.checkpoint.gguf.header import is_gguf
from mapconv.checkpoint.gguf.model import read_gguf_model
from mapconv.checkpoint.headers import TensorFile, read_model_file
from mapconv.checkpoint.sidecars import check_folder
from mapconv.checkpoint.unchanged import FileSignature
from mapconv.errors import CheckpointError
from mapconv.files import LARGE
from mapconv.jsonfile import read_object
from mapconv.untrusted.schema import NULL, TABLE, TEXT, Each

_INDEX = {"weight_map": Each(TEXT), "metadata": (TABLE, NULL)}


class ByteSource(Protocol):
    """Where the bytes of a file come from that is not wholly on this disk (``mapconv.hub.ranges``)."""

    def require(self, file: Path, start: int, stop: int) -> None:
        """Return once the bytes [start, stop) of ``file`` are on the disk; other files than its own are there."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights: one safetensors file, or several with an index; ``source`` None is all on this disk.

    ``stem`` is what its files are called, one of ``STEMS``. Where ``files`` show a quantized model as one of plain
    weights, ``stored_files`` are what they really hold.

    A pipeline has several ``models``, each in a folder of its own; its tensors are theirs, with the folder's name
    before each (``unet.conv_in.weight``). A checkpoint that is one file, of whatever name, has it as its ``folder``.
    """

    folder: Path
    files: tuple[TensorFile, ...]
    index_metadata: dict[str, Any] | None = None
    tensors: dict[str, TensorRef] = field(default_factory=dict)
    source: ByteSource | None = None
    stored_files: tuple[TensorFile, ...] = ()
    stem: str = STEMS[0]
    models: tuple[Checkpoint, ...] = ()

    @property
    def is_file(self) -> bool:
        """Whether this is one file of safetensors without a folder of its own: weights and nothing else."""
        return self.files[0].path == self.folder and not is_gguf(self.folder)

    @property
    def parts(self) -> tuple[tuple[str, Checkpoint], ...]:
        """Each model with what its tensors' names begin with here."""
        return tuple((f"{model.folder.name}.", model) for model in self.models) or (("", self),)

    @property
    def single_file(self) -> str:
        """The name of the weights file where there is one."""
        return weights_files(self.stem)[0]

    @property
    def index_file(self) -> str:
        """The name of the index where there are several."""
        return weights_files(self.stem)[1]

    @property
    def nbytes(self) -> int:
        return sum(ref.nbytes for ref in self.tensors.values())

    @property
    def signatures(self) -> dict[Path, FileSignature]:
        """The files that must not change while they are read: those of a base on the Hub grow by what is read."""
        return {file.path: file.signature for file in self.files} if self.source is None else {}


def read_checkpoint(folder: Path, source: ByteSource | None = None) -> Checkpoint:
    """Read the headers of the model in ``folder``, or of the one in a GGUF file.

    A single file wins over an index, as it does in transformers.

    Args:
        folder: the model's folder, or a ``.gguf`` file.
        source: where the files are not wholly on this disk, what brings the bytes that are read.

    Raises:
        CheckpointError: no safetensors weights, an index and shards that do not agree, or a link out of the folder.
    """
    if folder.is_file() and folder.suffix == ".safetensors":
        found = replace(_checkpoint(folder, [read_model_file(folder)], None), stem=folder.stem)
    else:
        found = _read_gguf(folder, source) if is_gguf(folder) else _read_folder(folder)
    return replace(found, source=source)


def _read_gguf(path: Path, source: ByteSource | None) -> Checkpoint:
    """The tensors of a GGUF file as they are stored: rows of bytes, under llama.cpp's names."""
    check_folder(path.parent, CheckpointError)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}: give the base model with --base.")
    model = read_gguf_model(path, None if source is None else source.require)
    files = []
    for file in model.files:
        refs = (
            TensorRef(file.path, tensor.name, "U8", (tensor.rows, tensor.row_bytes), tensor.start)
            for tensor in file.tensors
        )
        files.append(TensorFile(file.path, tuple(refs), {"format": "pt"}, file.signature))
    return _checkpoint(path, files, None)


def _read_folder(folder: Path) -> Checkpoint:
    check_folder(folder, CheckpointError)
    for stem in STEMS:
        single, index_path = (folder / name for name in weights_files(stem))
        if single.exists():
            return replace(_checkpoint(folder, [read_model_file(single)], None), stem=stem)
        if index_path.exists():
            return replace(_read_sharded(folder, index_path), stem=stem)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give the base model's folder with --base.")
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} is an adapter (adapter_config.json), not a model with all its weights: give the base that it "
            "was made for."
        )
    if any(folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder} holds its weights as a pickle (.bin) only, and mapconv reads safetensors: convert the model "
            "with save_pretrained() first."
        )
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if files:
        raise CheckpointError(
            f"{folder} holds its weights as GGUF: name the file with --base ({folder / files[0]}"
            f"{f', or another of the {len(files)} there' if len(files) > 1 else ''})."
        )
    if (folder / PIPELINE_FILE).exists():
        return _read_pipeline(folder)
    single_name, index_name = weights_files(STEMS[0])
    raise CheckpointError(f"{folder} has neither {single_name} nor {index_name}: it is not a model folder.")


def _read_pipeline(folder: Path) -> Checkpoint:
    """All models of a pipeline that have weights; ``model_index.json`` names the folders of its parts."""
    index = read_object(folder / PIPELINE_FILE, CheckpointError)
    names = [name for name, kind in index.items() if isinstance(kind, list) and kind and kind[0] is not None]
    for name in names:
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise CheckpointError(
                f"{folder / PIPELINE_FILE} points outside its folder ({name}): refusing to follow it."
            )
    models = tuple(read_checkpoint(folder / name) for name in names if _has_weights(folder / name))
    if not models:
        raise CheckpointError(
            f"{folder} is a pipeline, but no folder of it holds weights: give one that has all of it."
        )
    files: list[TensorFile] = []
    for model in models:
        prefix = f"{model.folder.name}."
        for file in model.files:
            refs = tuple(replace(ref, name=prefix + ref.name) for ref in file.tensors)
            files.append(replace(file, tensors=refs))
    return Checkpoint(
        folder, tuple(files), None, {ref.name: ref for file in files for ref in file.tensors}, models=models
    )


def _has_weights(folder: Path) -> bool:
    """Whether a part of a pipeline is a model; a scheduler or a tokenizer is none."""
    return folder.is_dir() and any(name.endswith((".safetensors", ".bin", ".msgpack")) for name in os.listdir(folder))


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
    files = [read_model_file(folder / name) for name in shard_names]
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
