"""Reduced-rank regression: the update of another base's weight whose outputs come closest to those that are wanted.

A layer with the adapted weight T had the inputs x; on another base, behind other layers, it gets x̃. Wanted is

    minimise over R of rank k (and over a)   E‖T·x − (a·W + R)·x̃‖²

With C = E[x̃ x̃ᵀ] + λI = P·Pᵀ and S = E[x x̃ᵀ] + λI the part that R can reach is ‖M(a) − R·P‖² with
M(a) = T·S·P⁻ᵀ − a·W·P, so that R = [M]_k·P⁻¹ (Izenman 1975, reduced-rank regression). The same λ in S and C keeps
directions that no input showed near the weights' own difference; for x̃ = x it is problem (2) weighed by the inputs.
Where T·x is what a layer was seen to make and has fewer values than x, T·S = E[T·x x̃ᵀ] + λT takes fewer products.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from mapconv.algebra.moments import DAMPING, InputMoment, InputRoot
from mapconv.algebra.norms import all_finite
from mapconv.algebra.pencil import DensePencil
from mapconv.algebra.randomized import OVERSAMPLING


@dataclass(frozen=True)
class RegressionInputs:
    """What a fit needs of a layer's inputs: ``root`` is P of C, ``cross`` is S (m, m), or None where x̃ = x.

    With ``of_outputs``, ``cross`` is E[T·x x̃ᵀ] (n, m), which lacks ``damping``·T, for the λ of S. ``tokens`` is the
    number of inputs that were seen: fewer than m leave C without full rank but for λ.
    """

    root: InputRoot
    cross: torch.Tensor | None
    tokens: int
    of_outputs: bool = False
    damping: float = DAMPING

    def pencil(self, change: torch.Tensor, W: torch.Tensor | None, *, gains: bool, rank: int) -> DensePencil:
        """M as the pencil E(t) = M(1) − t·W·P, for T − W and W (n, m) float32; the gain is 1 + t.

        Without ``gains`` t = 0 alone will be looked at, and W·P is left out: W is needed with them, or where x̃ ≠ x.
        ``rank`` is what will be asked of it first.
        """
        known = self.root.leading(min(rank + OVERSAMPLING, *change.shape))
        if not gains:
            return DensePencil(self.seen(change, W), None, known)
        assert W is not None  # a gain is of it
        WP = self.root.multiply(W)
        return DensePencil(self.seen(change, W, WP), WP, known)

    def seen(self, change: torch.Tensor, W: torch.Tensor | None, WP: torch.Tensor | None = None) -> torch.Tensor:
        """M(1) alone, (n, m) float32; ``WP`` is W·P where it is known."""
        if self.cross is None:
            return self.root.multiply(change)
        assert W is not None  # what x̃ makes of it is a part of M
        T = change + W
        if self.of_outputs:
            seen = self.root.divide_transposed(self.cross.add(T, alpha=self.damping))
        else:
            seen = torch.mm(T, self._reached)
        return seen.sub_(self.root.multiply(W) if WP is None else WP)

    @cached_property
    def _reached(self) -> torch.Tensor:
        """S·P⁻ᵀ, which layers with the same inputs share."""
        assert self.cross is not None  # asked for by ``pencil``
        return self.root.divide_transposed(self.cross)


class PairedMoment:
    """Accumulates Σ x̃ x̃ᵀ and Σ x x̃ᵀ, or Σ T·x x̃ᵀ of a layer's outputs: products in float32, sums in float64."""

    def __init__(self, width: int, *, of_outputs: bool = False) -> None:
        self._made, self._of_outputs = InputMoment(width, "full"), of_outputs
        self._cross: torch.Tensor | None = None

    def add(self, wanted: torch.Tensor, made: torch.Tensor) -> None:
        """Count the inputs x (or the outputs T·x) and x̃, (…, m) or (…, n), of the same tokens."""
        wanted, made = (rows.reshape(-1, rows.shape[-1]).float() for rows in (wanted, made))
        self._made.add(made)
        product = wanted.T @ made
        self._cross = product.double() if self._cross is None else self._cross.add_(product)

    @property
    def finite(self) -> bool:
        return self._made.finite and (self._cross is None or all_finite(self._cross))

    def inputs(self, damping: float = DAMPING) -> RegressionInputs | None:
        """P and S, scaled so that C's mean diagonal is 1; None where no input, or none but zeros, was seen."""
        root = self._made.root(damping)
        if root is None or self._cross is None:
            return None
        S = self._cross / self._made.mean
        if not self._of_outputs:
            S.diagonal().add_(damping)
        return RegressionInputs(root, S.float(), self._made.count, self._of_outputs, damping)
