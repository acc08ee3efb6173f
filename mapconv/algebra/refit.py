"""Problem (2) of MATH.md: the closest MAP weight to an adapted weight, and the certificate that says how close.

    minimise over a ∈ R, rank(R) ≤ k :   ‖(T − a·W0 − R)·P‖²

The target is the pencil (T − W0) − t·W0 with a = 1 + t, or any other that ``pencil.Pencil`` describes.
Where P is not the identity, ``AdaptedWeight.seen_through(P)`` is the weight to solve for, and ``Refit.divided_by(P)``
takes its solution back.
LoRA is the special case d = 1, for which k ≥ r gives a = 1 and no error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from mapconv.algebra.gram import Spectrum
from mapconv.algebra.lowrank import Decomposition, best_low_rank, least_rank
from mapconv.algebra.moments import InputRoot
from mapconv.algebra.norms import product_difference_norm
from mapconv.algebra.pencil import LowRank, Pencil, residual_norm
from mapconv.algebra.randomized import OVERSAMPLING

#: The rank that a search for a tolerance tries first where nothing is known of the target.
FIRST_RANK = 16


@dataclass(frozen=True)
class Refit:
    """W' = gain·W0 + B @ A, with B (n, k) and A (k, m) in float32 or float64.

    ``residual`` is ‖T − W'‖, and ``error`` = ε = ‖T − W'‖ / ‖T − W0‖, as the solver knows them.
    """

    gain: float
    B: torch.Tensor
    A: torch.Tensor
    error: float
    residual: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def divided_by(self, root: InputRoot) -> Refit:
        """The solution for T of one that was found for T·P: A·P⁻¹ in place of A, with the factors balanced again."""
        A = root.divide(self.A.to(root.factor.dtype))
        ratio = torch.linalg.vector_norm(A, dim=1) / torch.linalg.vector_norm(self.B, dim=0)
        roots = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0).sqrt()
        return replace(self, A=A / roots[:, None], B=self.B * roots)


def refit(target: Pencil, rank: int, *, gain: float | None = None, seed: int = 0, dense: bool = False) -> Refit:
    """Solve problem (2) at rank ``rank``; a fixed ``gain`` (1.0: a plain LoRA) solves for R alone.

    ``dense`` takes the slower, sure way. Raises nothing: a target equal to its base gives zero factors and no error.
    """
    shift = None if gain is None else gain - 1.0
    return _refit(target, best_low_rank(target, rank, shift=shift, seed=seed, dense=dense))


def refit_to_tolerance(
    target: Pencil,
    tolerance: float,
    max_rank: int,
    *,
    gain: float | None = None,
    measure: Callable[[Refit], float] | None = None,
    seed: int = 0,
    dense: bool = False,
) -> Refit:
    """Solve problem (2) at the smallest rank whose ε is at most ``tolerance``, or at ``max_rank`` if none is.

    Args:
        measure: ε of a solution as the caller will store it; by default, of the factors as they are. The solver's own ε
            says where to begin, and this one decides.
    """
    measure = measure or (lambda solution: relative_error(target, solution.gain, solution.B, solution.A))
    max_rank = min(max_rank, *target.shape)
    known = 0 if target.directions is None else target.directions.shape[1]
    first, shift = known or FIRST_RANK, None if gain is None else gain - 1.0
    allowed = tolerance**2 * target.squared_norms()[0]
    while True:
        rank, spectrum, decomposition = least_rank(
            target, allowed, max_rank, first=first, shift=shift, seed=seed, dense=dense
        )
        cut = partial(_cut, target, decomposition, spectrum)
        limit = min(decomposition.limit, max_rank)
        solution, met = _least_measured(cut, measure, tolerance, rank, limit)
        if met or limit == max_rank:
            return solution
        first = 2 * limit


def agrees(target: Pencil, solution: Refit, B: torch.Tensor, A: torch.Tensor, measured: float) -> bool:
    """Whether ‖T − gain·W0 − BA‖, ``measured`` on the factors as stored, is what the solver believes, but for rounding.

    The factors' own rounding moves the residual by ρ = ‖B·A − (solution's B·A)‖ at most. The solver's square is
    ‖E‖² minus the energy of E·V for an orthonormal V (m, l): sums of m float32 products, off by √m·u·‖E‖ in each of l
    directions where errors of sums are independent, which moves the square by up to 2·√(m·l)·u·‖E‖², with u = 2⁻²⁴. The
    certificate's own rows are sums of l products: √l·u·‖E‖. ‖S‖ + |t|·‖W‖ stands for ‖E‖, which may have cancelled.
    """
    unit, norms = 2.0**-24, target.squared_norms()
    whole = norms[0] ** 0.5 + abs(solution.gain - 1) * norms[2] ** 0.5
    columns = solution.rank + OVERSAMPLING
    square = 2 * (max(target.shape) * columns) ** 0.5 * unit * whole**2
    moved = product_difference_norm(solution.B, solution.A, B, A) + columns**0.5 * unit * whole
    lowest = max(0.0, solution.residual**2 - square) ** 0.5 - moved
    highest = (solution.residual**2 + square) ** 0.5 + moved
    return lowest <= measured <= highest


def relative_error(target: Pencil, gain: float, B: torch.Tensor, A: torch.Tensor) -> float:
    """The certificate ε = ‖T − gain·W0 − BA‖ / ‖T − W0‖ of any factors, computed densely, row block by row block."""
    norm = target.squared_norms()[0] ** 0.5
    return residual_norm(target, gain - 1, B, A) / norm if norm else 0.0


def _least_measured(
    cut: Callable[[int], Refit], measure: Callable[[Refit], float], tolerance: float, rank: int, limit: int
) -> tuple[Refit, bool]:
    """The solution of least rank from ``rank`` to ``limit`` whose measured ε is allowed, and whether there is one."""
    below, step, solution = rank - 1, 1, cut(rank)
    while measure(solution) > tolerance:
        if rank == limit:
            return solution, False
        below, rank, step = rank, min(rank + step, limit), 2 * step
        solution = cut(rank)
    while rank - below > 1:
        middle = (below + rank) // 2
        candidate = cut(middle)
        if measure(candidate) <= tolerance:
            rank, solution = middle, candidate
        else:
            below = middle
    return solution, True


def _cut(target: Pencil, decomposition: Decomposition, spectrum: Spectrum, rank: int) -> Refit:
    return _refit(target, decomposition.cut(spectrum, rank))


def _refit(target: Pencil, solution: LowRank) -> Refit:
    norm, residual = target.squared_norms()[0] ** 0.5, solution.squared_error**0.5
    return Refit(1.0 + solution.shift, solution.left, solution.right, residual / norm if norm else 0.0, residual)
