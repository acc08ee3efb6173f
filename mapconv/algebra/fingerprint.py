"""What tells one matrix from another at the price of its norm: ‖W‖², and one projection of W on fixed random numbers.

The norm sees neither signs nor order. The projection p = uᵀWv does: u (n,) and v (m,) have mean 0 and variance 1, so
that a change D shows in it as (E (uᵀDv)²)^½ = ‖D‖, whatever its direction, and D = −2W or two rows that change places
are as visible as noise of that size. Of rank one, it needs n + m numbers and one product with a block that is in
float64 for the norm already.

u_i = √3·(2x_i − 1), and v_j likewise, with x_i the upper 53 bits, as a fraction, of SplitMix64's i-th output (Steele,
Lea, Flood: *Fast Splittable Pseudorandom Number Generators*, 2014) for the seed of the rows or of the columns. A number
depends on its index alone, so that any block of W can be projected without the others, and the sums of blocks of any
size agree but for rounding in float64: about 2⁻⁵³·‖W‖·√(nm) at the very most, and far less in practice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from mapconv.algebra.norms import BLOCK_ELEMENTS, row_blocks
from mapconv.algebra.splitmix import uniform

_ROW_SEED, _COLUMN_SEED = 0x6D61702D726F7773, 0x6D61702D636F6C73  # "map-rows", "map-cols"


@dataclass(frozen=True)
class Fingerprint:
    """‖W‖² and uᵀWv; those of W's blocks add up to W's own."""

    square: float = 0.0
    projection: float = 0.0

    @property
    def norm(self) -> float:
        return self.square**0.5

    def __add__(self, other: Fingerprint) -> Fingerprint:
        return Fingerprint(self.square + other.square, self.projection + other.projection)


def row_numbers(count: int) -> torch.Tensor:
    """u for matrices of ``count`` rows, (count,) float64: shared, not to be written to."""
    return _numbers(_ROW_SEED, count)


def column_numbers(count: int) -> torch.Tensor:
    """v for matrices of ``count`` columns, (count,) float64: shared, not to be written to."""
    return _numbers(_COLUMN_SEED, count)


def block_fingerprint(
    values: torch.Tensor, left: torch.Tensor, right: torch.Tensor, buffer: torch.Tensor | None = None
) -> Fingerprint:
    """The part of a fingerprint that a block (p, q) makes.

    Args:
        values: the block, of any floating-point dtype.
        left, right: the (p,) and (q,) numbers of its rows and columns; of a block of Wᵀ, those of the columns and rows.
        buffer: an optional flat float64 tensor to convert into.
    """
    if buffer is None:
        wide = values.double()
    else:
        wide = buffer[: values.numel()].view(values.shape)
        wide.copy_(values)
    flat = wide.reshape(-1)
    return Fingerprint(float(torch.dot(flat, flat)), float(torch.dot(left, torch.mv(wide, right))))


def matrix_fingerprint(matrix: torch.Tensor) -> Fingerprint:
    """The fingerprint of a matrix (n, m) in memory, row block by row block; of a transposed view in storage order."""
    device = matrix.device
    left, right = (numbers.to(device) for numbers in (row_numbers(matrix.shape[0]), column_numbers(matrix.shape[1])))
    if not matrix.is_contiguous() and matrix.t().is_contiguous():
        matrix, left, right = matrix.t(), right, left
    # Of a size that fits a core's cache, or that keeps a GPU busy.
    elements = BLOCK_ELEMENTS if device.type == "cpu" else 64 * BLOCK_ELEMENTS
    total = Fingerprint()
    height, width = matrix.shape
    for start, stop in row_blocks(height, width, elements):
        total += block_fingerprint(matrix[start:stop], left[start:stop], right)
    return total


@lru_cache(maxsize=32)
def _numbers(seed: int, count: int) -> torch.Tensor:
    return (2 * uniform(seed, 0, count) - 1) * 3**0.5
