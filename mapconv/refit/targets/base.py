"""What a refit asks of the weight T that it comes close to, whatever T is made of.

Each source of T is one file in this folder. It gives a ``Target``: the pencil (T − W0) − t·W0 with its shape, products
with thin blocks, row blocks and exact norms, and two things besides that a stored result needs. A T that is made row
by row, or by somebody else's code as one matrix, is a ``DenseTarget``; ``algebra.dora.AdaptedWeight`` is one that is
never formed. ``refit.converted.refitted_module`` turns any of them into a converted module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from mapconv.algebra.moments import InputRoot
from mapconv.algebra.norms import BLOCK_ELEMENTS as NORM_ELEMENTS
from mapconv.algebra.norms import row_blocks
from mapconv.algebra.pencil import DensePencil, Pencil

#: Elements of T − W0 and of W0 that a ``RowsTarget`` forms at a time.
BLOCK_ELEMENTS = 1 << 19


class Target(Pencil, Protocol):
    """A weight T (n, m) on its base W0, as the pencil E(t) = (T − W0) − t·W0."""

    def seen_through(self, root: InputRoot) -> Pencil:
        """The same pencil times P, the root of the inputs' second moment."""
        ...

    def approximation_row_norms(self, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """‖W0 + BA‖ of each row, (n,) float64, for B (n, k) and A (k, m) on the target's device."""
        ...


class DenseTarget(DensePencil):
    """A target whose change and base are held whole.

    Args:
        change: T − W0, (n, m) float32 or float64.
        base: W0, of the same shape and dtype; no copy of either is made.
        directions: (m, j), see ``Pencil``.
    """

    def __init__(self, change: torch.Tensor, base: torch.Tensor, directions: torch.Tensor | None = None) -> None:
        super().__init__(change, base, directions)
        self.base = base

    def seen_through(self, root: InputRoot) -> DensePencil:
        return DensePencil(root.multiply(self.S), root.multiply(self.base))

    def approximation_row_norms(self, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        norms = torch.empty(self.shape[0], dtype=torch.float64, device=self.device)
        for start, stop in row_blocks(*self.shape):
            rows = torch.addmm(self.base[start:stop].double(), B[start:stop].double(), A.double())
            norms[start:stop] = torch.linalg.vector_norm(rows, dim=1)
        return norms


class RowsTarget:
    """A target that is given by its rows, formed anew for each product: nothing but thin blocks is held.

    A source of T derives from it and gives ``rows`` and ``squared_norms``.

    Args:
        shape: (n, m).
        directions: (m, j), see ``Pencil``.
    """

    device = torch.device("cpu")

    def __init__(self, shape: tuple[int, int], directions: torch.Tensor | None = None) -> None:
        self.shape, self.directions = shape, directions

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows start … stop of (T − W0, W0); the caller may overwrite the first."""
        raise NotImplementedError

    def blocks(self, elements: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        """(start, stop, T − W0, W0) of all rows in float32, which are the caller's until it asks for the next."""
        for start, stop in row_blocks(*self.shape, elements):
            yield start, stop, *self.rows(start, stop, torch.float32)

    def products(self, V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        SV, WV = (torch.empty(self.shape[0], V.shape[1]) for _ in range(2))
        for start, stop, S, W in self.blocks():
            torch.mm(S, V, out=SV[start:stop])
            torch.mm(W, V, out=WV[start:stop])
        return SV, WV

    def transposed_product(self, Q: torch.Tensor, t: float) -> torch.Tensor:
        product = torch.zeros(self.shape[1], Q.shape[1])
        for start, stop, S, W in self.blocks():
            product.addmm_((S if t == 0 else S.sub_(W, alpha=t)).T, Q[start:stop])
        return product

    def seen_through(self, root: InputRoot) -> DensePencil:
        return self.dense(self.device).seen_through(root)

    def dense(self, device: torch.device) -> DenseTarget:
        """The same, held in float32 on a device."""
        S, W = torch.empty(self.shape, device=device), torch.empty(self.shape, device=device)
        for start, stop, change, weight in self.blocks():
            S[start:stop], W[start:stop] = change, weight
        return DenseTarget(S, W, self.directions)

    def approximation_row_norms(self, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        norms, wide_A = torch.empty(self.shape[0], dtype=torch.float64), A.double()
        wide = torch.empty(max(NORM_ELEMENTS, self.shape[1]), dtype=torch.float64)
        for start, stop, _, W in self.blocks(NORM_ELEMENTS):
            rows = wide[: W.numel()].view(W.shape).copy_(W).addmm_(B[start:stop].double(), wide_A)
            norms[start:stop] = torch.linalg.vector_norm(rows, dim=1)
        return norms
