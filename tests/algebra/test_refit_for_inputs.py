"""The refit with P ≠ I against the optimum that full float64 SVDs find."""

from __future__ import annotations

import pytest
import torch

from mapconv.algebra.moments import InputRoot
from mapconv.algebra.refit import Refit, refit, refit_to_tolerance, relative_error
from tests.algebra.test_moments import accumulated, inputs
from tests.algebra.weights import Dense, random_weight


def root_for(width: int, statistics: str = "full") -> InputRoot:
    return accumulated(inputs(400, width), statistics).root()


def dense(root: InputRoot) -> torch.Tensor:
    return root.factor.double() if root.factor.ndim == 2 else torch.diag(root.factor.double())


def output_error(weight: Dense, root: InputRoot, solution: Refit) -> float:
    """‖(T − a·W0 − BA)P‖ / ‖(T − W0)P‖ in float64."""
    left = weight.target - solution.gain * weight.base.double() - solution.B.double() @ solution.A.double()
    return float((left @ dense(root)).norm() / (weight.change @ dense(root)).norm())


def optimum(weight: Dense, root: InputRoot, rank: int) -> float:
    """The least error of any a in a fine grid and any matrix of ``rank``."""
    P = dense(root)

    def error(a: float) -> float:
        values = torch.linalg.svdvals((weight.target - a * weight.base.double()) @ P)
        return float(values[rank:].square().sum())

    near = min(torch.linspace(0.7, 1.3, 61).tolist(), key=error)
    best = min(map(error, torch.linspace(near - 0.01, near + 0.01, 21).tolist()))
    return best**0.5 / float((weight.change @ P).norm())


def solve(weight: Dense, root: InputRoot, rank: int) -> Refit:
    return refit(weight.operator.seen_through(root), rank).divided_by(root)


@pytest.mark.parametrize("statistics", ["full", "diagonal"])
@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (30, 90)])
def test_within_one_percent_of_the_optimum(shape, rank, statistics):
    weight, root = random_weight(*shape, spread=0.1), root_for(shape[1], statistics)
    best = optimum(weight, root, rank)
    # Below the grid's own error, which the free gain may beat, no solution can be.
    assert best * (1 - 1e-4) <= output_error(weight, root, solve(weight, root, rank)) <= best * 1.01


def test_it_is_closer_for_the_inputs_than_the_plain_optimum_and_further_by_weights():
    weight, root = random_weight(spread=0.1), root_for(40)
    plain, fitted = refit(weight.operator, 4), solve(weight, root, 4)
    assert output_error(weight, root, fitted) < 0.9 * output_error(weight, root, plain)
    assert relative_error(weight.operator, fitted.gain, fitted.B, fitted.A) > plain.error


def test_the_identity_changes_nothing():
    weight = random_weight(spread=0.1)
    plain, fitted = refit(weight.operator, 4), solve(weight, InputRoot(torch.eye(40)), 4)
    assert fitted.gain == pytest.approx(plain.gain, abs=1e-5)
    assert fitted.error == pytest.approx(plain.error, rel=1e-4)


def test_the_certificate_of_the_outputs_is_the_dense_one():
    weight, root = random_weight(spread=0.1), root_for(40)
    solution = solve(weight, root, 4)
    certificate = relative_error(
        weight.operator.seen_through(root), solution.gain, solution.B, root.multiply(solution.A)
    )
    # The products with P are float32 sums over 40 inputs.
    assert certificate == pytest.approx(output_error(weight, root, solution), rel=40 * 2**-22)


@pytest.mark.parametrize("tolerance", [0.5, 0.2, 0.05])
def test_a_tolerance_is_of_the_outputs(tolerance):
    weight, root = random_weight(spread=0.1), root_for(40)
    seen = weight.operator.seen_through(root)
    solution = refit_to_tolerance(seen, tolerance, 40).divided_by(root)
    assert output_error(weight, root, solution) <= tolerance * 1.001
    assert optimum(weight, root, solution.rank - 1) > tolerance * 0.99


def test_lora_stays_exact():
    weight, root = random_weight(), root_for(40)
    solution = solve(weight, root, 4)
    assert solution.gain == 1.0
    # Float32 solves with a factor whose condition number is below 1e3.
    assert output_error(weight, root, solution) <= 1e-4


def test_the_factors_are_balanced():
    weight, root = random_weight(spread=0.1), root_for(40)
    solution = solve(weight, root, 4)
    torch.testing.assert_close(solution.B.norm(dim=0), solution.A.norm(dim=1), rtol=1e-5, atol=0)


def test_a_target_that_is_its_base_gives_zero_factors():
    weight, root = random_weight(update=0.0), root_for(40)
    solution = solve(weight, root, 4)
    assert solution.gain == 1.0
    assert torch.isfinite(solution.A).all()
    assert not (solution.B @ solution.A).any()
