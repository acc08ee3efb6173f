"""A weight as the mathematics sees it, one matrix (out, in), and where its rows lie in stored tensors.

Checkpoints store a weight as it is, transposed (GPT-2's Conv1D, embeddings), as one of a stack (experts), fused with
its neighbours, or in pieces of its own. A ``WeightView`` says which, and everything else works on rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch

from mapconv.adapter import ITEM_SIZES, MapModule, Module, TensorRef
from mapconv.algebra.fingerprint import Fingerprint, block_fingerprint, column_numbers, row_numbers
from mapconv.algebra.norms import BLOCK_ELEMENTS, row_blocks
from mapconv.checkpoint.reader import TensorReader

Item = TypeVar("Item")


@dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``stop`` of a weight, and the block of a stored tensor that holds them.

    The tensor is a stack of matrices, mostly of one; ``index`` says which, and ``offset`` where in that matrix the rows
    begin. In a ``transposed`` matrix the weight's rows are stored as columns.
    """

    tensor: TensorRef
    start: int
    stop: int
    index: int = 0
    stacked: bool = False
    offset: int = 0
    transposed: bool = False

    @property
    def grid(self) -> tuple[int, int, int]:
        """The tensor as (matrices, stored rows, stored columns)."""
        return grid(self.tensor.shape, stacked=self.stacked)

    @property
    def stored_rows(self) -> tuple[int, int]:
        """Which rows of the stored matrix belong to this piece."""
        return (0, self.grid[1]) if self.transposed else (self.offset, self.offset + self.stop - self.start)

    @property
    def place(self) -> str:
        """Which rows of which tensor."""
        rows = f"{self.index}:{self.offset}:{self.stop - self.start}"
        whole = not (self.stacked or self.transposed or self.offset) and self.stop - self.start == self.grid[1]
        return self.tensor.name if whole else f"{self.tensor.name}[{rows}{'T' if self.transposed else ''}]"


@dataclass(frozen=True)
class WeightView:
    """A weight of ``shape`` (out, in), assembled from pieces in the order of its rows."""

    shape: tuple[int, int]
    pieces: tuple[Piece, ...]

    @cached_property
    def place(self) -> str:
        """What tells a weight from the others of its base: which rows of which tensors."""
        return " + ".join(piece.place for piece in self.pieces)

    @property
    def nbytes(self) -> int:
        rows = ((piece.stop - piece.start) * ITEM_SIZES[piece.tensor.dtype] for piece in self.pieces)
        return sum(rows) * self.shape[1]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> str:
        return self.pieces[0].tensor.dtype

    @property
    def name(self) -> str:
        """The stored tensors' names, for messages."""
        return " + ".join(dict.fromkeys(piece.tensor.name for piece in self.pieces))


@dataclass(frozen=True)
class PlacedModule:
    """An adapted weight: its factors, the base weight they land on, and its scalars where the adapter is a MAP adapter.

    ``expert`` counts the weights of a stacked parameter, whose factors lie side by side in the module's tensors.
    ``parameter`` is the name in the live model. ``bias`` is the layer's own, where another method than LoRA may change
    it.
    """

    module: Module
    weight: WeightView
    parameter: str
    rank: int
    scaling: float
    expert: int | None = None
    experts: int = 1
    initialization: str | None = None
    scalars: MapModule | None = None
    bias: TensorRef | None = None

    @property
    def key(self) -> tuple[str, int | None]:
        """What tells this weight from the others of its adapter."""
        return self.module.path, self.expert

    @property
    def identity(self) -> tuple[str, str, int | None]:
        """What tells it from those of every adapter."""
        return str(self.module.lora_A.file), *self.key

    @property
    def changes_bias(self) -> bool:
        """Whether the layer is of another method than LoRA whose merge changes its bias as well."""
        return self.module.method is not None and self.module.method.changes_bias

    @property
    def effective_rank(self) -> int:
        """Rank of the whole update: an initialization that changed the base adds its own part to the factors'."""
        return self.rank if self.initialization is None else 2 * self.rank

    def with_scalars(self, scalars: MapModule) -> PlacedModule:
        return replace(self, scalars=scalars)


