"""The best low-rank approximation of a matrix that is only known through its products with thin blocks.

The matrix may depend on one scalar, ``E(t) = S − t·W`` (a pencil), and the approximation then finds the best ``t`` as
well. Method: randomized range finder with subspace (power) iteration and a warm start (Halko, Martinsson, Tropp 2011,
algorithm 4.4); the search for ``t`` happens on l×l Gram matrices between two products, so it costs next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mapconv.algebra.pencil import Pencil

#: Columns beyond the wanted rank. They absorb the directions that a finite number of iterations cannot separate.
OVERSAMPLING = 8
#: Stop once further iterations would lower the squared error by less than this fraction: 0.1 % of the error itself.
RELATIVE_GAIN = 2e-3
MAX_ITERATIONS = 12
#: Squared errors below this fraction of ‖S‖² are rounding of float32 products, not signal.
ROUNDING = 1e-7


@dataclass(frozen=True)
class LowRank:
    """``left @ right`` is the best approximation found of E(shift); ``squared_error`` is ‖E(shift) − left·right‖².

    ``singular_values`` has every value of the sketch, the approximation's own first.
    """

    shift: float
    left: torch.Tensor
    right: torch.Tensor
    squared_error: float
    singular_values: torch.Tensor


def best_low_rank(
    pencil: Pencil, rank: int, *, shift: float | None = None, start: torch.Tensor | None = None, seed: int = 0
) -> LowRank:
    """Minimise ‖E(t) − R‖² over R of rank ``rank`` at most, and over t unless ``shift`` fixes it.

    Args:
        pencil: the matrices, by their products.
        rank: wanted rank k ≥ 1; cut down to min(n, m).
        shift: a fixed t; None searches for the best one.
        start: (m, j) directions that the row space of the result is expected to lie in; they speed convergence up.
        seed: seed of the random part of the first basis. Equal seeds give equal results.

    Returns:
        factors of shapes (n, k) and (k, m), with the singular values split evenly between them.
    """
    rank = min(rank, *pencil.shape)
    if rank == min(pencil.shape) and shift is None:
        shift = 0.0  # no t leaves anything over, so rounding alone would choose one
    basis = _first_basis(pencil, rank, start, seed)
    t, errors = shift or 0.0, []
    for _ in range(MAX_ITERATIONS):
        SV, WV = pencil.products(basis)
        search = _ShiftSearch(SV, WV, pencil.squared_norms(), rank)
        t = search.solve(t) if shift is None else shift
        errors.append(search.squared_error(t))
        if _converged(errors, noise=ROUNDING * search.norms[0]):
            break
        left_basis = orthonormal(SV.sub(WV, alpha=t))
        rows = pencil.transposed_product(left_basis, t)
        errors.append(search.squared_norm(t) - _energy(rows, rank))
        basis = orthonormal(rows)
    squares, rotation = search.spectrum(t)
    rotation = rotation[:, :rank].to(basis)
    left, right = SV.sub(WV, alpha=t) @ rotation, (basis @ rotation).T
    # Balanced factors survive a later rounding to 16 bits best: neither side is tiny.
    roots = squares[:rank].clamp_min(0).sqrt().sqrt().to(basis)
    left = left / roots.clamp_min(torch.finfo(basis.dtype).tiny)
    return LowRank(
        t,
        left.contiguous(),
        (roots[:, None] * right).contiguous(),
        search.squared_error(t),
        squares.clamp_min(0).sqrt(),
    )


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis that contains the span of ``columns`` (Householder QR: safe for dependent columns)."""
    return torch.linalg.qr(columns).Q


def _converged(errors: list[float], noise: float) -> bool:
    """Whether the error's fall, one value a half iteration, has little left to go.

    Subspace iteration converges geometrically: the last two falls give the ratio, and the ratio gives what remains.
    """
    if errors[-1] <= noise:
        return True
    if len(errors) < 3:
        return False
    before, last = errors[-3] - errors[-2], errors[-2] - errors[-1]
    if last <= noise:
        return True
    ratio = min(last / before, 0.95) if before > 0 else 0.95
    return last * ratio / (1 - ratio) <= RELATIVE_GAIN * errors[-1]


