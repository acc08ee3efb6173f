"""The model that a merge writes: the base's tensors with whole tensors replaced, added, repeated and untied.

Everything that an adapter brings besides low-rank updates changes *which* bytes a tensor starts from, or the model's
configuration. Resolved before (``resolution``), the merge itself only knows tensors and updates on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mapconv.adapter import TensorRef, WholeTensor
from mapconv.checkpoint.index import Checkpoint, TensorFile


@dataclass(frozen=True)
class BiasUpdate:
    """A LoRA's own bias (``lora_bias``): the layer's bias grows by ``scaling`` times these values."""

    tensor: TensorRef
    scaling: float


@dataclass(frozen=True)
class TargetModel:
    """What the merged checkpoint starts from.

    ``tensors`` maps each name to be written to the bytes it starts from, in ``files`` of the same names as the base's;
    ``dtypes`` says in which dtype a tensor is written where that is not its own. ``rows`` and ``biases`` are
    updates by tensor name. ``config`` is the model's configuration, or None where it stays as it is; under
    ``source_config`` the base loads for the adapter itself (None: its own), and ``class_name`` is the class of both
    (None: a causal language model's).
    """

    checkpoint: Checkpoint
    files: tuple[TensorFile, ...]
    tensors: Mapping[str, TensorRef]
    dtypes: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, tuple[WholeTensor, ...]] = field(default_factory=dict)
    biases: Mapping[str, tuple[BiasUpdate, ...]] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    source_config: dict[str, Any] | None = None
    class_name: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder


def plain_target(checkpoint: Checkpoint) -> TargetModel:
    """The base as it is: all that an adapter of plain linear factors needs."""
    return TargetModel(checkpoint, checkpoint.files, checkpoint.tensors)
