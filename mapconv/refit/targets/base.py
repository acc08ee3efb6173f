"""What a refit asks of the weight T that it comes close to, whatever T is made of.

Each source of T is one file in this folder. It gives a ``Target``: the pencil (T − W0) − t·W0 with its shape, products
with thin blocks, row blocks and exact norms, and two things besides that a stored result needs. A T that is made row
by row, or by somebody else's code as one matrix, is a ``DenseTarget``; ``algebra.dora.AdaptedWeight`` is one that is
never formed. ``refit.converted.refitted_module`` turns any of them into a converted module.
"""

from __future__ import annotations

from typing import Protocol

import torch

from mapconv.algebra.moments import InputRoot
from mapconv.algebra.norms import row_blocks
from mapconv.algebra.pencil import DensePencil, Pencil


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
