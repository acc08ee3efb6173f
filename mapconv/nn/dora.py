"""The direction ``dora`` in training: Δ = T − W0 with T in DoRA's factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mapconv.adapter import Direction
from mapconv.algebra.dora import merge_rows_
from mapconv.algebra.norms import row_blocks, squared_norm
from mapconv.nn.bases import merged_row_norms, row_squares, values_of
from mapconv.nn.updates import Update, lasting


class DoraUpdate(Update):
    """``W' = (a − b)·W0 + b·diag(d)(W0 + BA)`` with d = magnitude ⊘ ‖W0 + BA‖_row (``mapconv.algebra`` section 5).

    The row norms are computed once while A and B are frozen, and anew in each forward pass while they train; no
    gradient flows through them, as in DoRA.
    """

    direction: Direction = "dora"

    def __init__(self, A: torch.Tensor, B: torch.Tensor, magnitude: torch.Tensor, **settings: Any) -> None:
        super().__init__(A, B, **settings)
        self.magnitude = nn.Parameter(magnitude, requires_grad=False)
        self._base_squares: torch.Tensor | None = None

    @property
    def factors(self) -> list[nn.Parameter]:
        return [self.A, self.B, self.magnitude]

    def gains(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.base_gain(), self.scalar("beta").reshape(())

    def scales(self, base: nn.Module, path: str) -> torch.Tensor:
        """d, (out,), in the parameters' dtype; 0 for a row of zeros, as row_scales has it."""
        if self.is_training() or self._is_stale():
            # A frozen direction is exact; one in training can do with float32 products.
            dtype = torch.promote_types(self.A.dtype, torch.float32) if self.is_training() else torch.float64
            with lasting():
                norms = self.row_norms(base, path, dtype)
                inverse = torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
            self._keep(inverse)
        assert self._cache is not None  # or it would be stale
        return (self.magnitude * self._cache).to(self.magnitude.dtype)

    def row_norms(self, base: nn.Module, path: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        with values_of(base, path) as weight:
            if self._base_squares is None:
                self._base_squares = row_squares(weight)
            A, B = self.A.to(weight.device), self.B.to(weight.device)
            norms = merged_row_norms(weight, A, B, base_squares=self._base_squares, dtype=dtype)
        return norms.to(self.A.device)

    def beta(self, base: nn.Module, path: str) -> float:
        gain = self.exact("beta")
        if self.origin and self.origin.scalars and self.is_as_loaded:
            return self.origin.scalars[0].beta
        with values_of(base, path) as weight:
            A, B, magnitude = (factor.detach().to(weight.device) for factor in self.factors)
            return gain * direction_norm(weight, A, B, magnitude)

    def sizes(self, base: nn.Module, path: str) -> list[float]:
        return [abs(self.beta(base, path)) / (self.base_norm or 1.0)]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self._base_squares = None
        return super()._apply(fn, recurse)


def direction_norm(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, magnitude: torch.Tensor) -> float:
    """‖T − W0‖ of a DoRA, row block by row block in float64; W0 (out, in) of any strides."""
    total = 0.0
    for start, stop in row_blocks(*weight.shape):
        rows = weight[start:stop].double()
        merged = merge_rows_(rows.clone(), A.double(), B[start:stop].double(), magnitude=magnitude[start:stop])
        total += squared_norm(merged.sub_(rows))
    return total**0.5