def in_stacks(items: Iterable[Item], experts: Callable[[Item], int]) -> Iterator[list[Item]]:
    """One weight at a time, but all ``experts`` of a stack together, which come one after another."""
    stack: list[Item] = []
    for item in items:
        stack.append(item)
        if len(stack) == experts(item):
            yield stack
            stack = []


def grid(shape: tuple[int, ...], *, stacked: bool) -> tuple[int, int, int]:
    """(matrices, rows, columns) of a stored tensor: a kernel's dimensions count as columns, a vector is one column."""
    if stacked:
        return shape[0], shape[1], math.prod(shape[2:])
    return 1, (shape[0] if shape else 1), math.prod(shape[1:])


def read_rows(reader: TensorReader, piece: Piece, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
    """Rows ``start`` to ``stop`` of the stored matrix that a piece lies in, (rows, columns); a view into ``buffer``."""
    _, height, width = piece.grid
    first = (piece.index * height + start) * width
    return reader.read_range(piece.tensor, first, first + (stop - start) * width, buffer).view(stop - start, width)


def stored_blocks(view: WeightView, reader: TensorReader) -> Iterator[tuple[Piece, int, int, torch.Tensor]]:
    """Every block of a weight as it is stored: (piece, start, stop, values of the piece in those stored rows).

    The values share memory with the next block's.
    """
    for piece in view.pieces:
        _, _, width = piece.grid
        buffer = torch.empty(8 * max(width, BLOCK_ELEMENTS), dtype=torch.uint8)
        first, last = piece.stored_rows
        for start, stop in row_blocks(last - first, width):
            rows = read_rows(reader, piece, first + start, first + stop, buffer)
            if piece.transposed:
                rows = rows[:, piece.offset : piece.offset + piece.stop - piece.start]
            yield piece, start, stop, rows


def read_weight(view: WeightView, reader: TensorReader, out: torch.Tensor) -> torch.Tensor:
    """The whole weight (out, in) in ``out``'s dtype, in the memory of ``out``, a flat tensor."""
    matrix = out[: view.numel].view(view.shape)
    for piece, start, stop, rows in stored_blocks(view, reader):
        if piece.transposed:
            matrix[piece.start : piece.stop, start:stop] = rows.T
        else:
            matrix[piece.start + start : piece.start + stop] = rows
    return matrix


def subtract_weight_(matrix: torch.Tensor, view: WeightView, reader: TensorReader) -> Fingerprint:
    """matrix − W (out, in), float32, in the matrix's memory, block by block; returns W's fingerprint."""
    total = Fingerprint()
    for piece, start, stop, rows in stored_blocks(view, reader):
        total += block_fingerprint(rows, *block_numbers(view, piece, start, stop))
        if piece.transposed:
            matrix[piece.start : piece.stop, start:stop] -= rows.T
        else:
            matrix[piece.start + start : piece.start + stop] -= rows
    return total


def weight_fingerprint(view: WeightView, reader: TensorReader) -> Fingerprint:
    """‖W0‖ and W0's random projection in one pass over the stored bytes, accumulated in float64."""
    wide = torch.empty(max(BLOCK_ELEMENTS, *(piece.grid[2] for piece in view.pieces)), dtype=torch.float64)
    total = Fingerprint()
    for piece, start, stop, rows in stored_blocks(view, reader):
        total += block_fingerprint(rows, *block_numbers(view, piece, start, stop), wide)
    return total


def block_numbers(view: WeightView, piece: Piece, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The random numbers that a fingerprint gives the rows and columns of a block of ``stored_blocks``."""
    rows, columns = row_numbers(view.shape[0]), column_numbers(view.shape[1])
    if piece.transposed:
        return columns[start:stop], rows[piece.start : piece.stop]
    return rows[piece.start + start : piece.start + stop], columns


def part_of(view: WeightView, start: int, stop: int) -> WeightView:
    """Rows ``start`` to ``stop`` of a weight, as a weight of its own."""
    pieces = []
    for piece in view.pieces:
        first, last = max(start, piece.start), min(stop, piece.stop)
        if first < last:
            offset = piece.offset + first - piece.start
            pieces.append(replace(piece, start=first - start, stop=last - start, offset=offset))
    return WeightView((stop - start, view.shape[1]), tuple(pieces))
