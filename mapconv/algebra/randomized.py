"""The randomized way to a low-rank approximation, for matrices that are large and ranks that are thin beside them.

Range finder with subspace (power) iteration and a warm start (Halko, Martinsson, Tropp 2011, algorithm 4.4); the search
for t happens on l×l Gram matrices between two products, so it costs next to nothing.
"""

from __future__ import annotations

import torch

from mapconv.algebra.gram import GramPencil, Spectrum
from mapconv.algebra.pencil import LowRank, Pencil, balanced
from mapconv.algebra.refinement import refined

#: Columns beyond the wanted rank. They absorb the directions that a finite number of iterations cannot separate.
OVERSAMPLING = 8
#: Stop once further iterations would lower the squared error by less than this fraction, by the rate that it has.
RELATIVE_GAIN = 5e-4
MAX_ITERATIONS = 12
#: Squared errors below this fraction of ‖S‖² are rounding of float32 products, not signal.
ROUNDING = 1e-7
#: Squared errors below this fraction of ‖E‖² are known to 1 % at best, and are refined.
FINE = 1e-5
#: The search for t on a sketch is cheap enough to be as good as exact.
SEARCH_ENOUGH = 1e-6


class Sketch:
    """A decomposition of E(t) on a basis V (m, l) of its leading row space, good for every rank up to ``limit``.

    ``spectrum`` is at the best t of that rank; ``settled`` says whether the iteration came to its end, rather than to
    ``MAX_ITERATIONS``.
    """

    def __init__(
        self, pencil: Pencil, rank: int, *, t: float | None = None, seed: int = 0, start: torch.Tensor | None = None
    ) -> None:
        self._pencil, self._fixed, self.limit, self.settled = pencil, t, rank, False
        norms = pencil.squared_norms()
        near, errors = _first_shift(norms) if t is None else t, []
        self.basis = _first_basis(pencil, rank, pencil.directions if start is None else start, seed)
        for iteration in range(MAX_ITERATIONS):
            self._SV, self._WV = pencil.products(self.basis)
            self._search = _search(self._SV, self._WV, norms, complete=self.basis.shape[1] == min(pencil.shape))
            self.spectrum = self._solve(rank, near, first=iteration == 0)
            near = self.spectrum.t
            errors.append(float(self.spectrum.squared_errors[rank]))
            if _converged(errors, noise=ROUNDING * norms[0]):
                self.settled = True
            # The basis is never replaced after its last products: both factors must come from the same one.
            if self.settled or iteration == MAX_ITERATIONS - 1:
                return
            left_basis = orthonormal(self._at(near))
            rows = pencil.transposed_product(left_basis, near)
            norm = norms[0] - 2 * near * norms[1] + near**2 * norms[2]
            self.basis, R = torch.linalg.qr(rows)
            errors.append(norm - _energy(R, rank))

    def least_rank(self, allowed: float, max_rank: int) -> tuple[int, Spectrum]:
        """See ``GramPencil.least_rank``."""
        return self._search.least_rank(allowed, max_rank, t=self._fixed, start=self.spectrum.t)

    def cut(self, spectrum: Spectrum, rank: int) -> LowRank:
        """The approximation of ``rank`` at a spectrum's t."""
        square, whole = float(spectrum.squared_errors[rank]), float(spectrum.squared_errors[0])
        if whole > 0 and square <= FINE * whole:
            return refined(self._pencil, spectrum.t, self.basis.double() @ spectrum.vectors.to(self.basis.device), rank)
        rotation = spectrum.vectors[:, :rank].to(self.basis)
        left, right = self._at(spectrum.t) @ rotation, (self.basis @ rotation).T
        return balanced(spectrum.t, left, right, square)

    def _solve(self, rank: int, near: float, *, first: bool) -> Spectrum:
        found = self._search.solve(rank, t=self._fixed, start=near)
        if self._fixed is not None or near == 0 or not first:
            return found
        # f_k may have more than one valley; later iterations stay in the one that is chosen here.
        other = self._search.solve(rank, start=0.0)
        return min(found, other, key=lambda spectrum: float(spectrum.squared_errors[rank]))

    def _at(self, t: float) -> torch.Tensor:
        return self._SV if self._WV is None or t == 0 else self._SV.sub(self._WV, alpha=t)


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis that contains the span of ``columns`` (Householder QR: safe for dependent columns)."""
    return torch.linalg.qr(columns).Q


def _search(
    SV: torch.Tensor, WV: torch.Tensor | None, norms: tuple[float, float, float], *, complete: bool
) -> GramPencil:
    # Small matrices: the processor is faster than the trip through a device's queue.
    SV = SV.double()
    ss = (SV.T @ SV).cpu()
    if WV is None:
        return GramPencil(ss, None, None, norms, rounding=ROUNDING, complete=complete)
    WV = WV.double()
    sw, ww = (SV.T @ WV).cpu(), (WV.T @ WV).cpu()
    return GramPencil(ss, sw, ww, norms, rounding=ROUNDING, enough=SEARCH_ENOUGH, complete=complete)


def _first_shift(norms: tuple[float, float, float]) -> float:
    """The best t where the low-rank part is 0: on trained DoRAs it is near the best of every rank."""
    return norms[1] / norms[2] if norms[2] else 0.0


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


def _energy(square: torch.Tensor, rank: int) -> float:
    """Sum of the ``rank`` largest squared singular values of a small matrix."""
    wide = square.double()
    return float(torch.linalg.eigvalsh(wide.T @ wide)[-rank:].sum())


def _first_basis(pencil: Pencil, rank: int, start: torch.Tensor | None, seed: int) -> torch.Tensor:
    width = pencil.shape[1]
    known = 0 if start is None else start.shape[1]
    size = min(max(rank, known) + OVERSAMPLING, *pencil.shape)
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device draws the same numbers
    columns = torch.randn(width, size, generator=generator).to(pencil.device)
    if start is not None:
        columns[:, : min(known, size)] = start[:, :size]
    return orthonormal(columns)
