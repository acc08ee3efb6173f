"""One worker's scratch memory: what rows are read into, computed in, and written from.

A view of a tensor costs as much as the arithmetic on a thousand elements, so those of a shape are made once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mapconv.algebra.norms import BLOCK_ELEMENTS
from mapconv.merging.survival import Samples


@dataclass(frozen=True)
class Block:
    """Memory for some rows of a matrix (p, m): as they are read, in float32, and as they are written."""

    raw: torch.Tensor
    rows: torch.Tensor
    out: torch.Tensor
    samples: Samples
    raw_bytes: memoryview
    out_bytes: memoryview


@dataclass
class Buffers:
    """The memory itself, reused for every block."""

    NBYTES = BLOCK_ELEMENTS * (8 + 4 + 8 + 8 + 8)

    raw: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    rows: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    spare: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    wide: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    out: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    _blocks: dict[tuple[int, int, torch.dtype, torch.dtype], Block] = field(default_factory=dict)

    def fit(self, elements: int, width: int = 1) -> None:
        """Make room for blocks of ``elements`` elements in rows of ``width`` (a row may be wider than a block)."""
        elements = max(elements, width)
        if self.rows.numel() < elements:
            self.raw = torch.empty(8 * elements, dtype=torch.uint8)
            self.rows = torch.empty(elements)
            self.wide = torch.empty(elements, dtype=torch.float64)
            self.out = torch.empty(8 * elements, dtype=torch.uint8)
            self._blocks.clear()
        measured = 2 * max(width, min(elements, BLOCK_ELEMENTS))
        if self.spare.numel() < measured:
            self.spare = torch.empty(measured)
            self._blocks.clear()

    def block(self, height: int, width: int, stored: torch.dtype, written: torch.dtype) -> Block:
        """The memory as rows of one shape; there must be room for them."""
        key = height, width, stored, written
        if key not in self._blocks:
            shape, numel = (height, width), height * width
            raw, out = self.raw[: numel * stored.itemsize], self.out[: numel * written.itemsize]
            before, rows, after = (
                raw.view(stored).view(shape),
                self.rows[:numel].view(shape),
                out.view(written).view(shape),
            )
            samples = Samples(before, rows, after, self.spare)
            self._blocks[key] = Block(before, rows, after, samples, raw.numpy().data, out.numpy().data)
        return self._blocks[key]

    def widen(self, values: torch.Tensor) -> torch.Tensor:
        return self.wide[: values.numel()].view(values.shape).copy_(values)
