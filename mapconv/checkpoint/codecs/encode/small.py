"""Codes of a table of 16 values, written: NVFP4, MXFP4, NF4 and FP4."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.arithmetic import E2M1, read_floats
from mapconv.checkpoint.codecs.base import Bytes
from mapconv.checkpoint.codecs.bitsandbytes import FourBit
from mapconv.checkpoint.codecs.encode.base import CodeGrid, Part, TableLevels
from mapconv.checkpoint.codecs.encode.scales import Groups, as_bytes, as_stored, stored_floats, symmetric
from mapconv.checkpoint.codecs.mxfp4 import TransposedMxfp4
from mapconv.checkpoint.codecs.small_floats import SmallFloats


class Nibbles:
    """A table of 16 values as levels, and the code of each level."""

    def __init__(self, table: torch.Tensor) -> None:
        values, order = torch.sort(table, stable=True)
        # Of two codes for one value (zero has a sign), the first: the smaller one.
        first = torch.cat([torch.tensor([True]), values[1:] != values[:-1]])
        self.levels, self._codes = TableLevels(values[first].contiguous()), order[first].to(torch.uint8)

    def pack(self, levels: torch.Tensor, *, low_first: bool) -> torch.Tensor:
        """Two codes in a byte, of the flattened levels."""
        codes = self._codes[torch.searchsorted(self.levels.values, levels.reshape(-1).contiguous())]
        pairs = torch.nn.functional.pad(codes, (0, len(codes) % 2)).view(-1, 2)
        low, high = (pairs[:, 0], pairs[:, 1]) if low_first else (pairs[:, 1], pairs[:, 0])
        return low | (high << 4)


_E2M1 = Nibbles(E2M1)


class SmallFloatStore:
    """4-bit floats with a scale for each group of columns; the scale of the whole weight, if any, stays."""

    turned = False

    def __init__(self, encoding: SmallFloats, reader: Bytes, index: int) -> None:
        self._encoding = encoding
        height = 2 * encoding.codes.numel // encoding.width
        count = -(-encoding.width // encoding.group)
        self._groups = Groups(height, torch.arange(encoding.width) // encoding.group, count)
        self._dtype = encoding.scale_dtype or encoding.scale.dtype
        self._factor = 1.0
        if encoding.overall is not None:
            overall = float(read_floats(reader, encoding.overall, 0, 1))
            self._factor = 1 / overall if encoding.overall_is == "divisor" else overall
        self._columns = None if encoding.columns is None else read_floats(reader, encoding.columns, 0, encoding.width)
        self._scales = read_floats(reader, encoding.scale, 0, height * count, self._dtype).view(height, count)

    @property
    def grid(self) -> CodeGrid:
        return CodeGrid(_E2M1.levels, self._scales * self._factor, self._groups.group_of, None, self._columns)

    def rescale(self, wanted: torch.Tensor) -> None:
        wanted = wanted if self._columns is None else wanted / self._columns
        encode = as_stored(self._dtype)
        self._scales = symmetric(wanted / self._factor, self._groups, _E2M1.levels, 0, encode)

    def parts(self, levels: torch.Tensor) -> Sequence[Part]:
        encoding = self._encoding
        return [
            (encoding.codes, 0, _E2M1.pack(levels, low_first=True)),
            (encoding.scale, 0, as_bytes(stored_floats(self._scales, self._dtype))),
        ]


class TransposedMxfp4Store:
    """One expert of gpt-oss, whose codes are those of its transpose."""

    turned = True

    def __init__(self, encoding: TransposedMxfp4, reader: Bytes, index: int) -> None:
        self._encoding, self._index = encoding, index
        _, height, count, _ = encoding.codes.shape
        self._groups = Groups(height, torch.arange(32 * count) // 32, count)
        first = index * height * count
        scales = read_floats(reader, encoding.scale, first, first + height * count, "F8_E8M0")
        self._scales = scales.view(height, count)

    @property
    def grid(self) -> CodeGrid:
        return CodeGrid(_E2M1.levels, self._scales, self._groups.group_of)

    def rescale(self, wanted: torch.Tensor) -> None:
        self._scales = symmetric(wanted, self._groups, _E2M1.levels, 0, as_stored("F8_E8M0"))

    def parts(self, levels: torch.Tensor) -> Sequence[Part]:
        codes = _E2M1.pack(levels, low_first=True)
        scales = as_bytes(stored_floats(self._scales, "F8_E8M0"))
        return [
            (self._encoding.codes, self._index * len(codes), codes),
            (self._encoding.scale, self._index * len(scales), scales),
        ]


class FourBitStore:
    """bitsandbytes' 4 bits, whose blocks run across the ends of rows where those do not hold whole ones."""

    turned = False

    def __init__(self, encoding: FourBit, reader: Bytes, index: int) -> None:
        self._encoding = encoding
        self._nibbles = Nibbles(read_floats(reader, encoding.book, 0, 16))
        self._blocks = -(-encoding.numel // encoding.block)
        self._absmax = encoding.absmax.read(reader, 0, self._blocks)
        absmax = encoding.absmax
        self._book = None if absmax.book is None else read_floats(reader, absmax.book, 0, absmax.book.numel)
        self._kept = [(ref, reader.read_bytes(ref, 0, ref.nbytes)) for ref in self._scale_refs]

    @property
    def _scale_refs(self) -> tuple[TensorRef, ...]:
        absmax = self._encoding.absmax
        return (absmax.values,) if absmax.scales is None else (absmax.values, absmax.scales)

    @property
    def grid(self) -> CodeGrid:
        encoding = self._encoding
        if encoding.width % encoding.block == 0:
            count = encoding.width // encoding.block
            group_of = torch.arange(encoding.width) // encoding.block
            return CodeGrid(self._nibbles.levels, self._absmax.view(-1, count), group_of)
        scales = self._absmax.repeat_interleave(encoding.block)[: encoding.numel].view(-1, encoding.width)
        return CodeGrid(self._nibbles.levels, scales, torch.arange(encoding.width))

    def rescale(self, wanted: torch.Tensor) -> None:
        encoding = self._encoding
        flat = torch.nn.functional.pad(wanted.reshape(-1), (0, -encoding.numel % encoding.block))
        blocks = flat.view(-1, encoding.block)
        groups = Groups(len(blocks), torch.zeros(encoding.block, dtype=torch.long), 1)
        largest = symmetric(blocks, groups, self._nibbles.levels, 0, as_stored("F32"))[:, 0]
        if self._book is None:
            dtype = encoding.absmax.values.dtype
            stored = stored_floats(largest, dtype)
            self._absmax, self._kept = stored.float(), [(encoding.absmax.values, as_bytes(stored))]
        else:
            self._double(largest, self._book)

    def _double(self, largest: torch.Tensor, book: torch.Tensor) -> None:
        """Absmax in codes of their own, with new scales for them and the offset that the file has."""
        absmax = self._encoding.absmax
        assert absmax.scales is not None  # a book comes with scales
        rest = largest - absmax.offset
        padded = torch.nn.functional.pad(rest, (0, -len(rest) % absmax.block)).view(-1, absmax.block)
        scales = stored_floats(padded.abs().amax(1) / book.abs().max(), absmax.scales.dtype)
        values, order = torch.sort(book, stable=True)
        factors = scales.float()[:, None]
        numbers = padded / torch.where(factors == 0, 1.0, factors)
        codes = order[torch.bucketize(numbers, (values[1:] + values[:-1]) / 2)].to(torch.uint8)
        self._absmax = (book[codes.long()] * factors + absmax.offset).view(-1)[: len(rest)]
        self._kept = [(absmax.values, codes.view(-1)[: len(rest)].contiguous()), (absmax.scales, as_bytes(scales))]

    def parts(self, levels: torch.Tensor) -> Sequence[Part]:
        codes = self._nibbles.pack(levels, low_first=False)
        return [(self._encoding.codes, 0, codes), *((ref, 0, data) for ref, data in self._kept)]
