"""Codes of one byte, each a float8 or an integer, times the scale of its tensor, row, group or block."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.arithmetic import expand_bytes, read_floats, scale_, shift_
from mapconv.checkpoint.codecs.base import Bytes


@dataclass(frozen=True)
class ScaledBytes:
    """``w = (code − zero) · scale`` for a stack of matrices (height, width).

    ``block`` is how many rows and columns share a scale: counted from the edge, so that the last block may be short.
    ``grid`` is the scales' (rows, columns) for one matrix. ``scale_dtype`` says what the scales' bytes are, where the
    file has no name for it. ``columns``: a factor for each column besides.
    """

    label: str
    codes: TensorRef
    scale: TensorRef
    height: int
    width: int
    block: tuple[int, int]
    zero: TensorRef | None = None
    scale_dtype: str | None = None
    columns: TensorRef | None = None

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return tuple(ref for ref in (self.codes, self.scale, self.zero, self.columns) if ref is not None)

    @property
    def grid(self) -> tuple[int, int]:
        return block_grid(self.height, self.width, self.block)

    def rows(self, reader: Bytes, start: int, stop: int, out: torch.Tensor) -> None:
        data = reader.read_bytes(self.codes, start * self.width, stop * self.width)
        expand_bytes(data, self.codes.dtype, out.view(-1))
        row = torch.arange(start, stop)
        # Blocks begin anew with each matrix of a stack.
        row = row // self.height * self.grid[0] + row % self.height // self.block[0]
        if self.zero is not None:
            shift_(out, -self._numbers(reader, self.zero, row), self.block[1])
        scale_(out, self._numbers(reader, self.scale, row, self.scale_dtype), self.block[1], self.scale)
        if self.columns is not None:
            scale_(out, read_floats(reader, self.columns, 0, self.width)[None], 1, self.columns)

    def _numbers(self, reader: Bytes, ref: TensorRef, row: torch.Tensor, dtype: str | None = None) -> torch.Tensor:
        """The scales or zero points of some rows, (rows, columns of the grid)."""
        first, last, width = int(row[0]), int(row[-1]) + 1, self.grid[1]
        numbers = read_floats(reader, ref, first * width, last * width, dtype).view(-1, width)
        return numbers if len(numbers) == len(row) else numbers[row - first]


def block_grid(height: int, width: int, block: tuple[int, int]) -> tuple[int, int]:
    """Blocks of a matrix along its rows and along its columns; those at the edge may be short."""
    return -(-height // block[0]), -(-width // block[1])
