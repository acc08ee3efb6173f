"""What rounding to a floating-point grid has left in a matrix: a floor that no low-rank approximation gets below.

A weight that is stored in 16 bits is off by a rounding error which is uniform over half a step of its grid to either
side, so that its mean square is step²/12. The errors of a matrix are independent and of full rank.
"""

from __future__ import annotations

import torch

#: Bits behind the leading one in a significand. A step of the grid is 2^(exponent − bits).
SIGNIFICAND_BITS = {"BF16": 7, "F16": 10, "F8_E4M3": 3, "F8_E5M2": 2}
_EXPONENT = 0x7F800000


def mean_squares(values: torch.Tensor, changes: torch.Tensor, bits: int, prior: float) -> torch.Tensor:
    """The expected squared rounding error of each value, of the values' shape, float32.

    A value that did not change at all was moved by less than half a step, and what rounding took from it cannot be more
    than the change itself, of which ``prior`` is the mean square in the matrix.

    Args:
        values: as they are stored, in float32.
        changes: their differences to the values before the change.
        bits: of the significand, see ``SIGNIFICAND_BITS``.
        prior: mean square of the changes.
    """
    powers = (values.contiguous().view(torch.int32) & _EXPONENT).view(torch.float32)
    squares = powers.square_().mul_(4.0**-bits / 12)
    return torch.where(changes == 0, squares.clamp_max(prior), squares)
