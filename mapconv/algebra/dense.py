"""The dense way to a low-rank approximation: Gram matrices of the smaller side, and eigendecompositions.

It is exact at every rank and serves all ranks at once; its cost does not depend on the rank. G(t) is quadratic in t, so
three Gram matrices are computed once. A Gram matrix squares the condition: in float32 it takes half the time, and
serves unless the error is below ``COARSE``. In float64 it always serves, but below ``FINE`` the subspace found is
refined, and the error measured, on the matrix itself (``refinement``).
"""

from __future__ import annotations

from itertools import combinations_with_replacement

import torch

from mapconv.algebra.gram import ROUNDING, GramPencil, Spectrum
from mapconv.algebra.norms import row_blocks
from mapconv.algebra.pencil import LowRank, Pencil, balanced, error_rows
from mapconv.algebra.refinement import refined, transposed_product

#: Below this error relative to ‖E‖, eigenvalues of a float64 Gram matrix have lost half their digits.
FINE = 1e-4
#: Below this squared error relative to ‖S‖² + ‖t·W‖², rounding of float32 Gram matrices, which is about 10⁻⁶ of that,
#: may show in the error's third digit.
COARSE = 1e-3
#: Columns beyond the rank that are refined with it.
OVERSAMPLING = 8
#: Elements of S and of W that are held at once.
BLOCK_ELEMENTS = 1 << 21
#: Square matrices of the smaller side that exist at once at most, counted in float64: the Gram matrices (also those of
#: a first try in float32), one eigendecomposition, and the products that give the errors' derivatives.
MATRICES = 12


class Dense:
    """A decomposition of E(t) that is good for every rank up to ``limit``, which is min(n, m).

    Args:
        pencil: the matrices.
        t: a fixed t; None where the best one is wanted.
        dtype: of the Gram matrices, float64 or float32; see ``is_fine``.
    """

    def __init__(self, pencil: Pencil, *, t: float | None = None, dtype: torch.dtype = torch.float64) -> None:
        self._pencil, self.limit, self._dtype = pencil, min(pencil.shape), dtype
        self._by_rows = pencil.shape[0] <= pencil.shape[1]
        grams = (_row_grams if self._by_rows else _column_grams)(pencil, t, dtype)
        ss, sw, ww = [gram.cpu() for gram in grams] if len(grams) == 3 else (grams[0].cpu(), None, None)
        norm_s, inner, norm_w = pencil.squared_norms()
        if t is not None:
            norm_s, inner, norm_w = norm_s - 2 * t * inner + t * t * norm_w, 0.0, 0.0
        self._search = GramPencil(ss, sw, ww, (norm_s, inner, norm_w), rounding=ROUNDING[dtype])
        self._start = inner / norm_w if norm_w else 0.0
        # With t held, the Gram matrix is of E(t) itself, and the search has no t of its own.
        self._offset = t or 0.0

    def solve(self, rank: int) -> Spectrum:
        """The spectrum at the best t of ``rank``."""
        return self._search.solve(rank, start=self._start)

    def least_rank(self, allowed: float, max_rank: int) -> tuple[int, Spectrum]:
        """See ``GramPencil.least_rank``."""
        return self._search.least_rank(allowed, max_rank, start=self._start)

    def is_fine(self, spectrum: Spectrum, rank: int) -> bool:
        """Whether the Gram matrices' rounding is far below the squared error of ``rank``."""
        norm_s, _, norm_w = self._search.norms
        whole = norm_s + spectrum.t**2 * norm_w
        return self._dtype == torch.float64 or float(spectrum.squared_errors[rank]) >= COARSE * whole

    def cut(self, spectrum: Spectrum, rank: int) -> LowRank:
        """The approximation of ``rank`` at a spectrum's t: the projection of E(t) on its leading singular vectors."""
        t = self._offset + spectrum.t
        square, whole = float(spectrum.squared_errors[rank]), float(spectrum.squared_errors[0])
        if whole > 0 and square <= FINE**2 * whole:
            vectors = spectrum.vectors[:, : rank + OVERSAMPLING].to(self._pencil.device)
            basis = transposed_product(self._pencil, t, vectors) if self._by_rows else vectors
            return refined(self._pencil, t, basis, rank)
        vectors = spectrum.vectors[:, :rank].to(self._pencil.device, torch.float32)
        if self._by_rows:
            return balanced(t, vectors, self._pencil.transposed_product(vectors, t).T, square)
        SV, WV = self._pencil.products(vectors)
        return balanced(t, SV if WV is None else SV.sub_(WV, alpha=t), vectors.T, square)


def dense_bytes(shape: tuple[int, int]) -> int:
    """Memory that the dense way takes for an (n, m) pencil, in bytes."""
    return 8 * (MATRICES * min(shape) ** 2 + 2 * min(shape[0] * shape[1], BLOCK_ELEMENTS))


def _column_grams(pencil: Pencil, t: float | None, dtype: torch.dtype) -> list[torch.Tensor]:
    """[SᵀS, SᵀW, WᵀW], or the first alone where there is no W; for a fixed t, [E(t)ᵀE(t)]."""
    grams: list[torch.Tensor] = []
    for start, stop in row_blocks(*pencil.shape, BLOCK_ELEMENTS):
        rows = _rows(pencil, t, start, stop, dtype)
        for index, (one, two) in enumerate(combinations_with_replacement(rows, 2)):
            if index == len(grams):
                grams.append(one.T @ two)
            else:
                grams[index].addmm_(one.T, two)
    return grams


def _row_grams(pencil: Pencil, t: float | None, dtype: torch.dtype) -> list[torch.Tensor]:
    """[SSᵀ, SWᵀ, WWᵀ] likewise; rows are formed again for each pair of blocks, of which small matrices have one."""
    height, width = pencil.shape
    blocks = list(row_blocks(height, width, BLOCK_ELEMENTS))
    grams: list[torch.Tensor] = []
    for number, (start, stop) in enumerate(blocks):
        upper = _rows(pencil, t, start, stop, dtype)
        if not grams:
            count = len(upper) * (len(upper) + 1) // 2
            grams = [torch.empty(height, height, dtype=upper[0].dtype, device=upper[0].device) for _ in range(count)]
        for first, last in blocks[number:]:
            lower = upper if first == start else _rows(pencil, t, first, last, dtype)
            for gram, (one, two) in zip(grams, combinations_with_replacement(range(len(upper)), 2), strict=True):
                torch.mm(upper[one], lower[two].T, out=gram[start:stop, first:last])
                if first != start:
                    torch.mm(lower[one], upper[two].T, out=gram[first:last, start:stop])
    return grams


def _rows(pencil: Pencil, t: float | None, start: int, stop: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Rows of S and W, or of S alone where there is no W; for a fixed t, of E(t)."""
    if t is not None:
        return [error_rows(pencil, t, start, stop, dtype)]
    return [rows for rows in pencil.rows(start, stop, dtype) if rows is not None]
