"""The randomized way to a low-rank approximation, for matrices that are large and ranks that are thin beside them.

A block Krylov method (Musco and Musco 2015) with a warm start: each step reads the matrix twice, and its block joins
the basis instead of replacing it, so that a flat spectrum takes a handful of steps, where subspace iteration takes
dozens.
The search for t happens on Gram matrices of the basis between two steps, so it costs next to nothing.
"""

from __future__ import annotations

import torch

from mapconv.algebra.gram import GramPencil, Spectrum
from mapconv.algebra.pencil import LowRank, Pencil, balanced
from mapconv.algebra.refinement import refined

#: Columns of a block beyond those that its share of the rank and the known directions take.
OVERSAMPLING = 8
#: Stop once further steps would lower the squared error by less than this fraction, by the rate that it has: 0.1 % of
#: the error at most, and less as the rate is still growing.
RELATIVE_GAIN = 2e-3
#: The same where half steps tell the rate, and promise more than is left: it is at worst 0.25 % of the error on trained
#: adapters' weights.
HALF_GAIN = 1e-3
#: The same after the first whole step from known directions. From random columns, its falls say nothing of later ones.
EARLY_GAIN = 2.5e-4
MAX_BLOCKS = 12
#: Of a block against the basis. The second is always needed, the third where a block adds nothing but rounding.
MAX_PROJECTIONS = 4
#: Squared errors below this fraction of ‖S‖² are rounding of float32 products, not signal.
ROUNDING = 1e-7
#: Squared errors below this fraction of ‖E‖² are known to 1 % at best, and are refined.
FINE = 1e-5
#: The search for t on a sketch is cheap: 0.005 % of the error.
SEARCH_ENOUGH = 1e-4


class Sketch:
    """A decomposition of E(t) on a basis V (m, l) of its leading row space, good for every rank up to ``limit``.

    ``spectrum`` is at the best t of that rank; ``settled`` says whether the steps came to their end, rather than to
    ``MAX_BLOCKS``.

    Args:
        pencil: the matrices.
        rank: wanted rank.
        t: a fixed t; None where the best one is wanted.
        seed: of the random columns that the basis begins with.
        start: (m, j) that it begins with besides; None takes the pencil's own directions.
        one_rank: whether no other rank, and no other error, is going to be asked for. The steps may then end half way,
            on a left basis.
    """

    def __init__(
        self,
        pencil: Pencil,
        rank: int,
        *,
        t: float | None = None,
        seed: int = 0,
        start: torch.Tensor | None = None,
        one_rank: bool = False,
    ) -> None:
        self._pencil, self._fixed, self.limit, self.settled = pencil, t, rank, False
        norms = pencil.squared_norms()
        near = _first_shift(norms) if t is None else t
        self._products, self._left_basis = _Products(pencil), None
        start = pencil.directions if start is None else start
        block = _first_block(pencil, rank, start, seed)
        halves = block.shape[1] >= rank
        falls = _Falls(ROUNDING * norms[0], halves=halves, early=start is not None and start.shape[1] >= rank)
        for step in range(MAX_BLOCKS):
            self._products.append(block)
            columns = self._products.last
            if self._products.columns >= rank:
                self._search = self._products.search(norms)
                self.spectrum = self._solve(rank, near, first=not falls.errors)
                near = self.spectrum.t
                falls.errors.append(float(self.spectrum.squared_errors[rank]))
                self.settled = falls.ended or self._products.complete
                if self.settled or step == MAX_BLOCKS - 1:
                    return
                # Of the whole basis, whose leading directions they improve half a step further than the block's.
                columns = self._products.turned(self._rotation(self.spectrum, block.shape[1]))
            left = orthonormal(_at(*columns, near))
            rows = pencil.transposed_product(left, near)
            if halves:
                half = _spectrum_of_rows(rows, near, norms)
                falls.errors.append(float(half.squared_errors[rank]))
                if one_rank and falls.ended:
                    self._left_basis, self.spectrum, self.settled = (left, rows), half, True
                    return
            block = self._products.beside(rows)

    def least_rank(self, allowed: float, max_rank: int) -> tuple[int, Spectrum]:
        """See ``GramPencil.least_rank``."""
        return self._search.least_rank(allowed, max_rank, t=self._fixed, start=self.spectrum.t)

    def cut(self, spectrum: Spectrum, rank: int) -> LowRank:
        """The approximation of ``rank`` at a spectrum's t."""
        square, whole = float(spectrum.squared_errors[rank]), float(spectrum.squared_errors[0])
        if whole > 0 and square <= FINE * whole:
            return refined(self._pencil, spectrum.t, self.leading(spectrum, rank + OVERSAMPLING), rank)
        rotation = self._rotation(spectrum, rank)
        if self._left_basis is not None:
            left, rows = self._left_basis
            return balanced(spectrum.t, left @ rotation, (rows @ rotation).T, square)
        left, right = _at(*self._products.turned(rotation), spectrum.t), (self._products.basis @ rotation).T
        return balanced(spectrum.t, left, right, square)

    def leading(self, spectrum: Spectrum, count: int) -> torch.Tensor:
        """The leading right singular vectors at a spectrum's t, (m, count), up to their lengths."""
        columns = self._products.basis if self._left_basis is None else self._left_basis[1]
        return columns @ self._rotation(spectrum, count)

    def _rotation(self, spectrum: Spectrum, count: int) -> torch.Tensor:
        """The leading vectors of a spectrum, (l, count)."""
        return spectrum.vectors[:, :count].to(self._pencil.device, torch.float32)

    def _solve(self, rank: int, near: float, *, first: bool) -> Spectrum:
        found = self._search.solve(rank, t=self._fixed, start=near)
        if self._fixed is not None or near == 0 or not first:
            return found
        # f_k may have more than one valley; later iterations stay in the one that is chosen here.
        other = self._search.solve(rank, start=0.0)
        return min(found, other, key=lambda spectrum: float(spectrum.squared_errors[rank]))


