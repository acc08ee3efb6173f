"""How merged rows become stored ones: each value to its nearest, or with the layers' inputs in view."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mapconv.algebra.feedback import Grid, Neighbours, round_columns_, spread
from mapconv.algebra.moments import InputRoot
from mapconv.checkpoint.codecs.encode.base import CodeGrid
from mapconv.merging.plan import LowRankUpdate, MergeJob

#: Elements of the rows that are rounded together: a step for each column is worth its while for many rows.
ELEMENTS = 1 << 22


class CodeColumns:
    """The columns of a ``CodeGrid`` as a ``Grid``, which keeps the levels (m, n) that it chose."""

    group = 1

    def __init__(self, grid: CodeGrid, shape: torch.Size) -> None:
        self._grid, self.levels = grid, torch.empty(shape[1], shape[0])

    def begin(self, start: int, stop: int, values: torch.Tensor) -> None:
        pass

    def round(self, column: int, values: torch.Tensor) -> torch.Tensor:
        levels = self.levels[column].copy_(self._grid.nearest(values, column))
        return self._grid.values(levels, column)


@dataclass
class Feedback:
    """What is known of the inputs of some modules, by their paths: the roots of the second moments."""

    #: Rows as they are read, wanted, rounded and measured.
    WORKING_BYTES: ClassVar[int] = 40 * ELEMENTS

    roots: Mapping[str, InputRoot | None]
    _spreads: dict[int, torch.Tensor] = field(default_factory=dict)

    def covers(self, job: MergeJob) -> bool:
        """Whether any of the tensor's rows can be rounded with feedback."""
        return any(self._root(item) is not None for item in job.updates)

    def elements(self, job: MergeJob) -> int:
        """How many elements of a tensor go together: of one that is stored transposed all, as its rows are inputs."""
        _, height, width = job.grid
        return height * width if any(item.piece.transposed for item in job.updates) else ELEMENTS

    def round(self, job: MergeJob, index: int, start: int, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Write stored rows from ``start`` on of the tensor's matrix ``index`` into ``out``, of a 16-bit dtype."""
        out.copy_(rows)
        for item in job.updates:
            piece, root = item.piece, self._root(item)
            if piece.index != index or root is None:
                continue
            if piece.transposed:
                columns = slice(piece.offset, piece.offset + piece.stop - piece.start)
                out[:, columns] = self._rounded(rows[:, columns], root, out.dtype)
                continue
            first, last = piece.stored_rows
            part = slice(max(0, first - start), max(0, last - start))
            out[part] = self._rounded(rows[part].T, root, out.dtype).T

    def choose(
        self, job: MergeJob, index: int, grid: CodeGrid, wanted: torch.Tensor, levels: torch.Tensor, *, turned: bool
    ) -> None:
        """Replace in ``levels`` (n, m) those of the rows of ``wanted`` whose inputs are known."""
        for item in job.updates:
            piece, root = item.piece, self._root(item)
            # Rows of codes have to be outputs.
            if piece.index != index or root is None or piece.transposed != turned:
                continue
            first = piece.offset
            part = slice(first, first + piece.stop - piece.start)
            columns = CodeColumns(grid.of_rows(part), wanted[part].shape)
            round_columns_(wanted[part].T.clone(memory_format=torch.contiguous_format), self._spread(root), columns)
            levels[part] = columns.levels.T

    def _rounded(self, wanted: torch.Tensor, root: InputRoot, dtype: torch.dtype) -> torch.Tensor:
        grid: Grid = Neighbours(wanted, dtype)
        return round_columns_(wanted.clone(memory_format=torch.contiguous_format), self._spread(root), grid)

    def _spread(self, root: InputRoot) -> torch.Tensor:
        # Modules with the same inputs share a root.
        if id(root) not in self._spreads:
            self._spreads[id(root)] = spread(root)
        return self._spreads[id(root)]

    def _root(self, item: LowRankUpdate) -> InputRoot | None:
        """Of an embedding, or without statistics between columns, there is none that would serve."""
        root = self.roots.get(item.placed.module.path) if item.placed.experts == 1 else None
        return root if root is not None and root.factor.ndim == 2 else None
