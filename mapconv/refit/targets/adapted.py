"""T is the weight that an adapter makes of its own base: LoRA, DoRA or MAP, as one matrix."""

from __future__ import annotations

import torch

from mapconv.algebra.dora import merge_rows_
from mapconv.algebra.norms import row_blocks
from mapconv.placement.factors import Factors
from mapconv.placement.weights import PlacedModule


def adapted_weight_(placed: PlacedModule, factors: Factors, base: torch.Tensor) -> torch.Tensor:
    """Turn the base weight (out, in), float32, into the adapted weight, in place."""
    B, base_gain, update_gain = factors.B, 1.0, placed.scaling
    if factors.magnitude is not None:
        B, update_gain = B * placed.scaling, 1.0
    if placed.scalars is not None:
        base_gain, update_gain = placed.scalars.base_gain, placed.scalars.update_gain
    for start, stop in row_blocks(*base.shape):
        merge_rows_(
            base[start:stop],
            factors.A,
            B[start:stop],
            base_gain=base_gain,
            update_gain=update_gain,
            magnitude=None if factors.magnitude is None else factors.magnitude[start:stop],
        )
    return base
