"""Tensors that a file does not hold as they are used: each is computed from stored ones when it is read.

They are ``EncodedTensor``s as a quantized weight is, so that who reads factors need not know how a dialect has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mapconv.adapter import ITEM_SIZES, TensorRef
from mapconv.checkpoint.codecs.base import Bytes, EncodedTensor


def derived(name: str, shape: Sequence[int], encoding: Computed) -> EncodedTensor:
    """The tensor that an encoding computes, in the place and dtype of the first stored one."""
    first = encoding.stored[0]
    return EncodedTensor(first.file, name, first.dtype, tuple(shape), first.start, encoding)


@dataclass(frozen=True)
class Computed:
    """A matrix from a few stored tensors; it is computed once for all of its rows.

    Subclasses give ``matrix`` or, where rows can be had alone, ``rows``.
    """

    stored: tuple[TensorRef, ...]

    @property
    def label(self) -> str:
        return "computed"

    def rows(self, reader: Bytes, start: int, stop: int, out: torch.Tensor) -> None:
        matrix = reader.kept(self, "matrix", lambda: self.matrix(reader))
        out.copy_(matrix.reshape(-1, out.shape[1])[start:stop])

    def matrix(self, reader: Bytes) -> torch.Tensor:
        """The values, float32."""
        raise NotImplementedError


@dataclass(frozen=True)
class Identity(Computed):
    """The identity of some size; ``stored`` says which file it goes with."""

    size: int

    def rows(self, reader: Bytes, start: int, stop: int, out: torch.Tensor) -> None:
        flat = torch.arange(start * out.shape[1], stop * out.shape[1])
        out.copy_((flat // self.size == flat % self.size).view(out.shape))


@dataclass(frozen=True)
class TransposedTensor(Computed):
    """The transpose of a stored matrix."""

    def matrix(self, reader: Bytes) -> torch.Tensor:
        return reader.read(self.stored[0]).float().T.contiguous()


@dataclass(frozen=True)
class PickedRows(Computed):
    """Some rows of a tensor, in an order of their own."""

    picked: tuple[int, ...]

    def matrix(self, reader: Bytes) -> torch.Tensor:
        return reader.read(self.stored[0]).float()[list(self.picked)]


def picked_rows(ref: TensorRef, rows: Sequence[int]) -> TensorRef:
    """Some rows of a tensor, in the order of ``rows``."""
    return derived(ref.name, (len(rows), *ref.shape[1:]), PickedRows((ref,), tuple(rows)))


def rows_of(ref: TensorRef, start: int, stop: int) -> TensorRef:
    """Rows ``start`` to ``stop`` of a tensor: of stored bytes their range, of computed ones a part."""
    shape = (stop - start, *ref.shape[1:])
    if isinstance(ref, EncodedTensor):
        return picked_rows(ref, range(start, stop))
    row = ref.numel // ref.shape[0] * ITEM_SIZES[ref.dtype]
    return replace(ref, start=ref.start + start * row, shape=shape)


def reshaped(ref: TensorRef, shape: Sequence[int]) -> TensorRef:
    """The same values in another shape."""
    return replace(ref, shape=tuple(shape))
