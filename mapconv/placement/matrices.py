"""Rows of a stored weight, whenever they are asked for: from memory in the dtype that they are stored in, or from disk.

A solver goes over a weight some twenty times. One of ordinary size is held, at half the memory of float32; one that is
larger than ``HELD`` is read anew from its file, which the system's own cache makes cheap.
"""

from __future__ import annotations

import torch

from mapconv.checkpoint.codecs.base import EncodedTensor
from mapconv.checkpoint.reader import TORCH_DTYPES, TensorReader
from mapconv.placement.weights import WeightView, read_rows, read_weight

#: Bytes of a weight that is held in memory.
HELD = 96 << 20


class MatrixRows:
    """The rows of one weight (out, in). A weight that is stored transposed or in codes is always held."""

    def __init__(self, view: WeightView, reader: TensorReader, *, held: int = HELD) -> None:
        self.view, self._reader = view, reader
        encoded = any(isinstance(piece.tensor, EncodedTensor) for piece in view.pieces)
        self._held: torch.Tensor | None = None
        if encoded or any(piece.transposed for piece in view.pieces):
            dtype = torch.float32 if encoded else TORCH_DTYPES[view.dtype]
            self._held = read_weight(view, reader, torch.empty(view.numel, dtype=dtype))
        elif view.nbytes <= held:
            self._held = self._read()

    def rows(
        self, start: int, stop: int, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows start … stop in ``dtype``, in memory of their own or in that of ``out``, a flat tensor of it."""
        count = (stop - start) * self.view.shape[1]
        out = torch.empty(count, dtype=dtype) if out is None else out[:count]
        rows = out.view(stop - start, self.view.shape[1])
        if self._held is not None:
            return rows.copy_(self._held[start:stop])
        for piece in self.view.pieces:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                buffer = torch.empty(8 * (last - first) * self.view.shape[1], dtype=torch.uint8)
                offset = piece.offset - piece.start
                rows[first - start : last - start] = read_rows(
                    self._reader, piece, first + offset, last + offset, buffer
                )
        return rows

    def _read(self) -> torch.Tensor:
        """The whole weight as it is stored, straight into the memory that holds it."""
        whole = torch.empty(self.view.shape, dtype=TORCH_DTYPES[self.view.dtype])
        for piece in self.view.pieces:
            rows = whole[piece.start : piece.stop]
            if TORCH_DTYPES[piece.tensor.dtype] == whole.dtype:
                buffer = rows.view(-1).view(torch.uint8)
                read_rows(self._reader, piece, piece.offset, piece.offset + len(rows), buffer)
            else:
                buffer = torch.empty(8 * rows.numel(), dtype=torch.uint8)
                rows.copy_(read_rows(self._reader, piece, piece.offset, piece.offset + len(rows), buffer))
        return whole
