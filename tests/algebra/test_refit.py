"""The refit against the optimum that full float64 SVDs find, and its properties."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mapconv.algebra.lowrank import best_low_rank
from mapconv.algebra.pencil import DensePencil
from mapconv.algebra.randomized import MAX_BLOCKS
from mapconv.algebra.refit import refit, refit_to_tolerance, relative_error
from tests.algebra.weights import Dense, random_weight


def optimum(weight: Dense, rank: int, gain: float | None = None) -> float:
    """The least ε of any a and any matrix of ``rank``: f(a) from full SVDs, scanned, then narrowed."""

    def error(a: float) -> float:
        values = torch.linalg.svdvals(weight.target - a * weight.base.double())
        return float(values[rank:].square().sum())

    if gain is None:
        grid = torch.linspace(0.3, 1.7, 141).tolist()
        middle = min(range(1, 140), key=lambda index: error(grid[index]))
        low, high = grid[middle - 1], grid[middle + 1]
        for _ in range(25):
            inner = low + 0.382 * (high - low), low + 0.618 * (high - low)
            low, high = (low, inner[1]) if error(inner[0]) < error(inner[1]) else (inner[0], high)
        gain = (low + high) / 2
    return math.sqrt(error(gain)) / float(weight.change.norm())


def dense_error(weight: Dense, solution) -> float:
    built = solution.gain * weight.base.double() + solution.B.double() @ solution.A.double()
    return float((weight.target - built).norm() / weight.change.norm())


@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize(
    ("spread", "update", "shape"),
    [(0.1, 0.3, (60, 40)), (0.1, 0.05, (40, 60)), (0.02, 0.3, (64, 64)), (0.4, 0.5, (30, 90))],
)
def test_within_one_percent_of_the_optimum(spread, update, shape, rank):
    weight = random_weight(*shape, update=update, spread=spread)
    solution = refit(weight.operator, rank)
    best = optimum(weight, rank)
    assert best * (1 - 1e-5) <= dense_error(weight, solution) <= best * 1.01


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_with_the_gain_held_it_is_the_truncated_svd(rank):
    weight = random_weight(spread=0.1)
    solution = refit(weight.operator, rank, gain=1.0)
    best = optimum(weight, rank, gain=1.0)
    assert solution.gain == 1.0
    assert best * (1 - 1e-5) <= dense_error(weight, solution) <= best * 1.01


def test_a_free_gain_is_never_worse_than_a_held_one():
    weight = random_weight(spread=0.1)
    assert dense_error(weight, refit(weight.operator, 4)) < dense_error(weight, refit(weight.operator, 4, gain=1.0))


@pytest.mark.parametrize("rank", [4, 5, 20, 40, 1000])
@pytest.mark.parametrize("update", [1.0, 0.1, 0.001])
def test_lora_is_the_special_case_with_gain_exactly_one_and_no_error(rank, update):
    weight = random_weight(update=update)
    solution = refit(weight.operator, rank)
    assert solution.gain == 1.0
    assert solution.rank == min(rank, 40)
    # Float32 products of the update: some ten roundings of 2^-24 each.
    assert dense_error(weight, solution) <= 1e-6


def test_lora_below_its_rank_is_its_truncated_svd():
    weight = random_weight(rank=8)
    solution = refit(weight.operator, 3, gain=1.0)
    assert dense_error(weight, solution) == pytest.approx(optimum(weight, 3, gain=1.0), rel=0.01)


def test_a_dora_that_scales_all_rows_alike_is_a_map_weight():
    """T = 1.05·(W0 + BA): a = 1.05 and rank r leave nothing over."""
    weight = random_weight()
    norms = (weight.base + weight.B @ weight.A).norm(dim=1)
    weight = Dense(weight.base, weight.A, weight.B, 1.05 * norms)
    solution = refit(weight.operator, 4)
    assert solution.gain == pytest.approx(1.05, rel=1e-5)
    assert dense_error(weight, solution) <= 1e-5


@pytest.mark.parametrize("spread", [None, 0.1])
def test_error_falls_with_rank(spread):
    weight = random_weight(rank=8, spread=spread)
    errors = [dense_error(weight, refit(weight.operator, rank)) for rank in range(1, 13)]
    # Each is within 1 % of its own optimum, and the optima fall.
    assert all(after <= 1.01 * before + 1e-6 for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0] / 2


@pytest.mark.parametrize("spread", [None, 0.1])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_certificate_is_the_dense_error(spread, rank):
    weight = random_weight(rank=8, spread=spread)
    solution = refit(weight.operator, rank)
    dense = dense_error(weight, solution)
    certificate = relative_error(weight.operator, solution.gain, solution.B, solution.A)
    assert certificate == pytest.approx(dense, rel=1e-5, abs=1e-6)
    # What the solver believes comes from squares, whose rounding is 1e-7 of ‖T − W0‖² (lowrank.ROUNDING).
    assert solution.error**2 == pytest.approx(dense**2, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("tolerance", [0.5, 0.2, 0.1, 0.03])
@pytest.mark.parametrize("spread", [None, 0.1])
def test_tolerance_gives_the_smallest_rank(tolerance, spread):
    weight = random_weight(rank=8, spread=spread)
    solution = refit_to_tolerance(weight.operator, tolerance, 40)
    assert dense_error(weight, solution) <= tolerance * (1 + 1e-5)
    if solution.rank > 1:
        assert optimum(weight, solution.rank - 1) > tolerance * 0.99  # the solver's own slack is 1 %


def test_tolerance_that_no_rank_up_to_the_limit_meets():
    weight = random_weight(rank=8, spread=0.3)
    solution = refit_to_tolerance(weight.operator, 0.01, 5)
    assert solution.rank == 5
    assert dense_error(weight, solution) == pytest.approx(optimum(weight, 5), rel=0.01)


def test_the_same_seed_gives_the_same_bits_and_global_randomness_plays_no_part():
    weight, solutions = random_weight(spread=0.1), []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        state = torch.random.get_rng_state()
        solutions.append(refit(weight.operator, 4))
        assert torch.equal(torch.random.get_rng_state(), state)
    first, second = solutions
    assert first.gain == second.gain
    assert torch.equal(first.A, second.A)
    assert torch.equal(first.B, second.B)


@pytest.mark.parametrize("tolerance", [None, 0.1])
def test_an_update_of_zero(tolerance):
    """B = 0 has no direction: no division by zero, no NaN."""
    weight = random_weight()
    operator = Dense(weight.base, weight.A, torch.zeros_like(weight.B), None).operator
    solution = refit(operator, 4) if tolerance is None else refit_to_tolerance(operator, tolerance, 40)
    assert solution.gain == 1.0
    assert solution.error == 0.0
    assert float((solution.B @ solution.A).norm()) == 0.0
    assert relative_error(operator, solution.gain, solution.B, solution.A) == 0.0


def test_a_base_of_zeros():
    weight = random_weight()
    zero = Dense(torch.zeros_like(weight.base), weight.A, weight.B, None)
    solution = refit(zero.operator, 4)
    assert solution.gain == 1.0
    assert dense_error(zero, solution) <= 1e-6


def test_factors_are_balanced():
    """‖B‖ = ‖A‖ column by row, so that neither side is tiny in 16 bits."""
    solution = refit(random_weight(spread=0.1).operator, 6)
    torch.testing.assert_close(solution.B.norm(dim=0), solution.A.norm(dim=1), rtol=1e-4, atol=0)


def test_a_matrix_with_a_slowly_falling_spectrum_stops_within_the_limit():
    """White noise is the worst case of subspace iteration: it must stop, and be near the optimum all the same."""
    noise = torch.randn(400, 800, generator=torch.Generator().manual_seed(0))

    class Noise(DensePencil):
        products_taken = 0

        def products(self, V):
            self.products_taken += 1
            return super().products(V)

    pencil = Noise(noise)
    solution = best_low_rank(pencil, 10, shift=0.0)
    best = float(torch.linalg.svdvals(noise.double())[10:].square().sum())
    assert best * (1 - 1e-6) <= solution.squared_error <= 1.02 * best
    assert 0 < pencil.products_taken <= MAX_BLOCKS