class _Falls:
    """The squared errors of whole steps, or also of the ``halves`` between them.

    Args:
        noise: a squared error that is rounding.
        halves: whether errors of half steps are among them.
        early: whether those of the first whole step tell enough.
    """

    def __init__(self, noise: float, *, halves: bool, early: bool) -> None:
        self.errors: list[float] = []
        self._noise, self._early, self._enough = noise, early, HALF_GAIN if halves else RELATIVE_GAIN
        self._least = 4 if halves and not early else 3

    @property
    def ended(self) -> bool:
        """Whether there is little left to go.

        The method converges geometrically at least: the last two falls give the ratio, and the ratio gives what
        remains.
        """
        if self.errors[-1] <= self._noise:
            return True
        if len(self.errors) < self._least:
            return False
        before, last = self.errors[-3] - self.errors[-2], self.errors[-2] - self.errors[-1]
        if last <= self._noise:
            return True
        ratio = min(last / before, 0.95) if before > 0 else 0.95
        enough = EARLY_GAIN if self._early and len(self.errors) == 3 else self._enough
        return last * ratio / (1 - ratio) <= enough * self.errors[-1]


class _Products:
    """An orthonormal basis V (m, l) that grows by blocks, S·V and W·V, and their Gram matrices, in float64."""

    def __init__(self, pencil: Pencil) -> None:
        self._pencil = pencil
        self._blocks: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        self._grams: list[torch.Tensor] = []

    @property
    def basis(self) -> torch.Tensor:
        return torch.cat([block for block, _, _ in self._blocks], 1)

    @property
    def last(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(S·V, W·V) of the last block."""
        _, SV, WV = self._blocks[-1]
        return SV, WV

    @property
    def all(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(S·V, W·V)."""
        WV = [block for _, _, block in self._blocks if block is not None]
        return torch.cat([block for _, block, _ in self._blocks], 1), torch.cat(WV, 1) if WV else None

    def turned(self, rotation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(S·V, W·V) times ``rotation`` (l, p)."""
        SV, WV = self.all
        return SV @ rotation, None if WV is None else WV @ rotation

    @property
    def columns(self) -> int:
        """l."""
        return sum(block.shape[1] for block, _, _ in self._blocks)

    @property
    def complete(self) -> bool:
        """Whether nothing of the matrix is left over."""
        return self.columns >= min(self._pencil.shape)

    def append(self, block: torch.Tensor) -> None:
        """Take in the columns of ``block``, orthonormal and orthogonal to the basis."""
        self._blocks.append((block, *self._pencil.products(block)))
        SV, WV = self.all
        SV, WV = SV.double(), None if WV is None else WV.double()
        pairs = [(SV, SV)] if WV is None else [(SV, SV), (SV, WV), (WV, WV)]
        width, grams = block.shape[1], []
        # Small matrices: the processor is faster than the trip through a device's queue.
        for index, (one, two) in enumerate(pairs):
            columns = (one.T @ two[:, -width:]).cpu()
            if not self._grams:
                grams.append(columns)
                continue
            rows = columns[:-width].T if one is two else (one[:, -width:].T @ two[:, :-width]).cpu()
            upper = torch.cat([self._grams[index], columns[:-width]], 1)
            grams.append(torch.cat([upper, torch.cat([rows, columns[-width:]], 1)]))
        self._grams = grams

    def search(self, norms: tuple[float, float, float]) -> GramPencil:
        ss, sw, ww = self._grams if len(self._grams) == 3 else (self._grams[0], None, None)
        return GramPencil(ss, sw, ww, norms, rounding=ROUNDING, enough=SEARCH_ENOUGH, complete=self.complete)

    def beside(self, columns: torch.Tensor) -> torch.Tensor:
        """An orthonormal basis of what ``columns`` add to V, as far as there is room."""
        basis = self.basis
        for attempt in range(MAX_PROJECTIONS):
            overlap = basis.T @ columns
            columns = orthonormal(columns.addmm(basis, overlap, alpha=-1))
            # What a projection leaves of orthonormal columns is orthogonal to V, unless it left next to nothing.
            if attempt > 0 and float(torch.linalg.matrix_norm(overlap)) < 0.1:
                break
        return columns[:, : min(self._pencil.shape) - self.columns].contiguous()


def _at(SV: torch.Tensor, WV: torch.Tensor | None, t: float) -> torch.Tensor:
    return SV if WV is None or t == 0 else SV.sub(WV, alpha=t)


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis that contains the span of ``columns`` (Householder QR: safe for dependent columns)."""
    return torch.linalg.qr(columns).Q


def _first_shift(norms: tuple[float, float, float]) -> float:
    """The best t where the low-rank part is 0: on trained DoRAs it is near the best of every rank."""
    return norms[1] / norms[2] if norms[2] else 0.0


def _spectrum_of_rows(rows: torch.Tensor, t: float, norms: tuple[float, float, float]) -> Spectrum:
    """What ``rows`` = E(t)ᵀ·Q (m, l) of an orthonormal Q say of every rank, as ``GramPencil.at`` does of a basis V."""
    wide = rows.double()
    norm = norms[0] - 2 * t * norms[1] + t * t * norms[2]
    return GramPencil((wide.T @ wide).cpu(), None, None, (norm, 0.0, 0.0), rounding=ROUNDING).at(t)


def block_columns(shape: tuple[int, int], rank: int, known: int) -> int:
    """Columns of a block for a rank, where ``known`` directions are given: two blocks have the rank, if not one.

    Directions of more than the rank need no others beside them.
    """
    random = max(0, min(OVERSAMPLING, rank + OVERSAMPLING - known)) if known > rank else OVERSAMPLING
    return min(max((rank + 1) // 2, known) + random, *shape)


def _first_block(pencil: Pencil, rank: int, start: torch.Tensor | None, seed: int) -> torch.Tensor:
    known = 0 if start is None else start.shape[1]
    size = block_columns(pencil.shape, rank, known)
    if start is not None and known >= size:
        return orthonormal(start[:, :size])
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device draws the same numbers
    columns = torch.randn(pencil.shape[1], size, generator=generator).to(pencil.device)
    if start is not None:
        columns[:, :known] = start
    return orthonormal(columns)
