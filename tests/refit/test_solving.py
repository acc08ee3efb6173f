"""The solver's own error is held against the one that its stored factors have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mapconv.errors import FidelityError
from mapconv.refit import solving
from mapconv.refit.solving import ModuleRefit, Wanted
from tests.algebra.weights import random_weight


def wanted(**changes) -> Wanted:
    return replace(Wanted("model.layers.3.mlp", 6, None, 40, None, torch.float32), **changes)


def wrong(solve, ways):
    """A solver that, in some ways, gives a left factor that is not of its right one's basis."""

    def solver(*arguments, dense, **options):
        solution = solve(*arguments, dense=dense, **options)
        return replace(solution, B=solution.B.flip(1)) if dense in ways else solution

    return solver


def test_a_wrong_solution_is_solved_again_the_sure_way(monkeypatch):
    target = random_weight(spread=0.1).operator
    right = ModuleRefit(target, wanted()).solve()
    monkeypatch.setattr(solving, "refit", wrong(solving.refit, {False}))
    assert ModuleRefit(target, wanted()).solve().error == pytest.approx(right.error, rel=1e-3)


def test_a_solution_that_stays_wrong_stops_with_the_modules_name(monkeypatch):
    monkeypatch.setattr(solving, "refit", wrong(solving.refit, {False, True}))
    # The factors as solved are swapped after the error was computed, and so is what is stored.
    with pytest.raises(FidelityError, match=r"model\.layers\.3\.mlp.*--direction dora"):
        ModuleRefit(random_weight(spread=0.1).operator, wanted()).solve()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 6, 40])
def test_right_solutions_agree_in_every_dtype(dtype, rank, monkeypatch):
    calls = []
    solve = solving.refit
    monkeypatch.setattr(solving, "refit", lambda *a, dense, **o: calls.append(dense) or solve(*a, dense=dense, **o))
    ModuleRefit(random_weight(spread=0.1).operator, wanted(rank=rank, dtype=dtype)).solve()
    assert calls == [False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tolerance_holds_for_the_factors_as_stored(dtype):
    target = random_weight(spread=0.1).operator
    refitted = ModuleRefit(target, wanted(tolerance=0.05, dtype=dtype)).solve()
    assert refitted.A.shape[0] < 40
    assert refitted.error <= 0.05
