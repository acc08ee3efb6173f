"""Share a number of parameters out between layers: rank where it restores most of the outputs per parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mapconv.placement.adapters import PlacedAdapter


@dataclass(frozen=True)
class Spectrum:
    """What each further rank gives back of a layer's outputs.

    ``shares`` are the squared singular values of the wanted update through the layer's inputs, largest first, as parts
    of the squared outputs of the wanted weight; without inputs, the same of the weights. ``shape`` is (out, in).
    """

    path: str
    shape: tuple[int, int]
    shares: torch.Tensor

    @property
    def cost(self) -> int:
        """Parameters of one rank."""
        return sum(self.shape)


def mean_rank(placed: PlacedAdapter) -> int:
    """The rank that an adapter's own modules have on average, each weighed by its size; rounded, and at least 1."""
    own = [(item.effective_rank, sum(item.weight.shape)) for item in placed.modules if item.module.has_factors]
    return max(1, round(sum(rank * size for rank, size in own) / sum(size for _, size in own)))


def squared_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """σ² of (n, m), largest first: by the smaller Gram matrix, which is exact enough to compare them by."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh((wide @ wide.T).double()).flip(0).clamp(min=0)


def spread_ranks(spectra: Sequence[Spectrum], mean: int) -> dict[str, int]:
    """Rank by path, of which Σ rank·(out + in) is at most that of rank ``mean`` for all.

    Every layer gets rank 1, the least that PEFT knows; each further one goes where it restores most per parameter. As
    singular values fall, that is the best choice there is, but for what is left of the parameters at the end.
    """
    ranks = {item.path: 1 for item in spectra}
    left = (mean - 1) * sum(item.cost for item in spectra)
    worth = torch.cat([item.shares[1:] / item.cost for item in spectra])
    owners = torch.repeat_interleave(
        torch.arange(len(spectra)), torch.tensor([max(0, len(item.shares) - 1) for item in spectra])
    )
    closed = set()
    for index in owners[worth.argsort(descending=True, stable=True)].tolist():
        item = spectra[index]
        # A layer whose next rank is too dear gets none of its lesser ones.
        if index in closed or item.cost > left:
            closed.add(index)
            continue
        ranks[item.path] += 1
        left -= item.cost
    return ranks
