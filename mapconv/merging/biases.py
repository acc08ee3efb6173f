"""What adapters do to the bias of a layer: add to it, or, by the merge of another method than LoRA, make a new one."""

from __future__ import annotations

import torch

from mapconv.checkpoint.reader import TensorReader
from mapconv.merging.plan import MergeJob
from mapconv.placement.factors import FactorLoader
from mapconv.placement.target_model import BiasUpdate
from mapconv.placement.tuned import TunedWeights


def bias_update(job: MergeJob, factors: FactorLoader, tuned: TunedWeights, reader: TensorReader) -> torch.Tensor | None:
    """What the adapters add to a bias vector in all; None where they add nothing."""
    if not job.biases:
        return None
    total = torch.zeros(())
    for item in job.biases:
        if isinstance(item, BiasUpdate):
            total = total + item.scaling * factors.vector(item.tensor)
            continue
        _, bias = tuned.read_and_merge(item.placed)
        assert bias is not None
        assert item.placed.bias is not None  # it was placed with one
        total = total + (bias - reader.read(item.placed.bias).float())
    return total
