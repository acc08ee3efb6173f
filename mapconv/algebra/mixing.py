"""Several changes of one matrix made into one, element by element: TIES and DARE.

TIES (Yadav et al. 2023, arXiv 2306.01708) keeps of each change the share ``density`` of its largest magnitudes, takes
for each element the sign of the sum, and averages the changes that have it. DARE (Yu et al. 2023, arXiv 2311.03099)
keeps elements at random and divides by the density, and adds up; with TIES it takes the place of the first step.
Weights multiply the changes, and the average is over their number, as in PEFT.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch

from mapconv.algebra.splitmix import uniform

Method = Literal["sum", "ties", "dare", "dare-ties"]
#: Magnitudes of float32 order as their bits do: the upper half is counted in one pass, the lower in another.
_HALF, _BINS = 16, 1 << 16


def threshold(blocks: Callable[[], Iterator[torch.Tensor]], density: float, count: int) -> float:
    """The magnitude that the ``density``·``count`` largest of ``count`` float32 elements have at least, exactly.

    Args:
        blocks: gives all elements anew, in blocks of any shape, the same values each time.

    Two histograms, of the bits' upper and lower halves, find it without a copy of the elements.
    """
    wanted = int(density * count)
    if wanted == 0:
        return float("inf")
    prefix = 0
    for step in range(2):
        histogram = torch.zeros(_BINS, dtype=torch.int64)
        for block in blocks():
            bits = _magnitude_bits(block)
            upper = bits >> _HALF
            bits = bits[upper == prefix] & (_BINS - 1) if step else upper
            histogram += torch.bincount(bits, minlength=_BINS)
        from_above = histogram.flip(0).cumsum(0)
        above = int(torch.searchsorted(from_above, wanted))
        bin_ = _BINS - 1 - above
        wanted -= int(from_above[above - 1]) if above else 0
        prefix = (prefix << _HALF) | bin_ if step else bin_
    return float(torch.tensor([prefix], dtype=torch.int32).view(torch.float32))


def trimmed(change: torch.Tensor, least: float) -> torch.Tensor:
    """A change without elements whose magnitude is below ``least``."""
    return torch.where(change.abs() >= least, change, 0.0)


def dropped(change: torch.Tensor, density: float, key: int, first: int) -> torch.Tensor:
    """A change of which each element stays with probability ``density``, divided by it.

    Which ones stay depends on ``key`` and on the element's number alone, counted from ``first``: any block of a matrix
    can be made without the others.
    """
    return torch.where(uniform(key, first, change.numel()).view(change.shape) < density, change / density, 0.0)


def elected(changes: Sequence[torch.Tensor]) -> torch.Tensor:
    """The average of the changes that have the sign of their sum, element by element; a sum of 0 counts as positive."""
    stack = torch.stack(list(changes))
    positive = stack.sum(0) >= 0
    agreeing = torch.where(positive, stack > 0, stack < 0)
    return torch.where(agreeing, stack, 0.0).sum(0) / agreeing.sum(0).clamp_min(1)


def random_key(seed: int, *names: str) -> int:
    """A number for one matrix of one adapter, the same on every machine."""
    text = "\0".join((str(seed), *names)).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True)


def _magnitude_bits(block: torch.Tensor) -> torch.Tensor:
    return (block.contiguous().view(-1).view(torch.int32) & 0x7FFFFFFF).long()
