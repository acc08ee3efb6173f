"""The adapted weight as an operator and as merged rows, against dense float64."""

from __future__ import annotations

import pytest
import torch

from mapconv.algebra.dora import merge_rows_, row_scales
from mapconv.algebra.pencil import residual_norm
from tests.algebra.weights import random_weight

CASES = [(None, 0.3), (0.1, 0.3), (0.1, 0.01), (0.5, 1.0), (0.01, 0.001)]


@pytest.fixture(params=CASES, ids=lambda case: f"spread {case[0]}, update {case[1]}")
def weight(request):
    spread, update = request.param
    return random_weight(spread=spread, update=update)


def test_norms(weight):
    operator, change = weight.operator, weight.change
    assert operator.base_norm == pytest.approx(float(weight.base.double().norm()), rel=1e-12)
    # Row norms come from float32 rows: 2^-24 of the base, in proportion to a change that may be far smaller.
    allowed = 2**-24 * operator.base_norm / float(change.norm())
    assert operator.update_norm == pytest.approx(float(change.norm()), rel=4 * allowed)


def test_products_from_both_sides(weight):
    operator, change, base = weight.operator, weight.change, weight.base.double()
    draw = torch.Generator().manual_seed(1)
    V, Q = torch.randn(40, 5, generator=draw), torch.randn(60, 5, generator=draw)
    change_V, base_V = operator.products(V)
    # Sums of at most 60 float32 products, errors in all directions: √60 · 2^-24 of the factors' norms, doubled.
    noise = 2 * 60**0.5 * 2**-24 * float(base.norm())
    assert float((change_V - change @ V.double()).norm()) <= noise * float(V.norm())
    assert float((base_V - base @ V.double()).norm()) <= noise * float(V.norm())
    for t in (0.0, 0.03, -0.5):
        product = operator.transposed_product(Q, t)
        assert float((product - (change - t * base).T @ Q.double()).norm()) <= noise * float(Q.norm())


def test_certificate_is_the_dense_error(weight):
    other = random_weight(seed=3, update=0.2)
    for gain in (1.0, 0.9, -0.2):
        dense = weight.target - gain * weight.base.double() - other.B.double() @ other.A.double()
        assert residual_norm(weight.operator, gain - 1, other.B, other.A) == pytest.approx(
            float(dense.norm()), rel=1e-5
        )


def test_row_norms_of_an_approximation(weight):
    other = random_weight(seed=3, update=0.2)
    dense = weight.base.double() + other.B.double() @ other.A.double()
    torch.testing.assert_close(
        weight.operator.approximation_row_norms(other.B, other.A), dense.norm(dim=1), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("gains", [(1.0, 1.0), (0.9, 0.9), (0.9, 1.1), (0.0, 1.0), (1.0, 0.0)])
def test_merged_rows(gains, weight):
    """W' = a·W0 + b·BA, or with a magnitude a·W0 + b·(T − W0)."""
    a, b = gains
    if weight.magnitude is None:
        dense = a * weight.base.double() + b * (weight.B.double() @ weight.A.double())
    else:
        dense = a * weight.base.double() + b * weight.change
    rows = merge_rows_(weight.base.clone(), weight.A, weight.B, base_gain=a, update_gain=b, magnitude=weight.magnitude)
    # Half a dozen float32 roundings of numbers as large as a weight.
    assert float((rows - dense).norm()) <= 6 * 2**-24 * float(weight.target.norm())


def test_blocks_of_any_size_give_the_same_rows(weight):
    whole = merge_rows_(weight.base.clone(), weight.A, weight.B, magnitude=weight.magnitude)
    for size in (1, 7, 59):
        for start in range(0, 60, size):
            part = slice(start, min(start + size, 60))
            magnitude = None if weight.magnitude is None else weight.magnitude[part]
            rows = merge_rows_(weight.base[part].clone(), weight.A, weight.B[part], magnitude=magnitude)
            torch.testing.assert_close(rows, whole[part], rtol=2**-22, atol=2**-24)


def test_a_row_of_zeros_stays_one():
    rows = merge_rows_(torch.zeros(2, 3), torch.ones(1, 3), torch.zeros(2, 1), magnitude=torch.ones(2))
    assert torch.equal(rows, torch.zeros(2, 3))
    assert torch.equal(row_scales(torch.ones(2), torch.tensor([0.0, 2.0]).double()), torch.tensor([0, 0.5]).double())
