"""What an adapter adds to a weight, by rows: a product of two factors, or a matrix that is made a block at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


class Increment(Protocol):
    """Δ (n, m), or some rows of it."""

    def part(self, start: int, stop: int) -> Increment:
        """Rows ``start`` to ``stop``."""
        ...

    def scaled(self, factor: float) -> Increment:
        """``factor·Δ``."""
        ...

    def add_to_(self, rows: torch.Tensor, *, beta: float, alpha: float) -> torch.Tensor:
        """``beta·rows + alpha·Δ`` in place; ``rows`` are as many as Δ's."""
        ...

    def added_to(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows + Δ``, a new tensor."""
        ...

    def columns(self, start: int, stop: int) -> torch.Tensor:
        """Columns ``start`` to ``stop``, (n, stop − start)."""
        ...


@dataclass(frozen=True)
class ProductIncrement:
    """Δ = BA, with B (n, r) and A (r, m)."""

    A: torch.Tensor
    B: torch.Tensor

    def part(self, start: int, stop: int) -> ProductIncrement:
        return ProductIncrement(self.A, self.B[start:stop])

    def scaled(self, factor: float) -> ProductIncrement:
        return ProductIncrement(self.A, self.B * factor)

    def add_to_(self, rows: torch.Tensor, *, beta: float, alpha: float) -> torch.Tensor:
        return rows.addmm_(self.B.to(rows.dtype), self.A.to(rows.dtype), beta=beta, alpha=alpha)

    def added_to(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.addmm(rows, self.B.to(rows.dtype), self.A.to(rows.dtype))

    def columns(self, start: int, stop: int) -> torch.Tensor:
        return self.B @ self.A[:, start:stop]


@dataclass(frozen=True)
class RowIncrement:
    """Δ = factor·D with rows of D from ``read(start, stop)``; ``start`` and ``stop`` say which of them these are."""

    read: Callable[[int, int], torch.Tensor]
    start: int
    stop: int
    factor: float = 1.0

    def part(self, start: int, stop: int) -> RowIncrement:
        return RowIncrement(self.read, self.start + start, self.start + stop, self.factor)

    def scaled(self, factor: float) -> RowIncrement:
        return RowIncrement(self.read, self.start, self.stop, self.factor * factor)

    def add_to_(self, rows: torch.Tensor, *, beta: float, alpha: float) -> torch.Tensor:
        if beta != 1.0:
            rows.mul_(beta)
        return rows.add_(self._values(rows.dtype), alpha=alpha * self.factor)

    def added_to(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.add(self._values(rows.dtype), alpha=self.factor)

    def columns(self, start: int, stop: int) -> torch.Tensor:
        return self.factor * self._values(torch.float32)[:, start:stop]

    def _values(self, dtype: torch.dtype) -> torch.Tensor:
        return self.read(self.start, self.stop).to(dtype)
