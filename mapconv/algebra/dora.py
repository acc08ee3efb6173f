"""The adapted weight as an operator, and as rows: LoRA and DoRA in one form.

Symbols: W0 (n, m) base weight; A (r, m) and B (n, r) factors with the scaling folded into B; d (n,) row scales.
The adapted weight is T = diag(d)(W0 + BA), with d = magnitude ⊘ ‖W0 + BA‖_row for DoRA (arXiv 2402.09353; PEFT's
``DoraLinearLayer``: no epsilon) and d = 1 for LoRA.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mapconv.algebra.increments import Increment, ProductIncrement
from mapconv.algebra.moments import InputRoot
from mapconv.algebra.norms import row_blocks, row_squares


class AdaptedWeight:
    """T = diag(d)(W0 + BA), seen through the pencil E(t) = (T − W0) − t·W0 of section 4.

    Args:
        base: W0, (n, m) float32; no copy of it is made.
        A: (r, m) and
        B: (n, r), float32, scaling included.
        magnitude: (n,) for DoRA, None for LoRA.
        scales: (n,) float64: d itself, instead of a magnitude.
    """

    def __init__(
        self,
        base: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        magnitude: torch.Tensor | None = None,
        *,
        scales: torch.Tensor | None = None,
    ) -> None:
        self.base, self.A, self.B = base, A, B
        self.shape = (base.shape[0], base.shape[1])
        self.device = base.device
        self._base_squares = row_squares(base)
        wide_B = B.double()
        self._update_squares = _product_row_squares(wide_B, A)
        if magnitude is None:
            self.scales = torch.ones_like(self._base_squares) if scales is None else scales
            self._inner = ((base @ A.T).double() * wide_B).sum(1)
        else:
            merged_squares = _merged_row_squares(base, A, B)
            self.scales = row_scales(magnitude, merged_squares.sqrt())
            self._inner = (merged_squares - self._base_squares - self._update_squares) / 2

    def seen_through(self, root: InputRoot) -> AdaptedWeight:
        """T·P, an adapted weight of its own: W0·P and A·P in place of W0 and A, with the row scales of T."""
        base = torch.empty_like(self.base)
        for start, stop in row_blocks(*self.shape):
            base[start:stop] = root.multiply(self.base[start:stop])
        return AdaptedWeight(base, root.multiply(self.A), self.B, scales=self.scales)

    @property
    def directions(self) -> torch.Tensor:
        """The update's own row space holds most of T − W0."""
        return self.A.T

    @property
    def base_norm(self) -> float:
        """‖W0‖."""
        return float(self._base_squares.sum()) ** 0.5

    @property
    def update_norm(self) -> float:
        """‖T − W0‖: what the adapter changes in all."""
        return self.squared_norms()[0] ** 0.5

    def squared_norms(self) -> tuple[float, float, float]:
        """(‖S‖², ⟨S, W0⟩, ‖W0‖²) with S = T − W0, from row sums alone."""
        excess, d = self.scales - 1, self.scales
        shift = excess**2 * self._base_squares + 2 * excess * d * self._inner + d**2 * self._update_squares
        inner = excess * self._base_squares + d * self._inner
        # Rounding can take the square of a zero change a hair below zero.
        return max(0.0, float(shift.sum())), float(inner.sum()), float(self._base_squares.sum())

    def products(self, V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(S·V, W0·V): one pass over W0."""
        base_V = self.base @ V
        update_V = self.B @ (self.A @ V)
        return self._rows(self.scales - 1) * base_V + self._rows(self.scales) * update_V, base_V

    def transposed_product(self, Q: torch.Tensor, t: float) -> torch.Tensor:
        """E(t)ᵀ·Q: one pass over W0."""
        # d − 1 − t is formed in float64: d is so close to 1 that float32 would keep few of its digits.
        from_base = self.base.T @ (self._rows(self.scales - 1 - t) * Q)
        return from_base + self.A.T @ (self.B.T @ (self._rows(self.scales) * Q))

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows start … stop of (S, W0)."""
        base, scales = self.base[start:stop].to(dtype), self.scales[start:stop, None]
        # d − 1 is formed in float64: d is so close to 1 that float32 would keep few of its digits.
        rows = base * (scales - 1).to(dtype)
        return rows.addmm_((scales * self.B[start:stop]).to(dtype), self.A.to(dtype)), base

    def approximation_row_norms(self, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """‖W0 + BA‖ of each row, (n,) float64, for other factors than the adapter's own."""
        wide_B = B.double()
        inner = ((self.base @ A.T).double() * wide_B).sum(1)
        return (self._base_squares + 2 * inner + _product_row_squares(wide_B, A)).clamp_min(0).sqrt()

    def _rows(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.base.dtype)[:, None]


def row_scales(magnitude: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """d = magnitude / norms in float64; a row of zeros stays one (PEFT divides 0 by 0 there)."""
    return torch.where(norms > 0, magnitude.double() / norms, 0.0)


def column_scales(magnitude: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """d (m,) float64 of a DoRA with one magnitude for each input, from the squared norms of the columns (m,).

    A convolution has a magnitude for each input channel, whose kernel is several columns.
    """
    norms = squares.view(len(magnitude), -1).sum(1).sqrt()
    return row_scales(magnitude, norms).repeat_interleave(len(squares) // len(magnitude))


def merge_rows_(
    rows: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    base_gain: float = 1.0,
    update_gain: float = 1.0,
    magnitude: torch.Tensor | None = None,
    into_wide: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.double,
) -> torch.Tensor:
    """``adapt_rows_`` with Δ = BA: A (r, m); B (p, r), the same rows of B as of W0."""
    return adapt_rows_(
        rows,
        ProductIncrement(A, B),
        base_gain=base_gain,
        update_gain=update_gain,
        magnitude=magnitude,
        into_wide=into_wide,
    )


def adapt_rows_(
    rows: torch.Tensor,
    increment: Increment,
    *,
    base_gain: float = 1.0,
    update_gain: float = 1.0,
    magnitude: torch.Tensor | None = None,
    of_base: bool = False,
    columns: torch.Tensor | None = None,
    into_wide: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.double,
) -> torch.Tensor:
    """Replace a block of rows of W0 by the same rows of the adapted weight W', in place.

    Without scales: W' = a·W0 + b·Δ. With them (DoRA): W' = (a − b)·W0 + b·T, where T is W0 + Δ with its rows scaled to
    ``magnitude``, or its columns by ``columns``. Every step is row by row, so blocks of any size give the same result.

    Args:
        rows: (p, m) rows of W0 in the precision to compute in; overwritten.
        increment: the same rows of Δ, with the scaling included unless it is ``update_gain``.
        base_gain: a; update_gain: b.
        magnitude: (p,) or None; it is divided by the norms of W0 + Δ, or ``of_base`` by those of W0.
        columns: (m,) float64 scales of the columns, or None.
        into_wide: converts a block to float64 for its row norms; a caller may reuse a buffer.
    """
    if magnitude is None and columns is None:
        return increment.add_to_(rows, beta=base_gain, alpha=update_gain)
    base_norms = torch.linalg.vector_norm(into_wide(rows), dim=1) if of_base else None
    keeps_rows = base_gain != update_gain
    merged = increment.added_to(rows) if keeps_rows else increment.add_to_(rows, beta=1.0, alpha=1.0)
    if magnitude is not None:
        norms = torch.linalg.vector_norm(into_wide(merged), dim=1) if base_norms is None else base_norms
        merged.mul_((update_gain * row_scales(magnitude, norms)).to(rows.dtype)[:, None])
    else:
        assert columns is not None  # one of the two is there
        merged.mul_((update_gain * columns).to(rows.dtype))
    if keeps_rows:
        rows.mul_(base_gain - update_gain).add_(merged)
    return rows


def _product_row_squares(wide_B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """Squared norm of each row of BA, from the Gram matrix of A; B in float64."""
    wide_A = A.double()
    return ((wide_B @ (wide_A @ wide_A.T)) * wide_B).sum(1)


def _merged_row_squares(base: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    result = torch.empty(base.shape[0], dtype=torch.float64, device=base.device)
    for start, stop in row_blocks(*base.shape):
        block = torch.addmm(base[start:stop], B[start:stop], A)
        result[start:stop] = torch.linalg.vector_norm(block.double(), dim=1).square_()
    return result
