"""Integer codes of 1 to 8 bits, packed one after another, with a scale and an offset for each group of columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.arithmetic import (
    expand_bytes,
    expand_nibbles,
    nibble_table,
    read_floats,
    require_scales,
    scale_,
    shift_,
    unpack_bits,
    unpack_words,
)
from mapconv.checkpoint.codecs.base import Bytes, fault

_NIBBLES = nibble_table(torch.arange(16.0), low_first=True)


@dataclass(frozen=True)
class Packed:
    """``w = (code − zero) · scale``, or ``code · scale + bias``, for a weight (…, height, width).

    A row's codes are a little-endian stream in 32-bit words; with ``padded`` no code crosses from one word to the next.
    ``order`` says how words, scales and zeros lie: ``rows`` as the weight, (height, words) and (height, groups);
    ``columns`` transposed, (words, height) and (groups, height).

    ``zero``: packed codes too, along the height (``zero_bits`` as those of the weight), to which ``zero_offset`` is
    added; None: ``zero_offset`` alone. ``bias``: instead of zeros, floats of the scales' shape. ``group_index`` has the
    group of each column, where they are not ``group`` columns each.
    """

    label: str
    codes: TensorRef
    scale: TensorRef
    bits: int
    height: int
    width: int
    group: int
    order: Literal["rows", "columns"] = "rows"
    padded: bool = False
    zero: TensorRef | None = None
    zero_offset: int = 0
    bias: TensorRef | None = None
    group_index: TensorRef | None = None
    described_by: tuple[TensorRef, ...] = ()

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        refs = (self.codes, self.scale, self.zero, self.bias, self.group_index, *self.described_by)
        return tuple(ref for ref in refs if ref is not None)

    @property
    def groups(self) -> int:
        return self.scale.shape[-1] if self.order == "rows" else self.scale.shape[0]

    def rows(self, reader: Bytes, start: int, stop: int, out: torch.Tensor) -> None:
        self._codes(reader, start, stop, out)
        scales = self._numbers(reader, self.scale, start, stop)
        zero, columns = self.zero, self.group_index
        zeros = (
            None if zero is None else reader.kept(self.codes, "zeros", lambda: self._zeros(reader, zero))[start:stop]
        )
        if columns is not None:
            index = reader.kept(self.codes, "index", lambda: self._index(reader, columns))
            scales, zeros, group = scales[:, index], None if zeros is None else zeros[:, index], 1
        else:
            group = self.group
        if zeros is not None:
            shift_(out, -zeros, group)
        elif self.zero_offset:
            out.sub_(self.zero_offset)
        if self.bias is None:
            scale_(out, scales, group, self.scale)
        else:
            # A group of equal weights has a scale of zero and is its bias.
            scale_(out, scales, group, self.scale, zero_is_lost=False)
            bias = self._numbers(reader, self.bias, start, stop)
            require_scales(bias, self.bias)
            shift_(out, bias, group)

    def _codes(self, reader: Bytes, start: int, stop: int, out: torch.Tensor) -> None:
        if self.order == "columns":
            # Transposed as they are packed: a quarter of the weight's size in 16 bits, or less.
            data = reader.kept(self.codes, "codes", lambda: self._transposed(reader))[start:stop]
        else:
            nbytes = self.codes.nbytes // (self.codes.numel // self.codes.shape[-1])
            data = reader.read_bytes(self.codes, start * nbytes, stop * nbytes).view(stop - start, nbytes)
        if self.padded:
            out.copy_(unpack_words(data, self.bits, self.width))
        elif self.bits == 8:
            expand_bytes(data[:, : self.width].reshape(-1), "U8", out.view(-1))
        elif self.bits == 4 and self.width % 2 == 0:
            expand_nibbles(data[:, : self.width // 2].reshape(-1), _NIBBLES, out.view(-1))
        else:
            out.copy_(unpack_bits(data, self.bits, self.width))

    def _transposed(self, reader: Bytes) -> torch.Tensor:
        """(height, bytes) uint8 of codes that are stored (words, height)."""
        words = reader.read_bytes(self.codes, 0, self.codes.nbytes).view(torch.int32).view(self.codes.shape)
        return words.T.contiguous().view(torch.uint8)

    def _numbers(self, reader: Bytes, ref: TensorRef, start: int, stop: int) -> torch.Tensor:
        """Scales or biases of some rows, (rows, groups)."""
        if self.order == "rows":
            return read_floats(reader, ref, start * self.groups, stop * self.groups).view(-1, self.groups)
        table = reader.kept(
            self.codes, ref.name, lambda: read_floats(reader, ref, 0, ref.numel).view(ref.shape).T.contiguous()
        )
        return table[start:stop]

    def _zeros(self, reader: Bytes, ref: TensorRef) -> torch.Tensor:
        """The zero points, (height, groups): codes packed along the height, for each group a stream."""
        data = reader.read_bytes(ref, 0, ref.nbytes)
        if self.order == "rows":  # (words, groups)
            data = data.view(torch.int32).view(ref.shape).T.contiguous().view(torch.uint8)
        data = data.view(self.groups, -1)
        unpack = unpack_words if self.padded else unpack_bits
        return (unpack(data, self.bits, self.height).T + self.zero_offset).float()

    def _index(self, reader: Bytes, ref: TensorRef) -> torch.Tensor:
        index = reader.read_bytes(ref, 0, ref.nbytes).view(torch.int32).long()
        if bool((index == -1).all()):  # groups that follow one another, said in another way
            index = torch.arange(self.width) // self.group
        if not bool(((index >= 0) & (index < self.groups)).all()):
            raise fault(ref, f"names a group outside 0 … {self.groups - 1}: download the model again")
        return index
