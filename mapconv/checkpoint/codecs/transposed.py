"""A weight whose codes are those of its transpose."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mapconv.adapter import TensorRef
from mapconv.algebra.norms import row_blocks
from mapconv.checkpoint.codecs.base import Bytes, Encoding


@dataclass(frozen=True)
class Transposed:
    """The transpose of a (height, width) matrix in another encoding.

    A row is a column of the codes, so the matrix is decoded as a whole and kept while its rows are read: meant for the
    families of small models that store weights so.
    """

    inner: Encoding
    height: int
    width: int

    @property
    def label(self) -> str:
        return self.inner.label

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return self.inner.stored

    def rows(self, reader: Bytes, start: int, stop: int, out: torch.Tensor) -> None:
        out.copy_(reader.kept(self, "matrix", lambda: self._matrix(reader))[start:stop])

    def _matrix(self, reader: Bytes) -> torch.Tensor:
        matrix = torch.empty(self.width, self.height)
        for start, stop in row_blocks(self.height, self.width):
            rows = torch.empty(stop - start, self.width)
            self.inner.rows(reader, start, stop, rows)
            matrix[:, start:stop] = rows.T
        return matrix
