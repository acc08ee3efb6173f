"""The dense way to a low-rank approximation: Gram matrices of the smaller side in float64, and eigendecompositions.

It is exact at every rank and serves all ranks at once; its cost does not depend on the rank. G(t) is quadratic in t, so
three Gram matrices are computed once. A Gram matrix squares the condition: below ``FINE`` the subspace that it gives is
refined, and the error measured, on the matrix itself (``refinement``).
"""

from __future__ import annotations

from itertools import combinations_with_replacement

import torch

from mapconv.algebra.gram import ROUNDING64, GramPencil, Spectrum
from mapconv.algebra.norms import row_blocks
from mapconv.algebra.pencil import LowRank, Pencil, balanced, error_rows
from mapconv.algebra.refinement import refined, transposed_product

#: Below this error relative to ‖E‖, eigenvalues of a float64 Gram matrix have lost half their digits.
FINE = 1e-4
#: Columns beyond the rank that are refined with it.
OVERSAMPLING = 8
#: Elements of S and of W that are held in float64 at once.
BLOCK_ELEMENTS = 1 << 21


class Dense:
    """A decomposition of E(t) that is good for every rank up to ``limit``, which is min(n, m).

    Args:
        pencil: the matrices.
        t: a fixed t; None where the best one is wanted.
    """

    def __init__(self, pencil: Pencil, *, t: float | None = None) -> None:
        self._pencil, self.limit = pencil, min(pencil.shape)
        self._by_rows = pencil.shape[0] <= pencil.shape[1]
        grams = _row_grams(pencil, t) if self._by_rows else _column_grams(pencil, t)
        norms = [float(gram.trace()) for gram in grams]
        ss, sw, ww = [gram.cpu() for gram in grams] if len(grams) == 3 else (grams[0].cpu(), None, None)
        norm_s, inner, norm_w = norms if len(grams) == 3 else (norms[0], 0.0, 0.0)
        self._search = GramPencil(ss, sw, ww, (norm_s, inner, norm_w), rounding=ROUNDING64)
        self._start = inner / norm_w if norm_w else 0.0
        # With t held, the Gram matrix is of E(t) itself, and the search has no t of its own.
        self._offset = t or 0.0

    def best(self, rank: int) -> LowRank:
        """The approximation of ``rank`` at its own best t."""
        return self.cut(self._search.solve(rank, start=self._start), rank)

    def least_rank(self, allowed: float, max_rank: int) -> tuple[int, Spectrum]:
        """See ``GramPencil.least_rank``."""
        return self._search.least_rank(allowed, max_rank, start=self._start)

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


def _column_grams(pencil: Pencil, t: float | None) -> list[torch.Tensor]:
    """[SᵀS, SᵀW, WᵀW], or the first alone where there is no W; for a fixed t, [E(t)ᵀE(t)]."""
    grams: list[torch.Tensor] = []
    for start, stop in row_blocks(*pencil.shape, BLOCK_ELEMENTS):
        rows = _rows(pencil, t, start, stop)
        for index, (one, two) in enumerate(combinations_with_replacement(rows, 2)):
            if index == len(grams):
                grams.append(one.T @ two)
            else:
                grams[index].addmm_(one.T, two)
    return grams


def _row_grams(pencil: Pencil, t: float | None) -> list[torch.Tensor]:
    """[SSᵀ, SWᵀ, WWᵀ] likewise; rows are formed again for each pair of blocks, of which small matrices have one."""
    height, width = pencil.shape
    blocks = list(row_blocks(height, width, BLOCK_ELEMENTS))
    grams: list[torch.Tensor] = []
    for number, (start, stop) in enumerate(blocks):
        upper = _rows(pencil, t, start, stop)
        if not grams:
            count = len(upper) * (len(upper) + 1) // 2
            grams = [torch.empty(height, height, dtype=upper[0].dtype, device=upper[0].device) for _ in range(count)]
        for first, last in blocks[number:]:
            lower = upper if first == start else _rows(pencil, t, first, last)
            for gram, (one, two) in zip(grams, combinations_with_replacement(range(len(upper)), 2), strict=True):
                torch.mm(upper[one], lower[two].T, out=gram[start:stop, first:last])
                if first != start:
                    torch.mm(lower[one], upper[two].T, out=gram[first:last, start:stop])
    return grams


def _rows(pencil: Pencil, t: float | None, start: int, stop: int) -> list[torch.Tensor]:
    """Rows of S and W in float64, or of S alone where there is no W; for a fixed t, of E(t)."""
    if t is not None:
        return [error_rows(pencil, t, start, stop, torch.float64)]
    return [rows for rows in pencil.rows(start, stop, torch.float64) if rows is not None]
