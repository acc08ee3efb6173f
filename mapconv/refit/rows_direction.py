"""A weight in DoRA's own form: its row norms kept as they are, and only its rows' directions approximated."""

from __future__ import annotations

from dataclasses import replace

import torch

from mapconv.algebra.dora import merge_rows_
from mapconv.algebra.fingerprint import Fingerprint
from mapconv.algebra.moments import InputRoot
from mapconv.algebra.norms import row_blocks
from mapconv.algebra.pencil import DensePencil
from mapconv.placement.weights import PlacedModule
from mapconv.refit.converted import Converted, converted_module
from mapconv.refit.solving import ModuleRefit, Wanted
from mapconv.refit.targets.base import BLOCK_ELEMENTS, Target

#: A direction that is solved for an ε of its own meets the wanted one after a few corrections.
_CORRECTIONS = 4


def directed_module(
    placed: PlacedModule, target: Target, wanted: Wanted, base: Fingerprint, root: InputRoot | None = None
) -> Converted:
    """T' = diag(m ⊘ ‖W0 + BA‖_row)·(W0 + BA) with m = ‖T‖_row.

    T's rows may be scaled before: with d_i = ⟨T_i, W_i⟩/‖T_i‖² they come as close to W's as their directions allow,
    and what is left is approximated by BA. Arguments are those of ``refitted_module``; ε is of T' as PEFT computes it.
    """
    n, m = target.shape
    change, lengths = torch.empty(n, m), torch.empty(n, dtype=torch.float64)
    for start, stop in row_blocks(n, m, BLOCK_ELEMENTS):
        S, W = target.rows(start, stop, torch.float64)
        assert W is not None  # a target has a base
        T = S + W
        squares = T.square().sum(1)
        lengths[start:stop] = squares.sqrt()
        scales = torch.where(squares > 0, (T * W).sum(1) / squares, 1.0)
        # A row that turned to the other side has no scale that helps.
        change[start:stop] = T * torch.where(scales > 0, scales, 1.0)[:, None] - W
    problem, norm = DensePencil(change), target.squared_norms()[0] ** 0.5
    seen = None if root is None else DensePencil(root.multiply(change))
    asked = replace(wanted, gain=1.0)
    for _ in range(_CORRECTIONS):
        solved = ModuleRefit(problem, asked, root, seen).solve()
        error, size = _measured(target, solved.A, solved.B, lengths)
        epsilon = error / norm if norm else 0.0
        full = solved.A.shape[0] >= min(wanted.max_rank, n, m)
        if wanted.tolerance is None or root is not None or epsilon <= wanted.tolerance or full:
            break
        reached = solved.error or wanted.tolerance
        asked = replace(asked, tolerance=0.98 * reached * wanted.tolerance / epsilon)
    return converted_module(placed, "dora", 1.0, base, size, epsilon, solved.A, solved.B, lengths, solved.output_error)


def _measured(target: Target, A: torch.Tensor, B: torch.Tensor, magnitude: torch.Tensor) -> tuple[float, float]:
    """(‖T − T'‖, ‖T' − W0‖) for T' as PEFT computes it from factors and magnitudes as stored."""
    error = size = 0.0
    for start, stop in row_blocks(*target.shape, BLOCK_ELEMENTS):
        S, W = target.rows(start, stop, torch.float64)
        assert W is not None  # as above
        stored = magnitude[start:stop].float().double()
        got = merge_rows_(W.clone(), A.double(), B[start:stop].double(), magnitude=stored)
        error += float((W + S - got).square().sum())
        size += float((got - W).square().sum())
    return error**0.5, size**0.5
