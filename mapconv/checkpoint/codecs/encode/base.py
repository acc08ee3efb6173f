"""Weights back into the codes that they came from: which codes and scales, and what those then stand for.

A ``Store`` is one stored matrix on its way back. Its ``CodeGrid`` says which values its codes can stand for, with the
scales that the file has or with new ones; ``parts`` are the bytes of a choice of levels. What is written is read back
by the codec that reads the storage, from ``WrittenBytes``, before it goes to a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar, cast

import torch

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.base import Bytes

T = TypeVar("T")

#: (stored tensor, first byte, bytes).
Part = tuple[TensorRef, int, torch.Tensor]


class Levels(Protocol):
    """The numbers that codes are before they are scaled, from ``low`` to ``high``; ``step`` is the largest."""

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...

    @property
    def step(self) -> float: ...

    def nearest(self, numbers: torch.Tensor) -> torch.Tensor:
        """The closest level to each, in a tensor of its own."""
        ...


@dataclass(frozen=True)
class WholeNumbers:
    low: float
    high: float
    step: float = 1.0

    def nearest(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers.round().clamp_(self.low, self.high)


@dataclass(frozen=True)
class TableLevels:
    """Any few numbers, (k,) in ascending order."""

    values: torch.Tensor
    middles: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "middles", (self.values[1:] + self.values[:-1]) / 2)

    @property
    def low(self) -> float:
        return float(self.values[0])

    @property
    def high(self) -> float:
        return float(self.values[-1])

    @property
    def step(self) -> float:
        return float((self.values[1:] - self.values[:-1]).max())

    def nearest(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.values[torch.bucketize(numbers, self.middles)]


@dataclass(frozen=True)
class Float8Levels:
    dtype: torch.dtype

    @property
    def high(self) -> float:
        return torch.finfo(self.dtype).max

    @property
    def low(self) -> float:
        return -self.high

    @property
    def step(self) -> float:
        # The last value has the largest fraction but, in e4m3, one: its step is that of its exponent.
        return 2.0 ** (torch.tensor(self.high).log2().floor().item()) * torch.finfo(self.dtype).eps

    def nearest(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers.clamp(self.low, self.high).to(self.dtype).float()


@dataclass
class CodeGrid:
    """``w = (level − zero) · scale`` for a matrix (n, m), rows being what the codes have as rows.

    ``scales`` are (n or 1, groups) float32 as they will be read, ``zeros`` likewise or None, and ``group_of`` (m,) has
    the group of each column. ``columns``, (m,): a factor for each column besides.
    """

    levels: Levels
    scales: torch.Tensor
    group_of: torch.Tensor
    zeros: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def scale_of(self, columns: slice | int) -> torch.Tensor:
        """The scales of some columns, (n or 1, columns); of one, (n or 1,)."""
        scales = self.scales[:, self.group_of[columns]]
        return scales if self.columns is None else scales * self.columns[columns]

    def zero_of(self, columns: slice | int) -> torch.Tensor | None:
        return None if self.zeros is None else self.zeros[:, self.group_of[columns]]

    def nearest(self, wanted: torch.Tensor, columns: slice | int) -> torch.Tensor:
        """The levels whose values are closest to those columns of a matrix."""
        scale, zero = self.scale_of(columns), self.zero_of(columns)
        # A scale of zero makes every level one and the same value, which is written as the code of zero.
        numbers = torch.where(scale == 0, 0.0, wanted / torch.where(scale == 0, 1.0, scale))
        return self.levels.nearest(numbers if zero is None else numbers + zero)

    def values(self, levels: torch.Tensor, columns: slice | int) -> torch.Tensor:
        zero = self.zero_of(columns)
        return (levels if zero is None else levels - zero) * self.scale_of(columns)

    def of_rows(self, rows: slice) -> CodeGrid:
        """The same for some rows alone."""

        def cut(numbers: torch.Tensor) -> torch.Tensor:
            return numbers if len(numbers) == 1 else numbers[rows]

        return replace(self, scales=cut(self.scales), zeros=None if self.zeros is None else cut(self.zeros))

    def saturated(self, wanted: torch.Tensor, reach: float = 1.0) -> int:
        """How many values of a matrix lie beyond ``reach`` times the outermost levels by more than half a step."""
        count, half = 0, self.levels.step / 2 + 1e-3
        for start in range(0, wanted.shape[1], STRIP):
            part = slice(start, start + STRIP)
            scale, zero = self.scale_of(part), self.zero_of(part)
            zero = torch.zeros(()) if zero is None else zero
            numbers = wanted[:, part] / torch.where(scale == 0, 1.0, scale)
            above = numbers > reach * (self.levels.high - zero) + half
            below = numbers < reach * (self.levels.low - zero) - half
            count += int((above | below).sum())
        return count


#: Columns that are looked at together.
STRIP = 1024


class Store(Protocol):
    """One matrix of a weight on its way back into codes.

    ``turned``: the codes are those of the transpose of the matrix as it is read.
    """

    @property
    def grid(self) -> CodeGrid: ...

    @property
    def turned(self) -> bool: ...

    def rescale(self, wanted: torch.Tensor) -> None:
        """Choose scales for a matrix (n, m) in place of those that the file has."""
        ...

    def parts(self, levels: torch.Tensor) -> Sequence[Part]:
        """The bytes of levels (n, m), and of their scales."""
        ...


class WrittenBytes:
    """A reader of what is about to be written, and of all else from where it is."""

    def __init__(self, reader: Bytes, parts: Sequence[Part]) -> None:
        self._reader = reader
        self._parts: dict[str, Part] = {part[0].name: part for part in parts}
        self._kept: dict[tuple[object, str], object] = {}

    def read(self, ref: TensorRef) -> torch.Tensor:
        return self._reader.read(ref)

    def read_bytes(self, ref: TensorRef, start: int, stop: int) -> torch.Tensor:
        if ref.name not in self._parts:
            return self._reader.read_bytes(ref, start, stop)
        _, first, data = self._parts[ref.name]
        if not first <= start <= stop <= first + len(data):
            raise IndexError(f"{ref.name}: bytes {start} to {stop} of those from {first} to {first + len(data)}")
        return data[start - first : stop - first].clone()

    def kept(self, owner: object, name: str, make: Callable[[], T]) -> T:
        key = (owner, name)
        if key not in self._kept:
            self._kept[key] = make()
        return cast(T, self._kept[key])  # made by this owner under this name


def pack_bits(codes: torch.Tensor, bits: int, nbytes: int) -> torch.Tensor:
    """Each row of codes (n, count) uint8 as a little-endian bit stream of ``nbytes`` bytes: (n, nbytes) uint8."""
    count = codes.shape[1]
    eights = torch.nn.functional.pad(codes, (0, -count % 8)).view(len(codes), -1, 8).long()
    joined = torch.zeros(eights.shape[:2], dtype=torch.int64)
    for place in range(8):
        joined |= eights[:, :, place] << (bits * place)
    data = (
        torch.stack([(joined >> (8 * byte)) & 255 for byte in range(bits)], dim=2).to(torch.uint8).view(len(codes), -1)
    )
    return torch.nn.functional.pad(data, (0, max(0, nbytes - data.shape[1])))[:, :nbytes].contiguous()


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The same where each 32-bit word holds 32 // bits codes, the lowest first: (n, 4·words) uint8."""
    per_word = 32 // bits
    words = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word)).view(len(codes), -1, per_word).long()
    joined = torch.zeros(words.shape[:2], dtype=torch.int64)
    for place in range(per_word):
        joined |= words[:, :, place] << (bits * place)
    return joined.to(torch.int32).contiguous().view(torch.uint8)
