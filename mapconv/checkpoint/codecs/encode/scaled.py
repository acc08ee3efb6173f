"""``ScaledBytes`` and bitsandbytes' int8, written."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.arithmetic import read_floats
from mapconv.checkpoint.codecs.base import Bytes
from mapconv.checkpoint.codecs.bitsandbytes import EightBit
from mapconv.checkpoint.codecs.encode.base import CodeGrid, Float8Levels, Levels, Part, WholeNumbers
from mapconv.checkpoint.codecs.encode.scales import (
    SHRINKS,
    Groups,
    as_bytes,
    as_stored,
    asymmetric,
    stored_floats,
    symmetric,
)
from mapconv.checkpoint.codecs.scaled import ScaledBytes

_FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


class ScaledStore:
    """Codes of a byte; a stack has its matrices one behind the other."""

    turned = False

    def __init__(self, encoding: ScaledBytes, reader: Bytes, index: int) -> None:
        self._encoding, self._index = encoding, index
        dtype = encoding.codes_dtype or encoding.codes.dtype
        self._float8 = _FLOAT8.get(dtype)
        self._levels: Levels = WholeNumbers(-128, 127) if self._float8 is None else Float8Levels(self._float8)
        height, width, block = encoding.height, encoding.width, encoding.block
        self._groups = Groups(height, torch.arange(width) // block[1], encoding.grid[1], block[0])
        self._columns = None if encoding.columns is None else read_floats(reader, encoding.columns, 0, width)
        self._scales = self._numbers(reader, encoding.scale, encoding.scale_dtype)
        self._zeros = None if encoding.zero is None else self._numbers(reader, encoding.zero)

    @property
    def grid(self) -> CodeGrid:
        expand = self._groups.expand
        zeros = None if self._zeros is None else expand(self._zeros)
        return CodeGrid(self._levels, expand(self._scales), self._groups.group_of, zeros, self._columns)

    def rescale(self, wanted: torch.Tensor) -> None:
        wanted = wanted if self._columns is None else wanted / self._columns
        encode = as_stored(self._scale_dtype)
        if self._zeros is not None:
            self._scales, self._zeros = asymmetric(wanted, self._groups, self._levels, self._levels.low, encode)
            return
        # A float's steps grow with its values: there is nothing to gain from a smaller scale.
        shrinks = SHRINKS if self._float8 is None else SHRINKS[:1]
        self._scales = symmetric(wanted, self._groups, self._levels, 0, encode, shrinks)

    def parts(self, levels: torch.Tensor) -> Sequence[Part]:
        encoding = self._encoding
        codes = levels.to(torch.int8) if self._float8 is None else levels.to(self._float8)
        scales = as_bytes(stored_floats(self._scales, self._scale_dtype))
        parts = [
            (encoding.codes, self._index * levels.numel(), as_bytes(codes)),
            (encoding.scale, self._index * len(scales), scales),
        ]
        if encoding.zero is not None and self._zeros is not None:
            dtype = encoding.zero.dtype
            zeros = as_bytes(self._zeros.to(torch.int8) if dtype == "I8" else stored_floats(self._zeros, dtype))
            parts.append((encoding.zero, self._index * len(zeros), zeros))
        return parts

    @property
    def _scale_dtype(self) -> str:
        return self._encoding.scale_dtype or self._encoding.scale.dtype

    def _numbers(self, reader: Bytes, ref: TensorRef, dtype: str | None = None) -> torch.Tensor:
        rows, columns = self._encoding.grid
        first = self._index * rows * columns
        return read_floats(reader, ref, first, first + rows * columns, dtype).view(rows, columns)


class EightBitStore:
    """int8 by rows: ``w = code · SCB / 127``."""

    turned = False
    _LEVELS = WholeNumbers(-127, 127)

    def __init__(self, encoding: EightBit, reader: Bytes, index: int) -> None:
        self._encoding = encoding
        self._largest = read_floats(reader, encoding.scale, 0, encoding.scale.numel)[:, None]

    @property
    def grid(self) -> CodeGrid:
        return CodeGrid(self._LEVELS, self._largest / 127, torch.zeros(self._encoding.width, dtype=torch.long))

    def rescale(self, wanted: torch.Tensor) -> None:
        groups = Groups(len(wanted), torch.zeros(wanted.shape[1], dtype=torch.long), 1)
        self._largest = symmetric(wanted, groups, self._LEVELS, 0, as_stored("F32")) * 127

    def parts(self, levels: torch.Tensor) -> Sequence[Part]:
        encoding = self._encoding
        return [
            (encoding.codes, 0, as_bytes(levels.to(torch.int8))),
            (encoding.scale, 0, as_bytes(stored_floats(self._largest, encoding.scale.dtype))),
        ]
