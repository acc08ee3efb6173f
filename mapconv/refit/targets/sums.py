"""T is the base with the effects of several adapters on it: W0 + Σ w_i·(T_i − W0), each T_i the adapter's own weight.

Every adapter that mapconv reads has T_i = diag(g_i)·W0 + diag(h_i)·B_iA_i: LoRA g = 1, h = s; DoRA g = d, h = s·d; MAP
g = a, h = b; and DoRA's direction in MAP form g = a − b + b·d, h = b·d. Their sum has that form too, with the factors
side by side.

Of two DoRAs on one weight this is the sum of what each does alone. Merged one after the other, the second would
rescale what the first has changed, so that the result would depend on their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mapconv.algebra.dora import row_scales
from mapconv.algebra.norms import row_blocks, row_squares
from mapconv.placement.factors import Factors
from mapconv.placement.weights import PlacedModule
from mapconv.refit.targets.base import RowsTarget


@dataclass(frozen=True)
class Effect:
    """T_i − W0 of one adapter as diag(excess)·W0 + B·A.

    ``excess`` (n,) float64 is None where it is 0 everywhere, which is what makes an adapter a plain LoRA.
    """

    excess: torch.Tensor | None
    B: torch.Tensor
    A: torch.Tensor

    def rows(self, W: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Rows start … stop of T_i − W0, from those of W0, in W0's dtype."""
        rows = self.B[start:stop].to(W.dtype) @ self.A.to(W.dtype)
        if self.excess is not None:
            rows += self.excess[start:stop, None].to(W.dtype) * W
        return rows


def needs_base(placed: PlacedModule) -> bool:
    """Whether an adapter's effect on a weight takes the weight's values, rather than its own factors alone."""
    scalars = placed.scalars
    if scalars is None:
        return placed.module.magnitude is not None
    return scalars.direction == "dora" or scalars.base_gain != 1.0


def effect_of(placed: PlacedModule, factors: Factors, base: torch.Tensor | None) -> Effect:
    """The effect of one adapter on a weight; ``base`` is W0 (n, m) float32, where it ``needs_base``."""
    a, b = (1.0, 1.0) if placed.scalars is None else (placed.scalars.base_gain, placed.scalars.update_gain)
    scaling = placed.scaling if placed.scalars is None or factors.magnitude is not None else 1.0
    # In float64 the scaling costs no bit of the factors.
    B = factors.B.double() * scaling
    if factors.magnitude is None:
        excess = None if a == 1.0 else torch.full((len(B),), a - 1.0, dtype=torch.float64)
        return Effect(excess, B * b, factors.A)
    assert base is not None  # asked for by ``needs_base``
    norms = torch.empty(len(B), dtype=torch.float64)
    for start, stop in row_blocks(*base.shape):
        rows = torch.addmm(base[start:stop], B[start:stop].float(), factors.A)
        norms[start:stop] = torch.linalg.vector_norm(rows.double(), dim=1)
    d = row_scales(factors.magnitude, norms)
    return Effect(a - b + b * d - 1.0, B * (b * d)[:, None], factors.A)


def weighted_sum(effects: Sequence[Effect], weights: Sequence[float]) -> Effect:
    """Σ w_i·(T_i − W0), with the factors side by side: B (n, Σr), A (Σr, m)."""
    excesses = [w * item.excess for item, w in zip(effects, weights, strict=True) if item.excess is not None]
    B = torch.cat([w * item.B for item, w in zip(effects, weights, strict=True)], dim=1)
    return Effect(torch.stack(excesses).sum(0) if excesses else None, B, torch.cat([item.A for item in effects]))


class SumTarget(RowsTarget):
    """The pencil of an effect on a base that is held, with exact norms from row sums.

    Args:
        base: W0, (n, m) float32.
        effect: T − W0.
    """

    def __init__(self, base: torch.Tensor, effect: Effect) -> None:
        super().__init__((base.shape[0], base.shape[1]), effect.A.T.float())
        self._base, self._effect = base, effect
        self._A, self._B = effect.A.float(), effect.B.float()
        zero = torch.zeros(len(base), dtype=torch.float64)
        self._excess = zero if effect.excess is None else effect.excess
        squares, wide_A = row_squares(base), effect.A.double()
        inner = ((base @ self._A.T).double() * effect.B).sum(1)
        update = ((effect.B @ (wide_A @ wide_A.T)) * effect.B).sum(1)
        e = self._excess
        change = float((e**2 * squares + 2 * e * inner + update).sum())
        self._norms = max(0.0, change), float((e * squares + inner).sum()), float(squares.sum())

    def squared_norms(self) -> tuple[float, float, float]:
        return self._norms

    def products(self, V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        WV = self._base @ V
        return self._excess.float()[:, None] * WV + self._B @ (self._A @ V), WV

    def transposed_product(self, Q: torch.Tensor, t: float) -> torch.Tensor:
        # e − t is formed in float64: both are so small that float32 would keep few digits of their difference.
        from_base = self._base.T @ ((self._excess - t).float()[:, None] * Q)
        return from_base + self._A.T @ (self._B.T @ Q)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        W = self._base[start:stop].to(dtype)
        return self._effect.rows(W, start, stop), W
