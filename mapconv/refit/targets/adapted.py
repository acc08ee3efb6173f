"""T is the weight that an adapter makes of its own base: LoRA, DoRA, MAP or another update, whole or as a target."""

from __future__ import annotations

import torch

from mapconv.algebra.dora import AdaptedWeight, adapt_rows_, column_scales, row_scales
from mapconv.algebra.increments import Increment, ProductIncrement
from mapconv.algebra.norms import row_blocks, row_squares
from mapconv.placement.factors import FactorLoader
from mapconv.placement.weights import PlacedModule
from mapconv.refit.targets.base import DenseTarget, Target


def adapted_weight_(placed: PlacedModule, loader: FactorLoader, base: torch.Tensor) -> torch.Tensor:
    """Turn the base weight (out, in), float32, into the adapted weight, in place."""
    increment, magnitude = loader.increment(placed)
    base_gain, update_gain = 1.0, placed.scaling
    if magnitude is not None:
        increment, update_gain = increment.scaled(placed.scaling), 1.0
    if placed.scalars is not None:
        base_gain, update_gain = placed.scalars.base_gain, placed.scalars.update_gain
    magnitude, columns = _columns(placed, increment, magnitude, base)
    for start, stop in row_blocks(*base.shape):
        adapt_rows_(
            base[start:stop],
            increment.part(start, stop),
            base_gain=base_gain,
            update_gain=update_gain,
            magnitude=None if magnitude is None else magnitude[start:stop],
            of_base=placed.module.rescaling.norm == "base",
            columns=columns,
        )
    return base


def target_of(placed: PlacedModule, increment: Increment, magnitude: torch.Tensor | None, base: torch.Tensor) -> Target:
    """The target that a LoRA, a DoRA or a whole update makes of W0.

    Args:
        placed: the module, for what its magnitudes mean.
        increment: Δ with the scaling included, on the CPU.
        magnitude: of a DoRA, or None.
        base: W0 (out, in) float32, on the device to compute on.
    """
    if isinstance(increment, ProductIncrement) and placed.module.rescaling.axis == "out":
        A, B = increment.A.to(base.device), increment.B.to(base.device)
        magnitude = None if magnitude is None else magnitude.to(base.device)
        if magnitude is None or placed.module.rescaling.is_peft:
            return AdaptedWeight(base, A, B, magnitude)
        return AdaptedWeight(base, A, B, scales=row_scales(magnitude, row_squares(base).sqrt()))
    change = _change(placed, increment, magnitude, base.cpu())
    return DenseTarget(change.to(base.device), base)


def _change(
    placed: PlacedModule, increment: Increment, magnitude: torch.Tensor | None, base: torch.Tensor
) -> torch.Tensor:
    """T − W0 (out, in) float32. d − 1 is formed in float64: d is so close to 1 that float32 would keep few digits."""
    magnitude, columns = _columns(placed, increment, magnitude, base)
    change = torch.empty_like(base)
    for start, stop in row_blocks(*base.shape):
        rows = base[start:stop].double()
        added = increment.part(start, stop).add_to_(torch.zeros_like(rows), beta=1.0, alpha=1.0)
        scales: torch.Tensor | float = 1.0
        if magnitude is not None:
            of_base = placed.module.rescaling.norm == "base"
            norms = torch.linalg.vector_norm(rows if of_base else rows + added, dim=1)
            scales = row_scales(magnitude[start:stop], norms)[:, None]
        elif columns is not None:
            scales = columns
        change[start:stop] = (scales - 1.0) * rows + scales * added
    return change


def _columns(
    placed: PlacedModule, increment: Increment, magnitude: torch.Tensor | None, base: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(magnitudes of rows, scales of columns): a DoRA has one of the two."""
    if magnitude is None or placed.module.rescaling.axis == "out":
        return magnitude, None
    squares = torch.zeros(base.shape[1], dtype=torch.float64)
    for start, stop in row_blocks(*base.shape):
        rows = base[start:stop].double()
        if placed.module.rescaling.norm == "merged":
            rows = increment.part(start, stop).add_to_(rows, beta=1.0, alpha=1.0)
        squares += rows.square_().sum(0)
    return None, column_scales(magnitude, squares)
