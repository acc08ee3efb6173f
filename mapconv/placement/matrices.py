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
        simple = not any(p.transposed or isinstance(p.tensor, EncodedTensor) for p in view.pieces)
        self._held: torch.Tensor | None = None
        if not simple or view.nbytes <= held:
            dtype = TORCH_DTYPES[view.dtype] if simple or not self._encoded else torch.float32
            self._held = read_weight(view, reader, torch.empty(view.numel, dtype=dtype))

    @property
    def _encoded(self) -> bool:
        return any(isinstance(piece.tensor, EncodedTensor) for piece in self.view.pieces)

    def rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Rows start … stop in ``dtype``, in memory of their own."""
        if self._held is not None:
            return self._held[start:stop].to(dtype, copy=True)
        out = torch.empty(stop - start, self.view.shape[1], dtype=dtype)
        for piece in self.view.pieces:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                buffer = torch.empty(8 * (last - first) * self.view.shape[1], dtype=torch.uint8)
                offset = piece.offset - piece.start
                out[first - start : last - start] = read_rows(
                    self._reader, piece, first + offset, last + offset, buffer
                )
        return out
