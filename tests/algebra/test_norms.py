"""Factored norms against the same norms of dense float64 matrices."""

from __future__ import annotations

import pytest
import torch

from mapconv.algebra.norms import (
    product_difference_norm,
    product_inner,
    product_norm,
    row_blocks,
    row_squares,
    squared_norm,
)
from tests.algebra.weights import random_weight

# Sums of some thousand float64 products: 1e3 · 2^-53 = 1e-13.
FLOAT64 = 1e-12


@pytest.mark.parametrize("shape", [(1, 1, 1), (60, 40, 4), (3, 200, 8), (200, 3, 3)])
def test_product_norm(shape):
    weight = random_weight(*shape)
    dense = weight.B.double() @ weight.A.double()
    assert product_norm(weight.B, weight.A) == pytest.approx(float(dense.norm()), rel=FLOAT64)


def test_product_inner():
    one, two = random_weight(seed=1), random_weight(rank=7, seed=2)
    dense = (one.B.double() @ one.A.double() * (two.B.double() @ two.A.double())).sum()
    assert product_inner(one.B, one.A, two.B, two.A) == pytest.approx(float(dense), rel=1e-10)


@pytest.mark.parametrize("distance", [1.0, 1e-6, 1e-12])
def test_the_norm_of_a_difference_keeps_its_digits_however_small(distance):
    weight = random_weight()
    A, B = weight.A.double(), weight.B.double()
    other_A, other_B = A + distance * torch.ones_like(A), B - distance * B.sin()
    # Multiplied out, so that the oracle does not subtract near equals either: rounding of the inputs is then all.
    dense = (B - other_B) @ A + other_B @ (A - other_A)
    assert product_difference_norm(B, A, other_B, other_A) == pytest.approx(float(dense.norm()), rel=1e-9)


def test_norms_of_nothing_are_zero():
    assert product_norm(torch.zeros(5, 2), torch.randn(2, 7)) == 0.0
    assert product_difference_norm(torch.ones(5, 2), torch.ones(2, 7), torch.ones(5, 2), torch.ones(2, 7)) == 0.0
    assert product_norm(torch.zeros(5, 0), torch.zeros(0, 7)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_squared_norm_of_any_dtype_with_and_without_a_buffer(dtype):
    values = torch.randn(30, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = float(values.double().square().sum())
    assert squared_norm(values) == pytest.approx(expected, rel=FLOAT64)
    assert squared_norm(values, torch.full((400,), 7.0, dtype=torch.float64)) == pytest.approx(expected, rel=FLOAT64)


def test_squared_norm_does_not_overflow_float32():
    assert squared_norm(torch.full((4,), 1e30)) == pytest.approx(4e60, rel=1e-6)


def test_row_squares_over_several_blocks():
    values = torch.randn(700, 900, generator=torch.Generator().manual_seed(0))
    assert len(list(row_blocks(*values.shape))) > 1
    torch.testing.assert_close(row_squares(values), values.double().square().sum(1), rtol=FLOAT64, atol=0)


@pytest.mark.parametrize(("rows", "width", "elements"), [(10, 3, 7), (1, 100, 7), (7, 7, 49), (0, 5, 10), (5, 0, 10)])
def test_row_blocks_cover_each_row_once(rows, width, elements):
    blocks = list(row_blocks(rows, width, elements))
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(rows))
    # One row is the least a block can be; otherwise it stays within its elements.
    assert all(stop - start == 1 or (stop - start) * width <= elements for start, stop in blocks)
