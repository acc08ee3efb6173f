"""The best t and rank of a pencil from three small Gram matrices: G(t) = E(t)ᵀE(t) is quadratic in t.

With λ_1 ≥ λ_2 ≥ … the eigenvalues of G(t), Eckart–Young gives the squared error at rank k: f_k(t) = ‖E(t)‖² − Σ_{i≤k}
λ_i. One eigendecomposition gives f_k, f_k′ and f_k″ for every k at once, by the perturbation theory of eigenvalues, so
that Newton's method needs few of them. f_k″ ≤ 2‖W‖², because f_k is a minimum over parabolas of that curvature: a step
that uses 2‖W‖² in place of f_k″ (the best t for the present low-rank part) never makes the error larger, and is the
bracket.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

#: Squared errors below this fraction of ‖E‖² are rounding of the Gram matrices.
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6}
#: The search for t stops once the squared error can fall by less than this fraction: 0.05 % of the error.
ENOUGH = 1e-3
#: Below this fraction of its largest possible value, f_k″ is taken for that value: f_k bends down where λ_k and λ_{k+1}
#: nearly cross.
LEAST_CURVATURE = 1e-4
#: Eigenvalues closer than this fraction of the largest are taken for a crossing.
NEARLY_EQUAL = {torch.float64: 1e-12, torch.float32: 1e-6}
MAX_STEPS = 20
#: Where the matrix is at most this large, or more than half of its eigenvalues are taken, t is scanned.
SMALL = 64


class Scan(NamedTuple):
    """At how many places f_k is looked at, in how many of the lowest valleys again, and at how many places there."""

    places: int
    valleys: int
    refined: int


#: Where an eighth of the eigenvalues or less is left over, the valleys are many and narrow.
WIDE, NARROW = Scan(31, 3, 9), Scan(81, 4, 25)
#: Up to this size they are looked at one by one: of each the place is known.
EVERY_VALLEY = 256
#: Numbers of the matrices whose eigenvalues are found in one call: small matrices take less time than a call does.
AT_ONCE = 1 << 17


@dataclass(frozen=True)
class Spectrum:
    """Everything that one eigendecomposition of G(t) says: of every rank k = 0 … l, by index.

    values (l,) in falling order and vectors (l, l), by column; squared_errors, slopes and curvatures, (l + 1,) float64,
    are f_k(t), f_k′(t) and f_k″(t), the latter made positive.
    """

    t: float
    values: torch.Tensor
    vectors: torch.Tensor
    squared_errors: torch.Tensor
    slopes: torch.Tensor
    curvatures: torch.Tensor

    @property
    def reachable(self) -> torch.Tensor:
        """What a Newton step on t is expected to leave of the squared errors."""
        return (self.squared_errors - self.slopes.square() / (2 * self.curvatures)).clamp_min(0)

    def step(self, rank: int) -> float:
        """Newton's next t for a rank."""
        return self.t - float(self.slopes[rank] / self.curvatures[rank])


