"""Products of thin factors: norms, compression without loss and the best approximation, from Gram matrices alone.

Symbols: A is (r, m), B is (n, r). With AAᵀ = UΛUᵀ the rows Z = Λ^{-1/2}UᵀA are orthonormal, and BA = L·Z with
L = B·UΛ^{1/2}. The eigenvectors V of LᵀL turn Z into the right singular vectors of BA, so that

    [BA]_k = (B·UΛ^{1/2}·V_k)·(V_kᵀ·Λ^{-1/2}Uᵀ·A)

costs O((n + m)·r²) in float64 and never forms the (n, m) product. Squares of norms keep eight digits of their root:
what lies below ``NEGLIGIBLE`` of the largest singular value is nothing but their rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mapconv.algebra.norms import product_norm

#: In parts of the largest singular value, or of the largest term where terms cancel. Far below what rounding a factor
#: to float32 costs.
NEGLIGIBLE = 1e-7


@dataclass(frozen=True)
class Stacked:
    """The singular values of a product BA, and what gives its best approximation of any rank.

    ``values`` (l,) float64 in falling order, without those that are rounding; ``left`` (r, l) and ``right`` (l, r) turn
    B and A into factors of those l directions.
    """

    values: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    @property
    def rank(self) -> int:
        return len(self.values)

    def least_rank(self, tolerance: float, max_rank: int) -> int:
        """The least rank from 1 on whose relative error is at most ``tolerance``, or ``max_rank``."""
        squares = self.values.square()
        left_over = squares.flip(0).cumsum(0).flip(0)
        total = float(left_over[0]) if len(squares) else 0.0
        enough = 1 + int((left_over[1:] > tolerance**2 * total).sum())
        return min(enough, max_rank)

    def cut(self, B: torch.Tensor, A: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (n, k) and (k, m) of the best approximation, in float32, with ‖column‖ = ‖row‖; k may be less than
        ``rank`` where there is no more to have."""
        k = max(1, min(rank, self.rank))
        if self.rank == 0:
            return torch.zeros(B.shape[0], 1), torch.zeros(1, A.shape[1])
        # The left factors have the singular values as their lengths, the right ones are of length 1.
        roots = self.values[:k].sqrt()
        left, right = self.left[:, :k] / roots, self.right[:k] * roots[:, None]
        return (B.double() @ left).float(), (right @ A.double()).float()


def decompose(B: torch.Tensor, A: torch.Tensor) -> Stacked:
    """The singular values of BA, for B (n, r) and A (r, m)."""
    wide_B, wide_A = B.double(), A.double()
    # Factors of very different size would hide each other in one Gram matrix.
    sizes = torch.linalg.vector_norm(wide_A, dim=1)
    sizes = torch.where(sizes > 0, sizes, 1.0)
    wide_A, wide_B = wide_A / sizes[:, None], wide_B * sizes
    squares, U = torch.linalg.eigh(wide_A @ wide_A.T)
    kept = squares > NEGLIGIBLE**2 * squares[-1].clamp_min(torch.finfo(torch.float64).tiny)
    lengths, U = squares[kept].sqrt(), U[:, kept]
    half = U * lengths
    gram = half.T @ (wide_B.T @ wide_B) @ half
    energies, V = torch.linalg.eigh((gram + gram.T) / 2)
    energies, V = energies.flip(0).clamp_min(0), V.flip(1)
    values = energies.sqrt()
    # Terms that cancel leave the rounding of their own size, which their sum does not show.
    largest = max(float(values[:1].sum()), float(torch.linalg.vector_norm(wide_B, dim=0).amax() * lengths[-1:].sum()))
    wanted = values > NEGLIGIBLE * largest
    values, V = values[wanted], V[:, wanted]
    return Stacked(values, sizes[:, None] * (half @ V), (V.T @ (U / lengths).T) / sizes)


def difference_norm(B1: torch.Tensor, A1: torch.Tensor, B2: torch.Tensor, A2: torch.Tensor) -> float:
    """‖B1·A1 − B2·A2‖ for factors of any ranks, to about 1e-8 of the larger product's norm."""
    return product_norm(torch.cat([B1.double(), -B2.double()], dim=1), torch.cat([A1.double(), A2.double()]))
