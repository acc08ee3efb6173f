"""A weight in DoRA's own form: its row norms kept as they are, and only its rows' directions approximated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from mapconv.algebra.dora import merge_rows_
from mapconv.algebra.fingerprint import Fingerprint
from mapconv.algebra.moments import InputRoot
from mapconv.algebra.norms import row_blocks
from mapconv.algebra.pencil import DensePencil
from mapconv.placement.weights import PlacedModule
from mapconv.refit.converted import Converted, converted_module
from mapconv.refit.solving import ModuleRefit, Refitted, Wanted
from mapconv.refit.targets.base import BLOCK_ELEMENTS, Target

#: A round that lowers the error by less than this part of it was the last.
_ENOUGH = 1e-3
#: Solutions that one module takes at most: the scales of T's rows settle fast, and a tolerance is then met.
_ROUNDS = 5


def directed_module(
    placed: PlacedModule, target: Target, wanted: Wanted, base: Fingerprint, root: InputRoot | None = None
) -> Converted:
    """T' = diag(m ⊘ ‖W0 + BA‖_row)·(W0 + BA) with m = ‖T‖_row.

    As m is fixed, T's rows may be scaled: BA is the best approximation of diag(c)·T − W0. It begins with c = 1, which
    is the closest plain LoRA; then each c_i = ⟨T_i, R_i⟩/‖T_i‖² brings T_i as near to its approximation R = W0 + BA as
    its direction allows, as long as that lowers the error. Arguments are those of ``refitted_module``; ε is of T' as
    PEFT computes it.
    """
    norm, lengths = target.squared_norms()[0] ** 0.5, _row_norms(target)
    asked, best = replace(wanted, gain=1.0), None
    scales, settled = torch.ones_like(lengths), False
    for _ in range(_ROUNDS):
        change = _change(target, scales)
        seen = None if root is None else DensePencil(root.multiply(change))
        solved = ModuleRefit(DensePencil(change), asked, root, seen).solve()
        made = _Made(solved, *_measured(target, solved.A, solved.B, lengths))
        meets = wanted.tolerance is None or root is not None or made.error <= wanted.tolerance * norm
        if best is None or made.error < best.error or (meets and not best.meets):
            gained = best is None or made.error < (1 - _ENOUGH) * best.error
            best = replace(made, meets=meets)
            scales = best.scales
            settled = not gained
        else:
            settled = True
        full = solved.A.shape[0] >= min(wanted.max_rank, *target.shape)
        if settled and (meets or full):
            break
        if wanted.tolerance is not None and not meets:
            asked = replace(asked, tolerance=0.98 * (solved.error or 1.0) * wanted.tolerance * norm / made.error)
    assert best is not None  # the first round gives one
    solved = best.solved
    epsilon = best.error / norm if norm else 0.0
    return converted_module(
        placed, "dora", 1.0, base, best.size, epsilon, solved.A, solved.B, lengths, solved.output_error
    )


@dataclass(frozen=True)
class _Made:
    """A solution, ‖T − T'‖, ‖T' − W0‖, and the scales that bring T's rows nearest to it."""

    solved: Refitted
    error: float
    size: float
    scales: torch.Tensor
    meets: bool = False


def _row_norms(target: Target) -> torch.Tensor:
    norms = torch.empty(target.shape[0], dtype=torch.float64)
    for start, stop, T, _ in _rows(target):
        norms[start:stop] = torch.linalg.vector_norm(T, dim=1)
    return norms


def _change(target: Target, scales: torch.Tensor) -> torch.Tensor:
    change = torch.empty(target.shape)
    for start, stop, T, W in _rows(target):
        change[start:stop] = scales[start:stop, None] * T - W
    return change


def _rows(target: Target) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """(start, stop, T, W0) in float64."""
    for start, stop in row_blocks(*target.shape, BLOCK_ELEMENTS):
        S, W = target.rows(start, stop, torch.float64)
        assert W is not None  # a target has a base
        yield start, stop, S.add_(W), W


def _measured(
    target: Target, A: torch.Tensor, B: torch.Tensor, magnitude: torch.Tensor
) -> tuple[float, float, torch.Tensor]:
    """(‖T − T'‖, ‖T' − W0‖, scales) for T' as PEFT computes it from factors and magnitudes as stored."""
    error = size = 0.0
    scales, wide_A = torch.ones_like(magnitude), A.double()
    for start, stop, T, W in _rows(target):
        stored = magnitude[start:stop].float().double()
        near = torch.addmm(W, B[start:stop].double(), wide_A)
        squares = T.square().sum(1)
        nearest = (T * near).sum(1) / squares
        # A row of zeros, or one that turned to the other side, has no scale that helps.
        scales[start:stop] = torch.where((squares > 0) & (nearest > 0), nearest, 1.0)
        got = merge_rows_(W.clone(), wide_A, B[start:stop].double(), magnitude=stored)
        error += float((T - got).square().sum())
        size += float((got - W).square().sum())
    return error**0.5, size**0.5, scales
