"""Second moments of inputs against float64, and what their root promises."""

from __future__ import annotations

import pytest
import torch

from mapconv.algebra.moments import DAMPING, InputMoment, InputRoot


def inputs(count: int = 300, width: int = 24, seed: int = 0) -> torch.Tensor:
    """Correlated inputs whose scales span two orders of magnitude."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=draw)
    return torch.randn(count, width, generator=draw) @ mixing * torch.logspace(0, -2, width)


def accumulated(rows: torch.Tensor, statistics: str) -> InputMoment:
    moment = InputMoment(rows.shape[-1], statistics)
    for part in rows.split(70):
        moment.add(part[None])
    return moment


def wanted(rows: torch.Tensor) -> torch.Tensor:
    """C scaled to a mean diagonal of one, with its ridge, in float64."""
    C = rows.double().T @ rows.double()
    return C / C.diagonal().mean() + DAMPING * torch.eye(len(C))


def test_the_root_squared_is_the_moment():
    rows = inputs()
    P = accumulated(rows, "full").root().factor.double()
    # P is rounded to float32, and the products of 70 inputs were summed in it.
    torch.testing.assert_close(P @ P.T, wanted(rows), rtol=0, atol=70 * 2**-24 * float(wanted(rows).max()))
    assert torch.equal(P, P.tril())


def test_the_diagonal_root_is_the_diagonal_of_the_moment():
    rows = inputs()
    P = accumulated(rows, "diagonal").root().factor.double()
    torch.testing.assert_close(P.square(), wanted(rows).diagonal(), rtol=70 * 2**-24, atol=0)


def test_the_weighted_error_is_the_mean_squared_output_error():
    rows = inputs()
    error = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    root = accumulated(rows, "full").root(damping=0.0)
    outputs = rows.double() @ error.double().T
    scale = rows.double().square().mean(0).mean()
    expected = outputs.square().sum(1).mean() / scale
    # Cholesky of a moment whose condition is about 1e6, rounded to float32.
    assert float(root.multiply(error).double().square().sum()) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("statistics", ["full", "diagonal"])
def test_division_undoes_multiplication(statistics):
    root = accumulated(inputs(), statistics).root()
    rows = torch.randn(7, 24, generator=torch.Generator().manual_seed(2))
    condition = float(torch.linalg.cond(root.factor)) if statistics == "full" else 10.0
    torch.testing.assert_close(root.divide(root.multiply(rows)), rows, rtol=0, atol=24 * 2**-24 * condition * 4)


def test_indices_count_as_one_hot_inputs():
    indices = torch.tensor([[0, 2, 2], [2, 3, 0]])
    by_index, by_vector = InputMoment(5, "diagonal"), InputMoment(5, "diagonal")
    by_index.add_indices(indices)
    by_vector.add(torch.nn.functional.one_hot(indices, 5).float())
    assert torch.equal(by_index.root().factor, by_vector.root().factor)
    assert by_index.count == by_vector.count == 6


@pytest.mark.parametrize("statistics", ["full", "diagonal"])
def test_no_inputs_and_inputs_of_zero_have_no_root(statistics):
    assert InputMoment(4, statistics).root() is None
    assert accumulated(torch.zeros(3, 4), statistics).root() is None


def test_directions_that_no_input_showed_can_still_be_divided():
    rows = inputs()
    rows[:, 5] = 0.0
    root = accumulated(rows, "full").root()
    assert torch.isfinite(root.divide(torch.ones(1, 24))).all()


def test_overflow_is_noticed():
    moment = accumulated(torch.full((2, 3), 1e30), "full")
    assert not moment.finite


def test_a_root_moves_to_a_device():
    root = InputRoot(torch.ones(3))
    assert torch.equal(root.to(torch.device("cpu")).factor, root.factor)
