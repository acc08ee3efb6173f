"""T is the weight that PEFT merges for a method besides LoRA, as one matrix."""

from __future__ import annotations

import torch

from mapconv.placement.tuned import TunedWeights
from mapconv.placement.weights import PlacedModule
from mapconv.refit.targets.base import DenseTarget


def tuned_target(
    placed: PlacedModule, base: torch.Tensor, tuned: TunedWeights
) -> tuple[DenseTarget, torch.Tensor | None]:
    """T on its base (out, in), float32, on the CPU; and the layer's bias if the merge changes it."""
    change, bias = tuned.merged(placed, base.clone())
    return DenseTarget(change.sub_(base), base), bias if placed.changes_bias else None
