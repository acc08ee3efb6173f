"""Round a weight so that its layer's outputs change least: each rounding error is made up for by later columns.

With C = E[x xᵀ] = P·Pᵀ the second moment of the layer's inputs, a change of the rows by E costs ‖E·P‖². Once column j
is rounded with an error e_j, the columns i that are still free lower that cost most by moving against it by
e_j·L[j, i] / L[j, j], where L = P⁻¹ (Frantar et al., *GPTQ*, arXiv 2210.17323: there with the upper factor of C⁻¹,
from the first column to the last; P is lower triangular here, so that columns go from the last to the first).
Columns are taken in blocks: within one each column is updated at once, before it all of them in one product.

Symbols: n outputs, m inputs; a matrix is held transposed here, (m, n), so that a column is contiguous.
"""

from __future__ import annotations

from typing import Protocol

import torch

from mapconv.algebra.moments import InputRoot

#: Columns in a block: as many as leave most of the work to the product with the columns before them.
BLOCK = 64


class Grid(Protocol):
    """The values that may be stored. ``group`` columns, counted from the first, are begun together."""

    @property
    def group(self) -> int: ...

    def begin(self, start: int, stop: int, values: torch.Tensor) -> None:
        """Before columns ``start`` to ``stop`` are rounded, which by now are to become ``values`` (stop − start, n)."""
        ...

    def round(self, column: int, values: torch.Tensor) -> torch.Tensor:
        """The stored values (n,) that one column gets instead of ``values``."""
        ...


def spread(root: InputRoot) -> torch.Tensor:
    """L = P⁻¹, (m, m) lower triangular; of a diagonal P nothing spreads, and there is no use in it."""
    factor = root.factor
    return torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=factor.dtype), upper=False)


def round_columns_(values: torch.Tensor, L: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Replace ``values`` (m, n), float32, by values of the grid, spreading the error of each column over those before.

    Args:
        values: the transposed weight; overwritten.
        L: as ``spread`` makes it, (m, m) float32.
        grid: what may be stored.
    """
    step = grid.group * max(1, BLOCK // grid.group)
    gains = (1 / L.diagonal()).tolist()
    for start in reversed(range(0, len(values), step)):
        stop = min(start + step, len(values))
        block, weights = values[start:stop], L[start:stop, start:stop]
        errors = torch.empty_like(block)
        for first in reversed(range(start, stop, grid.group)):
            last = min(first + grid.group, stop)
            grid.begin(first, last, values[first:last])
            for column in reversed(range(first - start, last - start)):
                wanted = block[column]
                rounded = grid.round(start + column, wanted)
                error = torch.sub(wanted, rounded, out=errors[column]).mul_(gains[start + column])
                wanted.copy_(rounded)
                if column:
                    block[:column].addr_(weights[column, :column], error, alpha=-1)
        if start:
            values[:start].addmm_(L[start:stop, :start].T, errors, alpha=-1)
    return values


class Neighbours:
    """A 16-bit dtype's values, of which each weight takes one of the two around it: within one step of what it was.

    Args:
        wanted: the weight (m, n) before any rounding, float32.
        dtype: bfloat16 or float16.
    """

    group = BLOCK

    def __init__(self, wanted: torch.Tensor, dtype: torch.dtype) -> None:
        self._wanted, self._dtype = wanted, dtype
        self._start = 0

    def begin(self, start: int, stop: int, values: torch.Tensor) -> None:
        self._start = start
        nearest, other = neighbours(self._wanted[start:stop], self._dtype)
        self._low, self._high = torch.minimum(nearest, other), torch.maximum(nearest, other)
        self._middle = (self._low + self._high) / 2

    def round(self, column: int, values: torch.Tensor) -> torch.Tensor:
        row = column - self._start
        return torch.where(values > self._middle[row], self._high[row], self._low[row])


def neighbours(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(nearest, the one on the other side) of a 16-bit dtype around each value, both float32; twice a value of it.

    The largest finite value has none above it, and stands for both there.
    """
    stored = values.to(dtype)
    nearest, bits = stored.float(), stored.view(torch.int16)
    # The bit pattern of a float, without its sign, grows with its magnitude.
    away = (values > nearest) == (nearest > 0)
    beside = torch.where(away, bits + 1, bits - 1)
    zero = nearest == 0
    if zero.any():
        smallest = torch.where(values > 0, 1, -0x7FFF).to(torch.int16)
        beside = torch.where(zero, smallest, beside)
    other = beside.view(dtype).float()
    keeps = (values == nearest) | ~torch.isfinite(other)
    return nearest, torch.where(keeps, nearest, other)
