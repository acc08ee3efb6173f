"""GGUF files: rows of blocks of many types, under llama.cpp's names and in its order of rows.

A file's tensors are shown under transformers' names, each matrix of a stack of experts as one of its own, and all in
the one dtype that the model is written in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.base import Bytes, EncodedTensor, fault
from mapconv.checkpoint.gguf.blocks import EXPAND
from mapconv.checkpoint.gguf.families import NamedTensor, named_tensors
from mapconv.checkpoint.gguf.header import GgufTensor
from mapconv.checkpoint.gguf.model import GgufModel
from mapconv.checkpoint.gguf.types import BLOCK_TYPES
from mapconv.checkpoint.headers import TensorFile
from mapconv.checkpoint.index import Checkpoint
from mapconv.errors import CheckpointError

_TYPES = {kind.name: kind for kind in BLOCK_TYPES.values()}


@dataclass(frozen=True)
class GgufRows:
    """Rows of ``width`` values in blocks of one type, from row ``first`` of the stored tensor on.

    ``head``: rows of one head of an interleaved q or k, stored as (head / 2, 2) where the plain weight has
    (2, head / 2); 0 where they are in order. ``offset`` is taken away from all values.
    """

    codes: TensorRef
    type: str
    width: int
    first: int = 0
    head: int = 0
    offset: float = 0.0

    @property
    def label(self) -> str:
        return f"GGUF {self.type}"

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return (self.codes,)

    def rows(self, reader: Bytes, start: int, stop: int, out: torch.Tensor) -> None:
        kind, nbytes = _TYPES[self.type], self.codes.shape[1]
        if self.head and self.codes.shape[0] == 1:  # a bias, whose values change places as rows do
            start, stop, nbytes = 0, self.width, nbytes // self.width
        # Whole heads, whose rows change places before they are decoded: a block never crosses a row.
        low, high = start, stop
        if self.head:
            low, high = start // self.head * self.head, -(-stop // self.head) * self.head
        data = reader.read_bytes(self.codes, (self.first + low) * nbytes, (self.first + high) * nbytes)
        if self.head:
            heads = data.view(-1, self.head // 2, 2, nbytes).transpose(1, 2)
            data = heads.reshape(high - low, nbytes)[start - low : stop - low]
        EXPAND[self.type](data.reshape(-1, kind.nbytes), out.view(-1, kind.elements))
        if self.offset:
            out.sub_(self.offset)


def gguf_view(checkpoint: Checkpoint, model: GgufModel, dtype: str, heads: dict[str, int]) -> Checkpoint:
    """A GGUF checkpoint as if it held plain weights under transformers' names.

    Args:
        checkpoint: the tensors of its files, in blocks.
        model: the same files' headers.
        dtype: what the weights are written as.
        heads: of q and of k.

    Raises:
        CheckpointError: shapes that do not go with the heads. UnsupportedError: tensors or a model not known.
    """
    files = tuple(
        replace(file, tensors=tuple(_shown(file, model, header.tensors, dtype, heads)))
        for file, header in zip(checkpoint.files, model.files, strict=True)
    )
    tensors = {ref.name: ref for file in files for ref in file.tensors}
    if len(tensors) < sum(len(file.tensors) for file in files):
        raise CheckpointError(f"{checkpoint.folder} holds a weight twice, under two of llama.cpp's names.")
    return replace(checkpoint, files=files, tensors=tensors, stored_files=checkpoint.files)


def _shown(
    file: TensorFile, model: GgufModel, tensors: tuple[GgufTensor, ...], dtype: str, heads: dict[str, int]
) -> Iterator[EncodedTensor]:
    stored = {ref.name: ref for ref in file.tensors}
    for item in named_tensors(model.first, tensors):
        codes = stored[item.stored.name]
        head = 0
        if item.heads is not None:
            head = _head(item, codes, heads[item.heads])
        shape = item.stored.shape if item.expert is None else item.stored.shape[1:]
        width = item.stored.shape[-1]
        first = 0 if item.expert is None else item.expert * math.prod(shape[:-1])
        encoding = GgufRows(codes, item.stored.type.name, width, first, head, item.offset)
        yield EncodedTensor(codes.file, item.name, dtype, shape, codes.start + first * codes.shape[1], encoding)


def _head(item: NamedTensor, codes: TensorRef, heads: int) -> int:
    """Rows of one head."""
    rows = item.stored.shape[0]
    if rows % (2 * heads) or (len(item.stored.shape) == 1 and item.stored.type.elements > 1):
        raise fault(codes, f"is {list(item.stored.shape)}, expected {heads} heads of an even number of rows")
    return rows // heads
