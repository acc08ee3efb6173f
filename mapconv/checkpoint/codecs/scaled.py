"""Codes of one byte, each a float8 or an integer, times the scale of its tensor, row, group or block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.arithmetic import BYTE_VALUES, expand_bytes, kept_scales, read_floats, scale_, shift_
from mapconv.checkpoint.codecs.base import Bytes, fault


@dataclass(frozen=True)
class ScaledBytes:
    """``w = (code − zero) · scale`` for a stack of matrices (height, width).

    ``block`` is how many rows and columns share a scale: counted from the edge, so that the last block may be short.
    ``grid`` is the scales' (rows, columns) for one matrix. ``scale_dtype`` and ``codes_dtype`` say what their bytes
    are, where the file has no name for it. ``columns``: a factor for each column besides.
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
    codes_dtype: str | None = None

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return tuple(ref for ref in (self.codes, self.scale, self.zero, self.columns) if ref is not None)

    @property
    def grid(self) -> tuple[int, int]:
        return block_grid(self.height, self.width, self.block)

    def rows(self, reader: Bytes, start: int, stop: int, out: torch.Tensor) -> None:
        data = reader.read_bytes(self.codes, start * self.width, stop * self.width)
        expand_bytes(data, self.codes_dtype or self.codes.dtype, out.view(-1))
        if self.zero is not None:
            shift_(out, -self._numbers(reader, self.zero, None, start, stop), self.block[1])
        shape = self.codes.nbytes // self.width, self.grid[1]
        read = partial(self._numbers, reader, self.scale, self.scale_dtype)
        scales, sound = kept_scales(reader, self.codes, self.scale, shape, (start, stop), read)
        scale_(out, scales, self.block[1], self.scale, sound=sound)
        if self.columns is not None:
            scale_(out, read_floats(reader, self.columns, 0, self.width)[None], 1, self.columns)

    def _numbers(self, reader: Bytes, ref: TensorRef, dtype: str | None, start: int, stop: int) -> torch.Tensor:
        """The scales or zero points of some rows, (rows, columns of the grid)."""
        row = torch.arange(start, stop)
        # Blocks begin anew with each matrix of a stack.
        row = row // self.height * self.grid[0] + row % self.height // self.block[0]
        first, last, width = int(row[0]), int(row[-1]) + 1, self.grid[1]
        numbers = read_floats(reader, ref, first * width, last * width, dtype).view(-1, width)
        return numbers if len(numbers) == len(row) else numbers[row - first]


def block_grid(height: int, width: int, block: tuple[int, int]) -> tuple[int, int]:
    """Blocks of a matrix along its rows and along its columns; those at the edge may be short."""
    return -(-height // block[0]), -(-width // block[1])


def scaled_bytes(
    label: str,
    codes: TensorRef,
    scale: TensorRef,
    *,
    block: tuple[int, int] | None = None,
    zero: TensorRef | None = None,
    columns: TensorRef | None = None,
) -> ScaledBytes:
    """The encoding of a matrix whose scales are those of the tensor, of rows, of groups in a row, or of blocks.

    The scales' shape says which; ``block`` is the configuration's size of a group or a block, where it has one.

    Raises:
        CheckpointError: shapes or dtypes that do not go together.
    """
    if codes.dtype not in ("F8_E4M3", "F8_E5M2", "I8") or len(codes.shape) != 2:
        raise fault(codes, f"is {codes.dtype} {list(codes.shape)}, expected a matrix of float8 or int8 codes")
    height, width = codes.shape
    if scale.numel == 1:
        block = (height, width)
    elif scale.shape in ((height,), (height, 1)):
        block = (1, width)
    elif block is None and len(scale.shape) == 2 and scale.shape[0] == height and width % max(1, scale.shape[1]) == 0:
        block = (1, width // scale.shape[1])
    expected = None if block is None else block_grid(height, width, block)
    if (
        block is None
        or expected is None
        or scale.numel != math.prod(expected)
        or scale.shape[0] not in (1, expected[0])
    ):
        wanted = "one scale for each row" if expected is None else str(list(expected))
        raise fault(scale, f"is {list(scale.shape)}, expected {wanted} for {codes.name} {list(codes.shape)}")
    exponents = "F8_E8M0" if scale.dtype in ("U8", "F8_E8M0") else None
    if exponents is None and scale.dtype not in ("F32", "F16", "BF16"):
        raise fault(scale, f"has dtype {scale.dtype}, which is not a known dtype for a scale")
    if zero is not None and (zero.numel != scale.numel or zero.dtype not in (*BYTE_VALUES, "F32", "F16", "BF16")):
        raise fault(zero, f"is {zero.dtype} {list(zero.shape)}, expected one for each scale {list(scale.shape)}")
    return ScaledBytes(label, codes, scale, height, width, block, zero=zero, scale_dtype=exponents, columns=columns)
