"""The last digits of a low-rank approximation: subspace iteration in float64 on the matrix itself, block by block.

Neither float32 products nor a float64 Gram matrix, which squares the condition, can tell an error far below ‖E‖ from
their own rounding: where the error is so small, the subspace that they found is the start of a few exact steps.
"""

from __future__ import annotations

import torch

from mapconv.algebra.norms import row_blocks
from mapconv.algebra.pencil import LowRank, Pencil, balanced, error_rows, residual_norm

#: A step that lowers the error by less than this fraction was the last one.
IDLE = 2e-3
MAX_STEPS = 6


def refined(pencil: Pencil, t: float, basis: torch.Tensor, rank: int) -> LowRank:
    """The best approximation of E(t) of ``rank`` near the row space of ``basis``, (m, l) with l ≥ rank, in float64.

    The squared error is measured, not computed from singular values, whose squares cancel.
    """
    best: LowRank | None = None
    basis = basis.double()
    for _ in range(MAX_STEPS):
        left_basis = torch.linalg.qr(_product(pencil, t, basis)).Q
        columns = transposed_product(pencil, t, left_basis)
        basis, values, rotation = torch.linalg.svd(columns, full_matrices=False)
        left, right = left_basis @ rotation[:rank].T, values[:rank, None] * basis[:, :rank].T
        error = residual_norm(pencil, t, left, right, torch.float64)
        if best is None or error**2 < best.squared_error:
            idle = best is not None and error >= (1 - IDLE) * best.squared_error**0.5
            best = balanced(t, left, right, error**2)
            if not idle:
                continue
        break
    assert best is not None  # the first step always sets it
    return best


def transposed_product(pencil: Pencil, t: float, Q: torch.Tensor) -> torch.Tensor:
    """E(t)ᵀ·Q in float64."""
    result = Q.new_zeros(pencil.shape[1], Q.shape[1])
    for start, stop in row_blocks(*pencil.shape):
        result.addmm_(error_rows(pencil, t, start, stop, torch.float64).T, Q[start:stop])
    return result


def _product(pencil: Pencil, t: float, V: torch.Tensor) -> torch.Tensor:
    """E(t)·V in float64."""
    blocks = row_blocks(*pencil.shape)
    return torch.cat([error_rows(pencil, t, start, stop, torch.float64) @ V for start, stop in blocks])
