"""T is the weight as it was trained, on another base's weight W: T − W = (W0 − W) + (T − W0)."""

from __future__ import annotations

from typing import Protocol

import torch

from mapconv.algebra.increments import ProductIncrement
from mapconv.algebra.moments import InputRoot
from mapconv.placement.factors import FactorLoader
from mapconv.placement.weights import PlacedModule
from mapconv.refit.targets.adapted import adapted_weight_


class Update(Protocol):
    """T − W0 (n, m): what the adapter makes of the base that it was trained on."""

    @property
    def directions(self) -> torch.Tensor | None:
        """Rows (r, m) that hold most of its row space, where they are known: a solver begins there."""
        ...

    def add_to_(self, matrix: torch.Tensor) -> torch.Tensor:
        """matrix + (T − W0), in the matrix's memory."""
        ...

    def taken_from_(self, seen: torch.Tensor, root: InputRoot) -> torch.Tensor:
        """seen − (T − W0)·P, in the memory of ``seen``."""
        ...


class ThinUpdate:
    """B·A with B (n, r) and A (r, m): neither it nor its product with P is formed."""

    def __init__(self, B: torch.Tensor, A: torch.Tensor) -> None:
        self._B, self.directions = B, A

    def add_to_(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.addmm_(self._B, self.directions)

    def taken_from_(self, seen: torch.Tensor, root: InputRoot) -> torch.Tensor:
        return seen.addmm_(self._B, root.multiply(self.directions), alpha=-1)


class WholeUpdate:
    """One that is held as a matrix."""

    def __init__(self, values: torch.Tensor, directions: torch.Tensor | None) -> None:
        self._values, self.directions = values, directions

    def add_to_(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.add_(self._values)

    def taken_from_(self, seen: torch.Tensor, root: InputRoot) -> torch.Tensor:
        return seen.sub_(root.multiply(self._values))


def update_of(placed: PlacedModule, loader: FactorLoader, base: torch.Tensor) -> Update:
    """What a module makes of its own base's weight (out, in), float32, which is left as it is."""
    increment, magnitude = loader.increment(placed)
    scalars = placed.scalars
    thin = isinstance(increment, ProductIncrement)
    if thin and magnitude is None and (scalars is None or scalars.base_gain == 1.0):
        scaling = placed.scaling if scalars is None else scalars.update_gain
        return ThinUpdate((increment.B.double() * scaling).float(), increment.A)
    return WholeUpdate(adapted_weight_(placed, loader, base.clone()).sub_(base), increment.A if thin else None)
