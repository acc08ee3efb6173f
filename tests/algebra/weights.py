"""Random adapted weights, and the dense float64 oracle of what they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mapconv.algebra.dora import AdaptedWeight


@dataclass(frozen=True)
class Dense:
    """W0, A, B, magnitude in float32, and T − W0 and T in float64."""

    base: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    magnitude: torch.Tensor | None

    @property
    def target(self) -> torch.Tensor:
        merged = self.base.double() + self.B.double() @ self.A.double()
        if self.magnitude is None:
            return merged
        return merged * (self.magnitude.double() / merged.norm(dim=1))[:, None]

    @property
    def change(self) -> torch.Tensor:
        return self.target - self.base.double()

    @property
    def operator(self) -> AdaptedWeight:
        return AdaptedWeight(self.base, self.A, self.B, self.magnitude)


def random_weight(
    height: int = 60, width: int = 40, rank: int = 4, *, update: float = 0.3, spread: float | None = None, seed: int = 0
) -> Dense:
    """A weight whose LoRA part is ``update`` times as long as the base.

    ``spread`` makes it a DoRA whose row scales vary by about that much.
    """
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(height, width, generator=draw) / width**0.5
    A = torch.randn(rank, width, generator=draw) / width**0.5
    B = torch.randn(height, rank, generator=draw)
    B *= update * base.norm() / (B @ A).norm()
    magnitude = None
    if spread is not None:
        magnitude = (base + B @ A).norm(dim=1) * (1 + spread * torch.randn(height, generator=draw))
    return Dense(base, A, B, magnitude)
