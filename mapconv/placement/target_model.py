"""The model that a merge writes: the base's tensors with whole tensors replaced, added, repeated and untied.

Everything that an adapter brings besides low-rank updates changes *which* bytes a tensor starts from, or the model's
configuration. Resolved before (``resolution``), the merge itself only knows tensors and updates on them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mapconv.adapter import Adapter, TensorRef, WholeTensor
from mapconv.checkpoint.codecs.base import EncodedTensor
from mapconv.checkpoint.gguf.model import small_files
from mapconv.checkpoint.headers import TensorFile
from mapconv.checkpoint.index import Checkpoint
from mapconv.placement.weights import PlacedModule


@dataclass(frozen=True)
class BiasUpdate:
    """A LoRA's own bias (``lora_bias``): the layer's bias grows by ``scaling`` times these values."""

    tensor: TensorRef
    scaling: float


@dataclass(frozen=True)
class MergedBias:
    """What the merge of a layer of another method than LoRA makes of the layer's bias."""

    placed: PlacedModule


@dataclass(frozen=True)
class TargetModel:
    """What the merged checkpoint starts from.

    ``tensors`` maps each name to be written to the bytes it starts from, in ``files`` of the same names as the base's;
    ``encoded`` are the weights, by their plain names, that the adapters change and that go back into the codes among
    ``tensors``; ``lifted`` are the paths of modules that leave them.
    ``dtypes`` says in which dtype a tensor is written where that is not its own. ``rows`` and ``biases`` are
    updates by tensor name. ``config`` is the model's configuration, or None where it stays as it is; under
    ``source_config`` the base loads for the adapter itself (None: its own), and ``class_name`` is the class of both
    (None: a causal language model's).
    """

    checkpoint: Checkpoint
    files: tuple[TensorFile, ...]
    tensors: Mapping[str, TensorRef]
    encoded: Mapping[str, EncodedTensor] = field(default_factory=dict)
    lifted: tuple[str, ...] = ()
    dtypes: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, tuple[WholeTensor, ...]] = field(default_factory=dict)
    biases: Mapping[str, tuple[BiasUpdate | MergedBias, ...]] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    source_config: dict[str, Any] | None = None
    class_name: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def tokenizer(self) -> Path:
        """Where the model's tokenizer is loaded from: its folder, or its GGUF file."""
        return small_files(self.checkpoint.folder)


#: A target model, and the adapters, in its names, with their modules placed on it.
Placed = tuple[TargetModel, tuple[tuple[Adapter, tuple[PlacedModule, ...]], ...]]


def plain_target(checkpoint: Checkpoint) -> TargetModel:
    """The base as it is: all that an adapter of plain linear factors needs."""
    return TargetModel(checkpoint, checkpoint.files, checkpoint.tensors)


def vocabulary_sizes(config: Mapping[str, Any]) -> set[int]:
    """Rows that an input or output embedding has by the configuration; the two may be tied."""
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    return {part["vocab_size"] for part in parts if isinstance(part.get("vocab_size"), int)}


def common_dtype(checkpoint: Checkpoint) -> str:
    """The floating-point dtype of most of the base's bytes, for tensors that the base has not got."""
    sizes: dict[str, int] = defaultdict(int)
    for ref in checkpoint.tensors.values():
        if ref.dtype in ("F32", "F16", "BF16"):
            sizes[ref.dtype] += ref.nbytes
    return max(sizes, key=sizes.__getitem__, default="F32")


def files_with(checkpoint: Checkpoint, tensors: Mapping[str, TensorRef]) -> tuple[TensorFile, ...]:
    """The base's files with those of ``tensors`` that remain; new ones go to the end of the last."""
    old = [
        replace(file, tensors=tuple(tensors[ref.name] for ref in file.tensors if ref.name in tensors))
        for file in checkpoint.files
    ]
    held = {ref.name for file in old for ref in file.tensors}
    new = tuple(ref for name, ref in tensors.items() if name not in held)
    return (*old[:-1], replace(old[-1], tensors=old[-1].tensors + new))