def _energy(rows: torch.Tensor, rank: int) -> float:
    """Sum of the ``rank`` largest squared singular values of a thin block."""
    wide = rows.double()
    return float(torch.linalg.eigvalsh(wide.T @ wide)[-rank:].sum())


def _first_basis(pencil: Pencil, rank: int, start: torch.Tensor | None, seed: int) -> torch.Tensor:
    width = pencil.shape[1]
    known = 0 if start is None else start.shape[1]
    size = min(max(rank, known) + OVERSAMPLING, *pencil.shape)
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device draws the same numbers
    columns = torch.randn(width, size, generator=generator).to(pencil.device)
    if known:
        columns[:, : min(known, size)] = start[:, :size]
    return orthonormal(columns)


class _ShiftSearch:
    """f(t) = ‖E(t)‖² − (the k largest eigenvalues of (E(t)V)ᵀ(E(t)V)), all in float64 on small matrices."""

    def __init__(self, SV: torch.Tensor, WV: torch.Tensor, norms: tuple[float, float, float], rank: int) -> None:
        SV, WV = SV.double(), WV.double()
        self.ss, self.sw, self.ww = (SV.T @ SV).cpu(), (SV.T @ WV).cpu(), (WV.T @ WV).cpu()
        self.norms, self.rank = norms, rank

    def spectrum(self, t: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues in falling order and eigenvectors of the Gram matrix of E(t)V."""
        gram = self.ss - t * (self.sw + self.sw.T) + t * t * self.ww
        values, vectors = torch.linalg.eigh(gram)
        return values.flip(0), vectors.flip(1)

    def squared_norm(self, t: float) -> float:
        """‖E(t)‖²."""
        norm_s, inner, norm_w = self.norms
        return norm_s - 2 * t * inner + t * t * norm_w

    def squared_error(self, t: float) -> float:
        return self._evaluate(t)[0]

    def solve(self, start: float) -> float:
        """The t of least error: coordinate descent with secant steps, from ``start`` and from R = 0's own optimum.

        t = 0 wins ties within rounding, so that a pencil whose S has rank k (a LoRA) gives exactly t = 0.
        """
        norm_s, inner, norm_w = self.norms
        if norm_w == 0:
            return 0.0
        candidates = {self._descend(t) for t in {start, inner / norm_w}}
        error, t = min((self.squared_error(t), t) for t in candidates)
        return 0.0 if self.squared_error(0.0) <= error + ROUNDING * norm_s else t

    def _evaluate(self, t: float) -> tuple[float, float]:
        """(f(t), the t that is best for E(t)'s own truncation R); where W = 0, every t is as good as another."""
        _, inner, norm_w = self.norms
        values, vectors = self.spectrum(t)
        top = vectors[:, : self.rank]
        error = self.squared_norm(t) - float(values[: self.rank].sum())
        inner_R_W = float(((self.sw - t * self.ww) @ top * top).sum())
        return max(error, 0.0), (inner - inner_R_W) / norm_w if norm_w else t

    def _descend(self, t: float) -> float:
        norm_w = self.norms[2]
        error, proposal = self._evaluate(t)
        for _ in range(50):
            # f changes by at most ‖W‖²·(step)² around its optimum: below 1e-7 of f, further steps are idle.
            if norm_w * (proposal - t) ** 2 <= 1e-7 * error:
                break
            next_error, next_proposal = self._evaluate(proposal)
            ratio = (next_proposal - proposal) / (proposal - t)
            t, error, leap = proposal, next_error, next_proposal
            if 0 < ratio < 0.95:
                # The descent shrinks its steps by a near constant factor: jump to where their sum leads.
                jumped = proposal + (next_proposal - proposal) / (1 - ratio)
                jumped_error, jumped_proposal = self._evaluate(jumped)
                if jumped_error < next_error:
                    t, error, leap = jumped, jumped_error, jumped_proposal
            proposal = leap
        return t
