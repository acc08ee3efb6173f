"""Solve one refit, round its factors to the dtype they are written in, and measure the result on those.

The solver's own error and the measured one come from different computations: where they differ by more than rounding
explains, the problem is solved again the slower, sure way, and a difference that stays stops the run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mapconv.algebra.moments import InputRoot
from mapconv.algebra.norms import all_finite
from mapconv.algebra.pencil import Pencil, residual_norm
from mapconv.algebra.refit import Refit, agrees, refit, refit_to_tolerance
from mapconv.errors import FidelityError, OutputError

#: Below this gain, D = (b/a)·Δ would be too long for its dtype, and a = 1 is solved for instead.
SMALLEST_GAIN = 1e-3


@dataclass(frozen=True)
class Wanted:
    """What is asked of one module's refit.

    ``rank``, or with a ``tolerance`` the least rank up to ``max_rank`` that meets it; ``gain``: a held a, or None;
    ``dtype``: what the factors are stored in; ``path``: the module's name, for messages.
    """

    path: str
    rank: int
    tolerance: float | None
    max_rank: int
    gain: float | None
    dtype: torch.dtype


@dataclass(frozen=True)
class Refitted:
    """W' = gain·(W0 + B·A) with the factors as stored, and the errors ε measured on them.

    ``output_error`` is ε of the outputs, which was minimised where the inputs are known; None where they are not.
    """

    gain: float
    A: torch.Tensor
    B: torch.Tensor
    error: float
    output_error: float | None


@dataclass(frozen=True)
class _Stored:
    """A solution, its factors as stored (on the CPU), as numbers again, A through P, and ‖·‖ of what they leave."""

    solution: Refit
    A: torch.Tensor
    B: torch.Tensor
    wide_A: torch.Tensor
    wide_B: torch.Tensor
    seen_A: torch.Tensor
    residual: float


class ModuleRefit:
    """The refit of one module.

    Args:
        target: the pencil (T − W0) − t·W0.
        wanted: what is asked.
        root: P, the root of the inputs' second moment, on the target's device; None weighs all weights alike.
        seen: the target through P; given with ``root``.
    """

    def __init__(
        self, target: Pencil, wanted: Wanted, root: InputRoot | None = None, seen: Pencil | None = None
    ) -> None:
        self._target, self._wanted, self._root = target, wanted, root
        self._problem = target if seen is None else seen

    def solve(self) -> Refitted:
        """The optimum, stored and measured.

        Raises:
            OutputError: a value of the factors overflows in their dtype.
            FidelityError: the measured error is not what even the sure way says.
        """
        stored = self._find(dense=False, precision=torch.float32)
        if not self._agrees(stored):
            stored = self._find(dense=True, precision=torch.float64)
            if not self._agrees(stored):
                raise FidelityError(self._disagreement(stored))
        gain = stored.solution.gain
        norm = self._target.squared_norms()[0] ** 0.5
        if self._root is None:
            return Refitted(gain, stored.A, stored.B, _ratio(stored.residual, norm), None)
        residual = residual_norm(self._target, gain - 1, gain * stored.wide_B, stored.wide_A)
        return Refitted(gain, stored.A, stored.B, _ratio(residual, norm), self._error(stored))

    def _find(self, *, dense: bool, precision: torch.dtype) -> _Stored:
        wanted, problem, tolerance = self._wanted, self._problem, self._wanted.tolerance
        if tolerance is None:
            solution = refit(problem, wanted.rank, gain=wanted.gain, dense=dense)
            if abs(solution.gain) <= SMALLEST_GAIN:
                solution = refit(problem, wanted.rank, gain=1.0, dense=dense)
            return self._store(solution, precision)
        tried: dict[int, _Stored] = {}

        def measure(solution: Refit) -> float:
            stored = tried[id(solution)] = self._store(solution, precision)
            return self._error(stored)

        def search(gain: float | None) -> _Stored:
            found = refit_to_tolerance(problem, tolerance, wanted.max_rank, gain=gain, measure=measure, dense=dense)
            return tried[id(found)]

        stored = search(wanted.gain)
        return stored if abs(stored.solution.gain) > SMALLEST_GAIN else search(1.0)

    def _store(self, solution: Refit, precision: torch.dtype) -> _Stored:
        divided = solution if self._root is None else solution.divided_by(self._root)
        # A solution whose gain is too small is replaced before it is returned; it only must not divide by zero here.
        gain = solution.gain if abs(solution.gain) > SMALLEST_GAIN else 1.0
        A, B = (rounded(factor, self._wanted.dtype, self._wanted.path) for factor in (divided.A, divided.B / gain))
        wide_A, wide_B = (factor.to(solution.A.device, torch.float32) for factor in (A, B))
        seen_A = wide_A if self._root is None else self._root.multiply(wide_A)
        residual = residual_norm(self._problem, solution.gain - 1, gain * wide_B, seen_A, precision)
        return _Stored(solution, A, B, wide_A, wide_B, seen_A, residual)

    def _agrees(self, stored: _Stored) -> bool:
        solution = stored.solution
        return agrees(self._problem, solution, solution.gain * stored.wide_B, stored.seen_A, stored.residual)

    def _error(self, stored: _Stored) -> float:
        return _ratio(stored.residual, self._problem.squared_norms()[0] ** 0.5)

    def _disagreement(self, stored: _Stored) -> str:
        return (
            f"{self._wanted.path}: the refit's own error is ε = {stored.solution.error:.6g}, but its stored factors "
            f"have ε = {self._error(stored):.6g}, also when solved with float64 decompositions, so nothing was "
            "written: use --direction dora for this adapter, which needs no refit, and report this fault."
        )


def rounded(factor: torch.Tensor, dtype: torch.dtype, path: str) -> torch.Tensor:
    """A factor of module ``path`` in the dtype it is written in, on the CPU.

    Raises:
        OutputError: a value that overflows there.
    """
    stored = factor.to(dtype).cpu()
    if not all_finite(stored):
        raise OutputError(
            f"the factors of {path} do not fit in {str(dtype).removeprefix('torch.')}: some values overflow there, so "
            "choose another --dtype."
        )
    return stored


def _ratio(residual: float, norm: float) -> float:
    return residual / norm if norm else 0.0
