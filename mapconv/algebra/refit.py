"""Problem (2) of MATH.md: the closest MAP weight to an adapted weight, and the certificate that says how close.

    minimise over a ∈ R, rank(R) ≤ k :   ‖(T − a·W0 − R)·P‖²

Where P is not the identity, ``AdaptedWeight.seen_through(P)`` is the weight to solve for, and ``Refit.divided_by(P)``
takes its solution back.
LoRA is the special case d = 1, for which k ≥ r gives a = 1 and no error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mapconv.algebra.dora import AdaptedWeight
from mapconv.algebra.lowrank import LowRank, best_low_rank
from mapconv.algebra.moments import InputRoot
from mapconv.algebra.pencil import residual_norm


@dataclass(frozen=True)
class Refit:
    """W' = gain·W0 + B @ A, with B (n, k) and A (k, m) in float32, and ``error`` = ε as the solver knows it."""

    gain: float
    B: torch.Tensor
    A: torch.Tensor
    error: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def divided_by(self, root: InputRoot) -> Refit:
        """The solution for T of one that was found for T·P: A·P⁻¹ in place of A, with the factors balanced again."""
        A = root.divide(self.A)
        ratio = torch.linalg.vector_norm(A, dim=1) / torch.linalg.vector_norm(self.B, dim=0)
        roots = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0).sqrt()
        return replace(self, A=A / roots[:, None], B=self.B * roots)


def refit(target: AdaptedWeight, rank: int, *, gain: float | None = None, seed: int = 0) -> Refit:
    """Solve problem (2) at rank ``rank``; a fixed ``gain`` (1.0: a plain LoRA) solves for R alone.

    Raises nothing: a target equal to its base gives zero factors and no error.
    """
    return _refit(target, _solve(target, rank, gain, seed))


def refit_to_tolerance(
    target: AdaptedWeight, tolerance: float, max_rank: int, *, gain: float | None = None, seed: int = 0
) -> Refit:
    """Solve problem (2) at the smallest rank whose ε is at most ``tolerance``, or at ``max_rank`` if none is.

    A solution at a large rank bounds ε at every smaller one (same gain, cut spectrum), which brackets the answer; the
    gain's own optimum at a smaller rank can only lower it, so the bracket is then walked down until ε is too large.
    """
    max_rank = min(max_rank, *target.shape)
    allowed = (tolerance * target.update_norm) ** 2
    rank = min(max(1, target.A.shape[0]), max_rank)
    solution = _solve(target, rank, gain, seed)
    while solution.squared_error > allowed and rank < max_rank:
        rank = min(2 * rank, max_rank)
        solution = _solve(target, rank, gain, seed)
    if solution.squared_error > allowed:
        return _refit(target, solution)
    values = solution.singular_values[:rank].square()
    tails = solution.squared_error + values.flip(0).cumsum(0).flip(0)  # tails[k]: the squared error when cut to rank k
    enough = [k for k in range(1, rank) if float(tails[k]) <= allowed]
    if enough and enough[0] < rank:
        rank = enough[0]
        solution = _solve(target, rank, gain, seed)
    while rank > 1:
        smaller = _solve(target, rank - 1, gain, seed)
        if smaller.squared_error > allowed:
            break
        rank, solution = rank - 1, smaller
    return _refit(target, solution)


def relative_error(target: AdaptedWeight, gain: float, B: torch.Tensor, A: torch.Tensor) -> float:
    """The certificate ε = ‖T − gain·W0 − BA‖ / ‖T − W0‖ of any factors, computed densely, row block by row block."""
    return residual_norm(target, gain - 1, B, A) / target.update_norm if target.update_norm else 0.0


def _solve(target: AdaptedWeight, rank: int, gain: float | None, seed: int) -> LowRank:
    shift = None if gain is None else gain - 1.0
    # The update's own row space holds most of T − W0; the base's part comes from the random directions.
    return best_low_rank(target, rank, shift=shift, start=target.A.T, seed=seed)


def _refit(target: AdaptedWeight, solution: LowRank) -> Refit:
    norm = target.update_norm
    error = solution.squared_error**0.5 / norm if norm else 0.0
    return Refit(1.0 + solution.shift, solution.left, solution.right, error)
