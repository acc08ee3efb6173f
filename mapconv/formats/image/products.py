"""LyCORIS' products of matrices: the update itself by rows, and two factors that make the same (0 in rounding).

Symbols: Δ = s·(L1 R1) ∘ (L2 R2) for LoHa, Δ = s·kron(W1, W2) for LoKr, with W1 = L1 R1 and W2 = L2 R2 where a side is
stored in factors. A kernel's dimensions count as columns. (``lycoris/modules/loha.py``, ``lokr.py``.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.base import Bytes
from mapconv.checkpoint.derived import Computed


@dataclass(frozen=True)
class Side:
    """One factor of a product: a matrix that is stored whole, or as ``left`` and ``right``, or with a core (Tucker).

    With a core t (i, j, …) the left is (i, out) and the right (j, in): ``einsum(ij…, ip, jr → pr…)``.
    """

    left: TensorRef
    right: TensorRef | None = None
    core: TensorRef | None = None

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return tuple(ref for ref in (self.left, self.right, self.core) if ref is not None)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix."""
        if self.right is None:
            return self.left.shape[0], self.left.numel // self.left.shape[0]
        if self.core is not None:
            kernel = 1
            for size in self.core.shape[2:]:
                kernel *= size
            return self.left.shape[1], self.right.shape[1] * kernel
        return self.left.shape[0], self.right.numel // self.right.shape[0]

    @property
    def rank(self) -> int:
        """Of the factors below."""
        if self.right is None:
            return min(self.shape)
        return self.left.shape[0] if self.core is not None else self.left.shape[1]

    def factors(self, reader: Bytes) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, rank) and (rank, columns), float32."""
        left = reader.read(self.left).float()
        if self.right is None:
            matrix = left.flatten(1)
            eye = torch.eye(min(matrix.shape))
            return (eye, matrix) if matrix.shape[0] <= matrix.shape[1] else (matrix, eye)
        right = reader.read(self.right).float()
        if self.core is None:
            return left, right.flatten(1)
        core = reader.read(self.core).float()
        return left.T, torch.einsum("ij...,jr->ir...", core, right).flatten(1)

    def matrix(self, reader: Bytes) -> torch.Tensor:
        if self.right is None:
            return reader.read(self.left).float().flatten(1)
        left, right = self.factors(reader)
        return left @ right


@dataclass(frozen=True)
class Product(Computed):
    """What two sides make: the update itself, or one of its two factors."""

    one: Side
    two: Side


@dataclass(frozen=True)
class Update(Product):
    """The update itself, whose rows can be had alone where they are asked for whole, ``width`` columns each."""

    width: int

    def rows(self, reader: Bytes, start: int, stop: int, out: torch.Tensor) -> None:
        if out.shape[1] == self.width:
            self._fill(reader, start, stop, out)
        else:
            super().rows(reader, start, stop, out)

    def matrix(self, reader: Bytes) -> torch.Tensor:
        whole = torch.empty(self._height, self.width)
        self._fill(reader, 0, len(whole), whole)
        return whole

    @property
    def _height(self) -> int:
        raise NotImplementedError

    def _fill(self, reader: Bytes, start: int, stop: int, out: torch.Tensor) -> None:
        raise NotImplementedError


class Hadamard(Update):
    """(L1 R1) ∘ (L2 R2)."""

    @property
    def label(self) -> str:
        return "LoHa"

    @property
    def _height(self) -> int:
        return self.one.shape[0]

    def _fill(self, reader: Bytes, start: int, stop: int, out: torch.Tensor) -> None:
        (left1, right1), (left2, right2) = reader.kept(
            self, "sides", lambda: (self.one.factors(reader), self.two.factors(reader))
        )
        torch.mm(left1[start:stop], right1, out=out)
        out.mul_(left2[start:stop] @ right2)


class HadamardLeft(Product):
    """(out, r1·r2): every product of a column of L1 with one of L2."""

    def matrix(self, reader: Bytes) -> torch.Tensor:
        left1, left2 = self.one.factors(reader)[0], self.two.factors(reader)[0]
        return (left1[:, :, None] * left2[:, None, :]).flatten(1)


class HadamardRight(Product):
    """(r1·r2, in): every product of a row of R1 with one of R2."""

    def matrix(self, reader: Bytes) -> torch.Tensor:
        right1, right2 = self.one.factors(reader)[1], self.two.factors(reader)[1]
        return (right1[:, None, :] * right2[None, :, :]).flatten(0, 1)


class Kronecker(Update):
    """kron(W1, W2)."""

    @property
    def label(self) -> str:
        return "LoKr"

    @property
    def _height(self) -> int:
        return self.one.shape[0] * self.two.shape[0]

    def _fill(self, reader: Bytes, start: int, stop: int, out: torch.Tensor) -> None:
        one, two = reader.kept(self, "sides", lambda: (self.one.matrix(reader), self.two.matrix(reader)))
        index = torch.arange(start, stop)
        tall, wide = one[index // len(two)], two[index % len(two)]
        out.copy_((tall[:, :, None] * wide[:, None, :]).flatten(1))


class KroneckerLeft(Product):
    """kron(L1, L2)."""

    def matrix(self, reader: Bytes) -> torch.Tensor:
        return torch.kron(self.one.factors(reader)[0].contiguous(), self.two.factors(reader)[0].contiguous())


class KroneckerRight(Product):
    """kron(R1, R2)."""

    def matrix(self, reader: Bytes) -> torch.Tensor:
        return torch.kron(self.one.factors(reader)[1].contiguous(), self.two.factors(reader)[1].contiguous())


@dataclass(frozen=True)
class TuckerDown(Computed):
    """LoCon's core and down, (r, r, …) and (r, in, 1, 1), as one down of the kernel's size: (r, in·kernel)."""

    def matrix(self, reader: Bytes) -> torch.Tensor:
        core, down = (reader.read(ref).float() for ref in self.stored)
        return torch.einsum("ij...,jr->ir...", core, down.flatten(1))
