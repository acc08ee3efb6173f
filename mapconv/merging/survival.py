"""What of an update survives in the values as they are stored: counted while a merge writes them.

With D = W' − W0 what the adapters ask for and S what the stored values make of it, the *projection* ⟨S, D⟩ / ‖D‖² is
the part of the update that is still there (1: all of it), and ε = ‖S − D‖ / ‖D‖ what storing adds or takes besides,
in units of the update. Rounding to nearest loses an update where it is smaller than half a step: most values then keep
the bytes that they had.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import add
from typing import Any

import numpy as np
import torch

from mapconv.algebra.norms import BLOCK_ELEMENTS, row_blocks

#: Below this projection an update counts as damaged, and a merge says what helps.
DAMAGED = 0.9
#: A large matrix is measured on an eighth of each row block: the columns of one of eight windows in turn, so that every
#: row and every column is sampled; a smaller one in fewer windows, so that a block's worth of values is measured at
#: least. On n values, that has a standard error of about ε/√(2n) for ε and ε/√n for the projection: ε/500 at most.
_WINDOWS = 8


@dataclass(frozen=True)
class Survival:
    """Sums over stored values, so that those of tensors add up: of D², S·D and (S − D)², and values that changed."""

    values: int = 0
    changed: int = 0
    update_square: float = 0.0
    inner: float = 0.0
    error_square: float = 0.0

    def __add__(self, other: Survival) -> Survival:
        return Survival(
            self.values + other.values,
            self.changed + other.changed,
            self.update_square + other.update_square,
            self.inner + other.inner,
            self.error_square + other.error_square,
        )

    @property
    def changed_share(self) -> float:
        return self.changed / self.values if self.values else 0.0

    @property
    def projection(self) -> float:
        """⟨S, D⟩ / ‖D‖²; of no update, all survives."""
        return self.inner / self.update_square if self.update_square else 1.0

    @property
    def error(self) -> float:
        """ε = ‖S − D‖ / ‖D‖."""
        return (self.error_square / self.update_square) ** 0.5 if self.update_square else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {"changed": self.changed_share, "projection": self.projection, "error": self.error}


def total(parts: Iterable[Survival]) -> Survival:
    return sum(parts, start=Survival())


class Samples:
    """Rows of a matrix before and after, of which any part can be measured; views of that part are made once.

    Args:
        before: the base's values (p, m) as they are read, in the base's dtype.
        wanted: W' (p, m), float32.
        stored: what is written for it (p, m).
        spare: flat float32 to work in, at least twice the size of a block of rows.
    """

    def __init__(self, before: torch.Tensor, wanted: torch.Tensor, stored: torch.Tensor, spare: torch.Tensor) -> None:
        self._rows, self._spare = (before, wanted, stored), spare
        self.width = wanted.shape[1]
        self.blocks = list(row_blocks(*wanted.shape))
        self._made: dict[tuple[int, int, int], _Sample] = {}

    def measure(self, block: int, window: int, windows: int) -> tuple[float, float, float, float]:
        """What a window says of all columns of a block of rows: values that changed, ‖S − D‖², ‖D‖², (S − D)·D."""
        key = block, window, windows
        if key not in self._made:
            start, stop = self.blocks[block]
            columns = slice(window * self.width // windows, (window + 1) * self.width // windows)
            before, wanted, stored = (rows[start:stop, columns] for rows in self._rows)
            self._made[key] = _Sample(before, wanted, stored, self._spare, self.width)
        return self._made[key].measure()


class _Sample:
    """Some columns of rows of ``width`` values, and memory for what is made of them."""

    def __init__(
        self, before: torch.Tensor, wanted: torch.Tensor, stored: torch.Tensor, spare: torch.Tensor, width: int
    ) -> None:
        self._before, self._wanted, self._stored = before, wanted, stored
        self._error, self._update = spare[: 2 * wanted.numel()].view(2, *wanted.shape)
        self._flat = self._error.view(-1), self._update.view(-1)
        self._bits = _bits(stored), _bits(before if before.dtype == stored.dtype else stored)
        self._weight = width / wanted.shape[1]

    def measure(self) -> tuple[float, float, float, float]:
        # Widened first: subtracting across dtypes is slower.
        self._error.copy_(self._stored).sub_(self._wanted)
        self._update.copy_(self._before).sub_(self._wanted)  # −D
        error, update = self._flat
        stored, before = self._bits
        if self._before.dtype != self._stored.dtype:
            before = _bits(self._before.to(self._stored.dtype))
        # Bit for bit, which is the fastest, and numpy counts ten times as fast as torch does.
        changed = int(np.count_nonzero(stored != before))
        squares = float(torch.dot(error, error)), float(torch.dot(update, update))
        weight = self._weight
        return weight * changed, weight * squares[0], weight * squares[1], -weight * float(torch.dot(error, update))


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(values: torch.Tensor) -> np.ndarray:
    return values.view(_BITS[values.dtype.itemsize]).numpy()


@dataclass
class Gauge:
    """Measures one matrix while its rows are written: all of a small one, part of the values of a large one.

    Args:
        numel: how many values the matrix has.
        known_norm: ‖D‖, where it is known; else it is measured.
    """

    numel: int
    known_norm: float | None
    _blocks: int = 0
    _sums: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)

    def add(self, rows: Samples) -> None:
        """Count rows of the matrix, which follow those that were counted before."""
        windows = max(1, min(self.numel // BLOCK_ELEMENTS, _WINDOWS, rows.width))
        for block in range(len(rows.blocks)):
            found = rows.measure(block, self._blocks % windows, windows)
            self._sums = tuple(map(add, self._sums, found))
            self._blocks += 1

    @property
    def result(self) -> Survival:
        """Of all rows that were added."""
        changed, error_square, measured, inner = self._sums
        square = measured if self.known_norm is None else self.known_norm**2
        # S·D = D² + (S − D)·D, of which the second term is the one that was measured.
        loss = inner / measured * square if measured else 0.0
        return Survival(self.numel, round(changed), square, square + loss, error_square)
