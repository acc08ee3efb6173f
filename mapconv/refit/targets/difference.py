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
from mapconv.algebra.norms import row_blocks
from mapconv.algebra.pencil import DensePencil
from mapconv.algebra.rounding import SIGNIFICAND_BITS, mean_squares
from mapconv.errors import CheckpointError
from mapconv.placement.matrices import MatrixRows
from mapconv.refit.targets.base import DenseTarget

#: Elements of T and of W0 that are in memory in float32 at a time.
BLOCK_ELEMENTS = 1 << 19


class Difference:
    """The pencil (T − W0) − t·W0 of two stored weights of one shape (n, m).

    ``base`` and ``tuned`` are the fingerprints of W0 and T, ``noise`` (m,) float64 the expected squared rounding error
    of T's columns.

    Raises:
        CheckpointError: one of them holds NaN or infinity.
    """

    directions = None
    device = torch.device("cpu")

    def __init__(self, base: MatrixRows, tuned: MatrixRows) -> None:
        self._base, self._tuned = base, tuned
        self.shape = base.view.shape
        left, right = row_numbers(self.shape[0]), column_numbers(self.shape[1])
        change, weight, inner = Fingerprint(), Fingerprint(), 0.0
        for start, stop, S, W in self._blocks():
            wide_S, wide_W = S.double(), W.double()
            change += block_fingerprint(wide_S, left[start:stop], right)
            weight += block_fingerprint(wide_W, left[start:stop], right)
            inner += float(torch.dot(wide_S.view(-1), wide_W.view(-1)))
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
            whole = sum(
                float(torch.linalg.vector_norm(root.multiply(S)).double() ** 2) for _, _, S, _ in self._blocks()
            )
        return min(1.0, (noise / whole) ** 0.5) if whole else 0.0

    def products(self, V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        SV, WV = (torch.empty(self.shape[0], V.shape[1]) for _ in range(2))
        for start, stop, S, W in self._blocks():
            torch.mm(S, V, out=SV[start:stop])
            torch.mm(W, V, out=WV[start:stop])
        return SV, WV

    def transposed_product(self, Q: torch.Tensor, t: float) -> torch.Tensor:
        product = torch.zeros(self.shape[1], Q.shape[1])
        for start, stop, S, W in self._blocks():
            product.addmm_((S if t == 0 else S.sub_(W, alpha=t)).T, Q[start:stop])
        return product

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        W = self._base.rows(start, stop, dtype)
        return self._tuned.rows(start, stop, dtype).sub_(W), W

    def seen_through(self, root: InputRoot) -> DensePencil:
        return self.dense(torch.device("cpu")).seen_through(root)

    def dense(self, device: torch.device) -> DenseTarget:
        """The same, held in float32 on a device."""
        S, W = torch.empty(self.shape, device=device), torch.empty(self.shape, device=device)
        for start, stop, change, weight in self._blocks():
            S[start:stop], W[start:stop] = change, weight
        return DenseTarget(S, W)

    def approximation_row_norms(self, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        norms, wide_A = torch.empty(self.shape[0], dtype=torch.float64), A.double()
        for start, stop in row_blocks(*self.shape, BLOCK_ELEMENTS):
            rows = self._base.rows(start, stop, torch.float64).addmm_(B[start:stop].double(), wide_A)
            norms[start:stop] = torch.linalg.vector_norm(rows, dim=1)
        return norms

    def tuned_row_norms(self) -> torch.Tensor:
        """‖T‖ of each row, (n,) float64."""
        norms = torch.empty(self.shape[0], dtype=torch.float64)
        for start, stop in row_blocks(*self.shape, BLOCK_ELEMENTS):
            norms[start:stop] = torch.linalg.vector_norm(self._tuned.rows(start, stop, torch.float64), dim=1)
        return norms

    def _blocks(self) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        for start, stop in row_blocks(*self.shape, BLOCK_ELEMENTS):
            yield start, stop, *self.rows(start, stop, torch.float32)

    def _noise(self) -> torch.Tensor:
        noise = torch.zeros(self.shape[1], dtype=torch.float64)
        bits, prior = SIGNIFICAND_BITS.get(self._tuned.view.dtype), self._norms[0] / (self.shape[0] * self.shape[1])
        if bits is not None:
            for _, _, S, W in self._blocks():
                noise += mean_squares(W.add_(S), S, bits, prior).sum(0).double()
        return noise
