"""Second moments of a layer's inputs, and the root P that weighs a weight's columns by them (section 4).

With C = E[x xᵀ] + λI = P·Pᵀ, ‖E·P‖² is the expected squared output error E‖E·x‖² of a weight that is off by E, plus
the ridge λ‖E‖². Symbols: m is the number of inputs of the layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from threading import Lock
from typing import Literal

import torch

from mapconv.algebra.norms import all_finite

Statistics = Literal["full", "diagonal"]

#: λ as a part of C's mean diagonal. It keeps P invertible, and holds directions that few inputs showed near the
#: solution of P = I. The choice matters little: on SmolLM2 (examples/benchmarks/fidelity.py) the KL on held-out text
#: differs by less than 1 % between 1e-4 and 1e-1.
DAMPING = 1e-2
#: Columns of C, and of a product with P, that are computed at once: at least so many, and that part of all.
_STRIP, _STRIPS = 192, 8
#: Steps of the iteration for P's leading directions, each of two products. They are a start, and need not be exact.
_LEADING_STEPS = 3


class _Leading:
    """Leading directions that are known, (m, j) or None; threads that refit layers with one input find them once."""

    def __init__(self, columns: torch.Tensor | None = None) -> None:
        self.lock, self.columns = Lock(), columns


@dataclass(frozen=True)
class InputRoot:
    """P: a lower triangular matrix (m, m), or the diagonal of one (m,); float32."""

    factor: torch.Tensor
    _leading: _Leading = field(default_factory=_Leading, compare=False, repr=False)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """rows·P for rows (p, m)."""
        if self.factor.ndim == 1:
            return rows * self.factor
        # Strip by strip of columns, each from its rows on or below the diagonal: half the products of a full matrix.
        product = torch.empty_like(rows)
        width = max(_STRIP, len(self.factor) // _STRIPS)
        for start in range(0, len(self.factor), width):
            stop = start + width
            torch.mm(rows[:, start:], self.factor[start:, start:stop], out=product[:, start:stop])
        return product

    def divide(self, rows: torch.Tensor) -> torch.Tensor:
        """rows·P⁻¹ for rows (p, m)."""
        if self.factor.ndim == 1:
            return rows / self.factor
        return torch.linalg.solve_triangular(self.factor, rows, upper=False, left=False)

    def divide_transposed(self, rows: torch.Tensor) -> torch.Tensor:
        """rows·P⁻ᵀ for rows (p, m)."""
        if self.factor.ndim == 1:
            return rows / self.factor
        return torch.linalg.solve_triangular(self.factor.T, rows, upper=True, left=False)

    def leading(self, count: int, steps: int = _LEADING_STEPS) -> torch.Tensor:
        """About P's leading right singular vectors, (m, count) up to their lengths, the first first; P is triangular.

        The row space of E·P lies along them for the most part unless E is thin: inputs favour few directions far more
        than an E without structure, such as a rounding error, does.
        """
        with self._leading.lock:
            known = self._leading.columns
            if known is None or known.shape[1] < count:
                draw = torch.Generator().manual_seed(0)
                columns = torch.randn(len(self.factor), count, generator=draw).to(self.factor.device)
                if known is not None:
                    columns[:, : known.shape[1]] = known
                for _ in range(steps):
                    columns = self.multiply(self._times(torch.linalg.qr(columns).Q).T).T
                known = self._leading.columns = columns @ torch.linalg.eigh(columns.T @ columns).eigenvectors.flip(1)
            return known[:, :count]

    def with_leading(self, columns: torch.Tensor) -> InputRoot:
        """The same with leading directions (m, j) that are known, such as those found when it was stored."""
        return InputRoot(self.factor, _Leading(columns))

    def _times(self, columns: torch.Tensor) -> torch.Tensor:
        """P·columns for columns (m, p)."""
        product = torch.empty_like(columns)
        width = max(_STRIP, len(self.factor) // _STRIPS)
        for start in range(0, len(self.factor), width):
            stop = start + width
            torch.mm(self.factor[start:stop, :stop], columns[:stop], out=product[start:stop])
        return product

    def to(self, device: torch.device) -> InputRoot:
        return InputRoot(self.factor.to(device))


class InputMoment:
    """Accumulates Σ x xᵀ, or its diagonal: products in the inputs' precision (float32), sums in float64.

    Of the symmetric matrix only the strips up to the diagonal are computed, which is all that Cholesky reads.
    """

    def __init__(self, width: int, statistics: Statistics) -> None:
        self._statistics, self.count = statistics, 0
        shape = (width, width) if statistics == "full" else (width,)
        self._sum = torch.zeros(shape, dtype=torch.float64)

    def add(self, inputs: torch.Tensor) -> None:
        """Count inputs of shape (…, m)."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        self.count += len(rows)
        if self._statistics == "diagonal":
            self._sum += rows.square().sum(0).to(self._sum)
            return
        for start in range(0, rows.shape[1], _STRIP):
            stop = start + _STRIP
            self._sum[start:stop, :stop] += (rows[:, start:stop].T @ rows[:, :stop]).to(self._sum)

    def add_indices(self, indices: torch.Tensor) -> None:
        """Count one-hot inputs, as an embedding has them; needs diagonal statistics."""
        self._sum += torch.bincount(indices.reshape(-1), minlength=len(self._sum)).to(self._sum)
        self.count += indices.numel()

    @property
    def finite(self) -> bool:
        return all_finite(self._sum)

    @property
    def mean(self) -> float:
        """The mean diagonal of the sum; 0 where no input was seen."""
        diagonal = self._sum if self._sum.ndim == 1 else self._sum.diagonal()
        return float(diagonal.mean())

    def root(self, damping: float = DAMPING) -> InputRoot | None:
        """P, scaled so that C's mean diagonal is 1; None where no input, or none but zeros, was seen."""
        mean = self.mean
        if self.count == 0 or mean <= 0 or not math.isfinite(mean):
            return None
        C = self._sum / mean
        if C.ndim == 1:
            return InputRoot((C + damping).sqrt().float())
        C.diagonal().add_(damping)
        return InputRoot(torch.linalg.cholesky(C).float())
