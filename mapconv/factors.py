"""Load one module's factors into memory, and refuse those that would poison a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mapconv.adapter import Module, TensorRef
from mapconv.checkpoint.reader import TensorReader
from mapconv.errors import AdapterError


@dataclass(frozen=True)
class Factors:
    """A (r, in), B (out, r) without the scaling, and the DoRA magnitude (out,) or None; all float32."""

    A: torch.Tensor
    B: torch.Tensor
    magnitude: torch.Tensor | None


def load_factors(module: Module, reader: TensorReader) -> Factors:
    """Read a module's tensors.

    Raises:
        AdapterError: a tensor that holds NaN or infinity.
    """

    def load(ref: TensorRef) -> torch.Tensor:
        tensor = reader.read(ref).float()
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{ref.file}: tensor {ref.name} holds NaN or infinity: the training run diverged.")
        return tensor

    magnitude = None if module.magnitude is None else load(module.magnitude)
    return Factors(load(module.lora_A), load(module.lora_B), magnitude)
