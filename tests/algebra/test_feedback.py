"""Rounding with feedback against its definition, and what it may never do."""

from __future__ import annotations

import pytest
import torch

from mapconv.algebra.feedback import BLOCK, Neighbours, neighbours, round_columns_, spread
from mapconv.algebra.moments import InputMoment, InputRoot


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All finite values of a 16-bit dtype, in order, each once."""
    values = torch.arange(-0x8000, 0x8000).to(torch.int16).view(dtype).double()
    return torch.unique(values[torch.isfinite(values)])


def root_of(width: int, count: int = 400) -> InputRoot:
    """Of inputs that go together, as a layer's do."""
    torch.manual_seed(width)
    moment = InputMoment(width, "full")
    shared = max(1, width // 8)
    moment.add(torch.randn(count, shared) @ torch.randn(shared, width) + 0.1 * torch.randn(count, width))
    root = moment.root()
    assert root is not None
    return root


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_neighbours_are_the_two_values_around(dtype):
    grid = every_value(dtype)
    torch.manual_seed(0)
    scales = torch.logspace(-42, 37, 60) if dtype == torch.bfloat16 else torch.logspace(-9, 4.7, 60)
    values = torch.cat([(torch.randn(60, 60) * scales[:, None]).view(-1), grid.float(), torch.zeros(1)])
    values = values[torch.isfinite(values.to(dtype))]
    nearest, other = neighbours(values, dtype)
    assert torch.equal(nearest, values.to(dtype).float())
    low, high = (f(nearest, other).double() for f in (torch.minimum, torch.maximum))
    wanted = values.double()
    below = grid[(torch.searchsorted(grid, wanted, right=True) - 1).clamp_min(0)]
    above = grid[torch.searchsorted(grid, wanted).clamp_max(len(grid) - 1)]
    inside = (wanted >= grid[0]) & (wanted <= grid[-1])
    assert torch.equal(low[inside], below[inside])
    assert torch.equal(high[inside], above[inside])
    assert torch.equal(nearest[~inside], other[~inside])


class Whole:
    """Whole numbers: a grid without bounds, for the definition's sake."""

    group = 3

    def begin(self, start: int, stop: int, values: torch.Tensor) -> None:
        assert start % 3 == 0
        assert len(values) == stop - start

    def round(self, column: int, values: torch.Tensor) -> torch.Tensor:
        return values.round()


@pytest.mark.parametrize("width", [1, 5, BLOCK + 3, 3 * BLOCK])
def test_each_error_is_made_up_for_by_the_columns_that_are_left(width):
    root = root_of(width)
    wanted = 3 * torch.randn(width, 7)
    found = round_columns_(wanted.clone(), spread(root), Whole())
    # The definition: of the columns that are left, the least squares solution given the error of this one.
    P = root.factor.double()
    C, left = P @ P.T, wanted.double()
    for column in reversed(range(width)):
        error = left[column] - left[column].round()
        left[column] = left[column].round()
        if column:
            left[:column] += torch.linalg.solve(C[:column, :column], C[:column, column])[:, None] * error
    # Float32 sums may put a value on the other side of a half; its successors then differ as well.
    same = (found.double() == left).all(0)
    assert same.float().mean() >= 5 / 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_weight_is_further_than_a_step_and_the_outputs_are_closer(dtype):
    width, root = 2 * BLOCK, root_of(2 * BLOCK)
    wanted = 0.02 * torch.randn(width, 50)
    found = round_columns_(wanted.clone(), spread(root), Neighbours(wanted, dtype))
    nearest, other = neighbours(wanted, dtype)
    assert torch.equal(found, found.to(dtype).float())
    assert bool(((found == nearest) | (found == other)).all())
    errors = [float(root.multiply((values - wanted).T).square().sum()) for values in (found, nearest)]
    assert errors[0] < 0.25 * errors[1]


def test_what_is_on_the_grid_stays():
    wanted = torch.randn(BLOCK, 9).bfloat16().float()
    found = round_columns_(wanted.clone(), spread(root_of(BLOCK)), Neighbours(wanted, torch.bfloat16))
    assert torch.equal(found, wanted)
