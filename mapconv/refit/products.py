"""A product of thin factors as it is stored: cut to a rank or to an error, without its base and without a matrix."""

from __future__ import annotations

import torch

from mapconv.algebra.moments import InputRoot
from mapconv.algebra.norms import product_norm
from mapconv.algebra.stacked import decompose, difference_norm
from mapconv.refit.solving import Refitted, Wanted, rounded


def approximate_product(
    B: torch.Tensor, A: torch.Tensor, wanted: Wanted, *, whole: bool = False, root: InputRoot | None = None
) -> Refitted:
    """The best approximation of BA, with ε measured on the factors as stored; the gain is 1.

    Args:
        B: (n, r) and
        A: (r, m): the update, scaling included.
        wanted: rank or tolerance, and dtype.
        whole: keep all of it; what depends on the rest is still left out.
        root: P of the layer's inputs: ‖(BA − R)·P‖ is what is small, and what a tolerance is of.

    Raises:
        OutputError: a value that overflows in the factors' dtype.
    """
    weighed = root if not whole else None
    seen = A if weighed is None else weighed.multiply(A.float())
    found = decompose(B, seen)

    def stored(rank: int) -> Refitted:
        if whole and found.rank == A.shape[0]:
            left, right = _balanced(B, A)
        else:
            left, right = found.cut(B, seen, rank)
            right = right if weighed is None else weighed.divide(right)
        kept_A, kept_B = (rounded(factor, wanted.dtype, wanted.path) for factor in (right, left))
        error, of_outputs = _relative(B, A, kept_B, kept_A), None
        if root is not None:
            of_outputs = _relative(B, root.multiply(A.float()), kept_B, root.multiply(kept_A.float()))
        return Refitted(1.0, kept_A, kept_B, error, of_outputs)

    def told(refitted: Refitted) -> float:
        return refitted.error if refitted.output_error is None else refitted.output_error

    if whole:
        return stored(found.rank)
    if wanted.tolerance is None:
        return stored(wanted.rank)
    rank = found.least_rank(wanted.tolerance, wanted.max_rank)
    refitted = stored(rank)
    # Rounding to 16 bits adds to what is left out.
    while told(refitted) > wanted.tolerance and rank < min(wanted.max_rank, found.rank):
        rank += 1
        refitted = stored(rank)
    return refitted


def _relative(B: torch.Tensor, A: torch.Tensor, kept_B: torch.Tensor, kept_A: torch.Tensor) -> float:
    """‖BA − kept_B·kept_A‖ / ‖BA‖."""
    norm = product_norm(B, A)
    return difference_norm(B, A, kept_B, kept_A) / norm if norm else 0.0


def _balanced(B: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors themselves, columns as long as rows, in float32."""
    left, right = B.double(), A.double()
    ratio = torch.linalg.vector_norm(right, dim=1) / torch.linalg.vector_norm(left, dim=0)
    roots = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0).sqrt()
    return (left * roots).float(), (right / roots[:, None]).float()


def padded(A: torch.Tensor, B: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) with rows and columns of zeros up to ``rank``."""
    more = rank - len(A)
    if more <= 0:
        return A, B
    return torch.cat([A, A.new_zeros(more, A.shape[1])]), torch.cat([B, B.new_zeros(len(B), more)], dim=1)