class GramPencil:
    """G(t) = SᵀS − t·(SᵀW + WᵀS) + t²·WᵀW, with the exact norms of the whole pencil that a sketch may know a part of.

    Args:
        ss, sw, ww: (l, l) float64 or float32: SᵀS, SᵀW and WᵀW; the last two None where there is no W.
        norms: (‖S‖², ⟨S, W⟩, ‖W‖²).
        complete: whether the matrices are of the whole pencil, not of a sketch.
        rounding: fraction of ‖S‖² below which squared errors are noise, and t = 0 is as good as any other.
    """

    def __init__(
        self,
        ss: torch.Tensor,
        sw: torch.Tensor | None,
        ww: torch.Tensor | None,
        norms: tuple[float, float, float],
        *,
        rounding: float,
        enough: float = ENOUGH,
        complete: bool = True,
    ) -> None:
        self.complete = complete
        self.ss, self.sw, self.ww, self.norms = ss, None if sw is None else sw + sw.T, ww, norms
        self.noise, self.enough = rounding * norms[0], enough
        self._scanned: dict[Scan, tuple[list[float], torch.Tensor]] = {}

    def solve(self, rank: int, *, t: float | None = None, start: float = 0.0) -> Spectrum:
        """The spectrum at the t of least error for ``rank``, or at a given ``t``."""
        if t is not None or self._any_t_serves(rank):
            return self.at(t or 0.0)
        return self._zero_if_exact(self._best(self.at(start), rank), rank)

    def least_rank(
        self, allowed: float, max_rank: int, *, t: float | None = None, start: float = 0.0
    ) -> tuple[int, Spectrum]:
        """The least rank whose squared error can be brought to ``allowed``, at most ``max_rank``, and its spectrum."""

        def wanted(spectrum: Spectrum) -> int:
            return _first_below(spectrum.reachable, allowed, max_rank)

        if t is not None or self._any_t_serves(0):
            spectrum = self.at(t or 0.0)
            return _first_below(spectrum.squared_errors, allowed, max_rank), spectrum
        best = self._descend(self.at(start), wanted, allowed)
        rank = _first_below(best.squared_errors, allowed, max_rank)
        # The way there ended at the first t that serves: the best one for this rank may serve a lower one too, and the
        # best for that again.
        best = self._zero_if_exact(self._best(best, rank), rank)
        while rank > 1 and float(best.squared_errors[rank]) <= allowed:
            lower = _first_below(best.squared_errors, allowed, rank)
            lower = lower if lower < rank else rank - 1
            smaller = self._zero_if_exact(self._best(best, lower), lower)
            if float(smaller.squared_errors[lower]) > allowed:
                break
            rank, best = lower, smaller
        return rank, best

    def at(self, t: float) -> Spectrum:
        """The eigendecomposition of G(t), and the errors' derivatives from it."""
        norm_s, inner, norm_w = self.norms
        gram = self.ss if t == 0 or self.sw is None or self.ww is None else self.ss - t * self.sw + t * t * self.ww
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        wide = values.double()
        errors = norm_s - 2 * t * inner + t * t * norm_w - _sums(wide)
        if self.sw is None or self.ww is None:
            flat = torch.zeros_like(errors)
            return Spectrum(t, values, vectors, errors.clamp_min(0), flat, flat + 1)
        change = (2 * t) * self.ww - self.sw
        turned = change @ vectors
        slopes = 2 * (t * norm_w - inner) - _sums((turned * vectors).sum(0).double())
        couplings = (vectors.T @ turned).double().square_()
        gaps = wide[:, None] - wide
        # 1/gap, held finite where two values nearly meet; the terms of two values on the same side of k cancel.
        couplings.mul_(gaps.div_(gaps.square().add_((NEARLY_EQUAL[values.dtype] * float(wide[0])) ** 2 or 1.0)))
        bends = 2 * (((self.ww @ vectors) * vectors).sum(0).double() + couplings.sum(1))
        highest = 2 * norm_w
        curvatures = highest - _sums(bends)
        curvatures = torch.where(curvatures >= LEAST_CURVATURE * highest, curvatures.clamp_max(highest), highest)
        return Spectrum(t, values, vectors, errors.clamp_min(0), slopes, curvatures)

    def _any_t_serves(self, rank: int) -> bool:
        """Whether no W is there, or no t leaves anything over, so that rounding alone would choose one."""
        return self.sw is None or self.norms[2] == 0 or rank >= len(self.ss)

    def _has_valleys(self, rank: int) -> bool:
        """Whether f_k may have several valleys.

        Of a DoRA, E(t) is mostly rows of W0, each scaled by how much it grew, less t. What is left over are the rows
        whose growth is closest to t: all but a few have one mean, and of a few each cluster of rows is a valley.
        """
        return self.complete and (len(self.ss) <= SMALL or 2 * rank > len(self.ss))

    def _scan(self, rank: int) -> float:
        """The t of least error among those of ``_places``, and of others close together in the lowest valleys there."""
        scan = NARROW if 8 * (len(self.ss) - rank) <= len(self.ss) else WIDE
        if scan not in self._scanned:
            places = self._places(scan)
            self._scanned[scan] = places, self._errors(places)
        places, found = self._scanned[scan]
        errors = found[:, rank].tolist()
        tried = dict(zip(places, errors, strict=True))
        closer: list[float] = []
        for valley in sorted(_valleys(errors), key=lambda place: errors[place])[: scan.valleys]:
            ends = places[max(valley - 1, 0)], places[min(valley + 1, len(places) - 1)]
            closer += torch.linspace(*ends, scan.refined, dtype=torch.float64).tolist()
        tried |= zip(closer, self._errors(closer)[:, rank].tolist(), strict=True)
        return min(tried, key=lambda t: tried[t])

    def _places(self, scan: Scan) -> list[float]:
        """Places where eigenvalues are small, or some around the best of rank 0 and closer together there; rising."""
        norm_s, inner, norm_w = self.norms
        if scan is NARROW and len(self.ss) <= EVERY_VALLEY and (bottoms := self._bottoms()):
            return bottoms
        middle, reach = inner / norm_w, 2 * (norm_s / norm_w) ** 0.5
        return [middle + reach * x * abs(x) for x in torch.linspace(-1, 1, scan.places, dtype=torch.float64).tolist()]

    def _bottoms(self) -> list[float]:
        """Each t at whose place an eigenvalue of G is small, in rising order; none where WᵀW is singular.

        det G(t) has roots t ± iδ in pairs, as G has no negative eigenvalue on the real line: near t an eigenvalue is
        about κ((t′ − t)² + δ²), a valley whose bottom is at t. The roots are the eigenvalues of a companion matrix
        (linearization of a quadratic eigenvalue problem: Tisseur and Meerbergen 2001).
        """
        assert self.sw is not None
        assert self.ww is not None  # where there is no W, no t is looked for
        root, failed = torch.linalg.cholesky_ex(self.ww.double())
        if failed:
            return []
        size = len(root)
        companion = torch.zeros(2 * size, 2 * size, dtype=torch.float64)
        companion[:size, size:] = torch.eye(size, dtype=torch.float64)
        for gram, sign, place in ((self.ss, -1, 0), (self.sw, 1, size)):
            half = torch.linalg.solve_triangular(root, gram.double(), upper=False)
            companion[size:, place : place + size] = sign * torch.linalg.solve_triangular(root, half.T, upper=False)
        roots = torch.linalg.eigvals(companion)
        return sorted({t for t in roots.real[roots.imag >= 0].tolist() if math.isfinite(t)})

    def _errors(self, places: Sequence[float]) -> torch.Tensor:
        """The squared errors of every rank at each t, (t, l + 1), as ``at`` has them, from the eigenvalues alone."""
        norm_s, inner, norm_w = self.norms
        assert self.sw is not None
        assert self.ww is not None  # where there is no W, no t is looked for
        found = []
        at_once = max(1, AT_ONCE // self.ss.numel())
        for first in range(0, len(places), at_once):
            ts = torch.tensor(places[first : first + at_once], dtype=torch.float64)[:, None, None]
            t, squared = ts.to(self.ss.dtype), ts.square().to(self.ss.dtype)
            values = torch.linalg.eigvalsh(self.ss - t * self.sw + squared * self.ww).flip(1).clamp_min(0).double()
            norms = norm_s - 2 * ts * inner + ts.square() * norm_w
            found.append(norms[:, :, 0] - _sums(values))
        return torch.cat(found)

    def _best(self, here: Spectrum, rank: int) -> Spectrum:
        """The spectrum of least error for ``rank``, found from ``here``."""
        best = self._descend(here, lambda spectrum: rank)
        if self._has_valleys(rank):
            other = self._descend(self.at(self._scan(rank)), lambda spectrum: rank)
            best = min(best, other, key=lambda spectrum: float(spectrum.squared_errors[rank]))
        return best

    def _descend(self, here: Spectrum, wanted, allowed: float | None = None) -> Spectrum:
        """Newton steps for the rank that ``wanted`` reads off a spectrum, as long as they have something to gain."""
        for _ in range(MAX_STEPS):
            rank = wanted(here)
            error, gain = float(here.squared_errors[rank]), float(here.squared_errors[rank] - here.reachable[rank])
            if allowed is not None and error <= allowed:
                return here
            if gain <= max(self.enough * error, self.noise):
                return here
            here = self._lower(here, rank)
        return here

    def _lower(self, here: Spectrum, rank: int) -> Spectrum:
        """Newton's step, drawn back as long as it overshoots; the step of the highest curvature cannot."""
        step, sure = here.step(rank) - here.t, -float(here.slopes[rank]) / (2 * self.norms[2])
        while True:
            there = self.at(here.t + step)
            if there.squared_errors[rank] <= here.squared_errors[rank] or abs(step) <= abs(sure):
                return there
            step = max(step / 4, sure, key=abs)

    def _zero_if_exact(self, best: Spectrum, rank: int) -> Spectrum:
        """t = 0 wins ties within rounding, so that a pencil whose S has rank k (a LoRA) gives exactly t = 0."""
        if best.t == 0 or float(best.squared_errors[rank]) > 1e3 * self.noise:
            return best
        zero = self.at(0.0)
        return zero if zero.squared_errors[rank] <= best.squared_errors[rank] + self.noise else best


def _valleys(errors: Sequence[float]) -> list[int]:
    """The places that no neighbour lies below."""
    walled = [float("inf"), *errors, float("inf")]
    return [place for place, error in enumerate(errors) if error <= min(walled[place], walled[place + 2])]


def _sums(values: torch.Tensor) -> torch.Tensor:
    """0 and the running sums of ``values``, (…, l): one for each rank from 0 on, (…, l + 1)."""
    return torch.cat([values.new_zeros(*values.shape[:-1], 1), values.cumsum(-1)], -1)


def _first_below(errors: torch.Tensor, allowed: float, max_rank: int) -> int:
    """The least rank ≥ 1 whose squared error is allowed, or ``max_rank``."""
    enough = torch.nonzero(errors[1 : max_rank + 1] <= allowed)
    return int(enough[0]) + 1 if len(enough) else max_rank
