"""Merged rows and upgraded factors for random shapes, sizes and gains, against float64."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mapconv.algebra.dora import merge_rows_
from mapconv.algebra.norms import product_norm
from mapconv.algebra.refit import refit, relative_error
from tests import examples
from tests.algebra.weights import Dense, random_weight

FAST = settings(max_examples=examples(150), deadline=None)
UNIT = 2**-24  # half an ulp of a float32 in [1, 2)


@st.composite
def weights(draw) -> Dense:
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    return random_weight(
        height,
        width,
        draw(st.integers(1, 8)),
        update=draw(st.floats(1e-4, 10)),
        spread=draw(st.none() | st.floats(0, 0.5)),
        seed=draw(st.integers(0, 2**31)),
    )


@FAST
@given(weight=weights(), gains=st.tuples(st.floats(-2, 2), st.floats(-2, 2)))
def test_merged_rows(weight, gains):
    a, b = gains
    update = weight.B.double() @ weight.A.double() if weight.magnitude is None else weight.change
    dense = a * weight.base.double() + b * update
    rows = merge_rows_(weight.base.clone(), weight.A, weight.B, base_gain=a, update_gain=b, magnitude=weight.magnitude)
    # Each element is a sum of r + 1 products, rounded r + 1 times, then scaled, and added to a·W0: r + 5 roundings of
    # at most UNIT each, of terms that together are no longer than this.
    terms = weight.B.abs().double() @ weight.A.abs().double() + weight.base.abs().double()
    if weight.magnitude is not None:
        norms = (weight.base.double() + weight.B.double() @ weight.A.double()).norm(dim=1)
        terms *= 1 + (weight.magnitude.double().abs() / norms)[:, None]
    allowed = (weight.A.shape[0] + 5) * UNIT * (abs(a) + abs(b) + abs(a - b)) * terms
    assert bool(((rows - dense).abs() <= allowed + 1e-30).all())


@FAST
@given(weight=weights(), rank=st.integers(1, 50))
def test_a_refit_never_loses_to_doing_nothing_and_its_certificate_is_true(weight, rank):
    operator = weight.operator
    solution = refit(operator, rank)
    dense = weight.target - solution.gain * weight.base.double() - solution.B.double() @ solution.A.double()
    change, base = float(weight.change.norm()), float(weight.base.double().norm())
    # The operator's products are float32 sums of up to 40 terms: of the base, and of the products in BA, which may
    # cancel to an update far shorter than they are.
    terms = float((weight.B.abs().double() @ weight.A.abs().double()).norm())
    noise = 40 * UNIT * (base + change + terms)
    assert float(dense.norm()) <= change + noise
    certified = relative_error(operator, solution.gain, solution.B, solution.A) * operator.update_norm
    assert certified == pytest.approx(float(dense.norm()), abs=noise)
    if weight.magnitude is None and rank >= weight.A.shape[0]:
        assert solution.gain == 1.0
        assert float(dense.norm()) <= noise


@FAST
@given(weight=weights(), scale=st.floats(1e-18, 1e18))
def test_factored_norms_at_any_scale(weight, scale):
    B = (weight.B.double() * scale).float()
    dense = float((B.double() @ weight.A.double()).norm())
    # Gram matrices square the factors' condition: half the digits of float64 at worst.
    scope = float(B.double().norm() * weight.A.double().norm())
    assert product_norm(B, weight.A) == pytest.approx(dense, rel=1e-9, abs=1e-8 * scope)
