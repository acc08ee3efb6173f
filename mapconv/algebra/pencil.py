"""What the solver of problem (2) needs to know of a target: its products, its rows, its norms; never the whole matrix.

A target T with a base W0 is the pencil E(t) = S − t·W with S = T − W0 and W = W0: E(t) = T − (1 + t)·W0, so the gain a
is 1 + t. Weighted by inputs, S and W are (T − W0)·P and W0·P. A matrix that is only to be approximated has no W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from mapconv.algebra.norms import row_blocks, squared_norm


class Pencil(Protocol):
    """A family of n×m matrices E(t) = S − t·W, known through thin products and row blocks.

    Where there is no W, its parts below are None and its norms 0, and t = 0 alone is looked at. A pencil is used by one
    thread at a time.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m)."""
        ...

    @property
    def device(self) -> torch.device:
        """Where thin blocks are given and returned."""
        ...

    @property
    def directions(self) -> torch.Tensor | None:
        """(m, j) directions that S's row space is expected to lie in for a good part, such as the rows of a LoRA's A.

        They only speed the randomized way up; None where nothing is known.
        """
        ...

    def products(self, V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(S·V, W·V) for V of shape (m, l), float32, in float32."""
        ...

    def transposed_product(self, Q: torch.Tensor, t: float) -> torch.Tensor:
        """E(t)ᵀ·Q for Q of shape (n, l), float32, in float32."""
        ...

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows start … stop of (S, W), computed in ``dtype``; the caller may overwrite S, but not W."""
        ...

    def squared_norms(self) -> tuple[float, float, float]:
        """(‖S‖², ⟨S, W⟩, ‖W‖²), accumulated in float64."""
        ...


class DensePencil:
    """A pencil of matrices that are held whole: a difference of two checkpoints, or any matrix M without a W.

    Args:
        S: (n, m) float32 or float64.
        W: the same shape, or None.
        directions: (m, j), see ``Pencil``.
    """

    def __init__(self, S: torch.Tensor, W: torch.Tensor | None = None, directions: torch.Tensor | None = None) -> None:
        self.S, self.W, self.directions = S, W, directions
        self.shape = (S.shape[0], S.shape[1])
        self.device = S.device
        self._norms = (squared_norm(S), 0.0, 0.0) if W is None else (squared_norm(S), _inner(S, W), squared_norm(W))

    def products(self, V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        V = V.to(self.S.dtype)
        return (self.S @ V).float(), None if self.W is None else (self.W @ V).float()

    def transposed_product(self, Q: torch.Tensor, t: float) -> torch.Tensor:
        Q = Q.to(self.S.dtype)
        product = self.S.T @ Q
        return (product if self.W is None or t == 0 else product.sub_(self.W.T @ Q, alpha=t)).float()

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.S[start:stop].to(dtype, copy=True), None if self.W is None else self.W[start:stop].to(dtype)

    def squared_norms(self) -> tuple[float, float, float]:
        return self._norms


@dataclass(frozen=True)
class LowRank:
    """``left @ right`` approximates E(shift), and ``squared_error`` is ‖E(shift) − left·right‖² as the solver knows it.

    left (n, k) and right (k, m) in float32, or in float64 where the error is so small that it matters.
    """

    shift: float
    left: torch.Tensor
    right: torch.Tensor
    squared_error: float


def balanced(shift: float, left: torch.Tensor, right: torch.Tensor, squared_error: float) -> LowRank:
    """The factors with ‖left‖ = ‖right‖ column by row: they survive a later rounding to 16 bits best."""
    lengths = torch.linalg.vector_norm(left, dim=0), torch.linalg.vector_norm(right, dim=1)
    ratio = lengths[1] / lengths[0]
    roots = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0).sqrt()
    return LowRank(shift, (left * roots).contiguous(), (right / roots[:, None]).contiguous(), squared_error)


def residual_norm(
    pencil: Pencil, t: float, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype = torch.float32
) -> float:
    """‖E(t) − left·right‖ by forming its rows block by block in ``dtype``, from nothing that a solver has computed."""
    left, right, total = left.to(dtype), right.to(dtype), 0.0
    for start, stop in row_blocks(*pencil.shape):
        block = error_rows(pencil, t, start, stop, dtype).addmm_(left[start:stop], right, alpha=-1)
        total += float(torch.linalg.vector_norm(block)) ** 2
    return total**0.5


def error_rows(pencil: Pencil, t: float, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows start … stop of E(t)."""
    S, W = pencil.rows(start, stop, dtype)
    return S if W is None or t == 0 else S.sub_(W, alpha=t)


def _inner(one: torch.Tensor, two: torch.Tensor) -> float:
    blocks = row_blocks(*one.shape)
    return sum(float((one[start:stop].double() * two[start:stop].double()).sum()) for start, stop in blocks)
