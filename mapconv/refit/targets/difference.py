"""T is a finetuned weight beside the base's: their difference, formed a row block at a time and never held.

One pass over both finds the exact norms and the fingerprints, and what the rounding of T to its stored dtype has left
in the difference (``mapconv.algebra.rounding``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from mapconv.algebra.fingerprint import Fingerprint, block_fingerprint, column_numbers, row_numbers
from mapconv.algebra.moments import InputRoot
from mapconv.algebra.norms import BLOCK_ELEMENTS as WIDE_ELEMENTS
from mapconv.algebra.norms import row_blocks
from mapconv.algebra.rounding import SIGNIFICAND_BITS, mean_squares
from mapconv.errors import CheckpointError
from mapconv.placement.matrices import MatrixRows
from mapconv.refit.targets.base import BLOCK_ELEMENTS, RowsTarget

#: Elements that the rounding is estimated from at most: rows that are spread evenly over a larger weight, which give
#: the sum of a million independent squares to a fraction of a percent.
SAMPLED = 1 << 20


class Difference(RowsTarget):
    """The pencil (T − W0) − t·W0 of two stored weights of one shape (n, m).

    ``base`` and ``tuned`` are the fingerprints of W0 and T, ``noise`` (m,) float64 the expected squared rounding error
    of T's columns.

    Raises:
        CheckpointError: one of them holds NaN or infinity.
    """

    def __init__(self, base: MatrixRows, tuned: MatrixRows) -> None:
        super().__init__(base.view.shape)
        self._base, self._tuned = base, tuned
        left, right = row_numbers(self.shape[0]), column_numbers(self.shape[1])
        change, weight, inner = Fingerprint(), Fingerprint(), 0.0
        wide = [torch.empty(max(WIDE_ELEMENTS, self.shape[1]), dtype=torch.float64) for _ in range(2)]
        for start, stop, S, W in self.blocks(WIDE_ELEMENTS):
            change += block_fingerprint(S, left[start:stop], right, wide[0])
            weight += block_fingerprint(W, left[start:stop], right, wide[1])
            inner += float(torch.dot(*(values[: S.numel()] for values in wide)))
        self._norms = change.square, inner, weight.square
        for rows, finite in ((base, math.isfinite(weight.square)), (tuned, math.isfinite(change.square))):
            if not finite:
                raise CheckpointError(f"{rows.view.pieces[0].tensor.file}: {rows.view.name} holds NaN or infinity.")
        self.base = weight
        self.tuned = Fingerprint(weight.square + 2 * inner + change.square, weight.projection + change.projection)
        self.noise = self._noise()

    def squared_norms(self) -> tuple[float, float, float]:
        return self._norms

    def floor(self, root: InputRoot | None = None) -> float:
        """The part of ‖(T − W0)·P‖ that is rounding, between 0 and 1; ``root`` None: P = I."""
        if root is None:
            noise, whole = float(self.noise.sum()), self._norms[0]
        else:
            # Of independent errors, E‖N·P‖² is each column's own square times ‖P‖² of that row.
            weights = root.factor.double().square()
            noise = float(self.noise @ (weights if weights.ndim == 1 else weights.sum(1)))
            whole = sum(float(torch.linalg.vector_norm(root.multiply(S)).double() ** 2) for _, _, S, _ in self.blocks())
        return min(1.0, (noise / whole) ** 0.5) if whole else 0.0

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        W = self._base.rows(start, stop, dtype)
        return self._tuned.rows(start, stop, dtype).sub_(W), W

    def blocks(self, elements: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        size = max(elements, self.shape[1])
        one, two = torch.empty(size), torch.empty(size)
        for start, stop in row_blocks(*self.shape, elements):
            W = self._base.rows(start, stop, out=two)
            yield start, stop, self._tuned.rows(start, stop, out=one).sub_(W), W

    def _noise(self) -> torch.Tensor:
        height, width = self.shape
        noise = torch.zeros(width, dtype=torch.float64)
        bits, prior = SIGNIFICAND_BITS.get(self._tuned.view.dtype), self._norms[0] / (height * width)
        if bits is None:
            return noise
        blocks = list(row_blocks(height, width, WIDE_ELEMENTS))
        step, rows = max(1, height * width // SAMPLED), 0
        for start, stop in blocks[::step]:
            S, W = self.rows(start, stop, torch.float32)
            noise += mean_squares(W.add_(S), S, bits, prior).sum(0).double()
            rows += stop - start
        return noise * (height / rows)
