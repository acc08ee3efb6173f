"""Reduced-rank regression against its dense float64 solution."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mapconv.algebra.lowrank import best_low_rank
from mapconv.algebra.moments import DAMPING
from mapconv.algebra.randomized import OVERSAMPLING
from mapconv.algebra.regression import PairedMoment

N, M, TOKENS = 24, 16, 400


@pytest.fixture
def problem():
    """T, W, and correlated inputs x and x̃ = x + noise of its own covariance."""
    draw = torch.Generator().manual_seed(5)
    mixing = torch.randn(M, M, generator=draw) * torch.linspace(0.2, 2, M)
    wanted = torch.randn(TOKENS, M, generator=draw) @ mixing
    made = wanted + 0.3 * torch.randn(TOKENS, M, generator=draw) @ torch.randn(M, M, generator=draw)
    T = torch.randn(N, M, generator=draw)
    return T, T + 0.2 * torch.randn(N, M, generator=draw), wanted, made


def moments(wanted, made):
    """C and S in float64, scaled and damped as the module says."""
    C, S = made.double().T @ made.double(), wanted.double().T @ made.double()
    mean = C.diagonal().mean()
    damping = DAMPING * torch.eye(M, dtype=torch.float64)
    return C / mean + damping, S / mean + damping


def objective(T, W, R, C, S):
    """What R leaves of the part that it can reach: ‖(T·S − (W + R)·C)·C^{−1/2}‖."""
    values, vectors = torch.linalg.eigh(C)
    root = vectors @ (values.rsqrt()[:, None] * vectors.T)
    return float((((T.double() @ S) - (W.double() + R) @ C) @ root).norm())


@pytest.mark.parametrize("rank", [1, 4, 12, 16])
def test_the_solution_is_that_of_dense_float64(problem, rank):
    T, W, wanted, made = problem
    moment = PairedMoment(M)
    for part in (slice(0, 150), slice(150, None)):
        moment.add(wanted[None, part], made[None, part])
    inputs = moment.inputs()
    found = best_low_rank(inputs.pencil(T - W, W, gains=False, rank=2), rank, shift=0.0)
    R = found.left.double() @ inputs.root.divide(found.right.float()).double()
    C, S = moments(wanted, made)
    values, vectors = torch.linalg.eigh(C)
    root = vectors @ (values.rsqrt()[:, None] * vectors.T)
    U, s, V = torch.linalg.svd((T.double() @ S - W.double() @ C) @ root, full_matrices=False)
    best = (U[:, :rank] * s[:rank]) @ V[:rank] @ root
    # At full rank both are rounding: float32 products of values near 10 over 400 tokens.
    assert objective(T, W, R, C, S) <= 1.01 * objective(T, W, best, C, S) + 1e-3


def test_equal_inputs_make_the_weighted_difference(problem):
    T, W, wanted, _ = problem
    moment = PairedMoment(M)
    moment.add(wanted, wanted)
    inputs = moment.inputs()
    expected = inputs.root.multiply(T - W)
    # Both sides in float32; solving with P loses what its condition number says.
    condition = float(torch.linalg.cond(inputs.root.factor.double()))
    rounding = 1e-6 * condition * float(expected.abs().max())
    torch.testing.assert_close(inputs.pencil(T - W, W, gains=False, rank=2).S, expected, rtol=0, atol=rounding)


def test_the_gain_is_found_where_it_is_free(problem):
    T, _, wanted, _ = problem
    moment = PairedMoment(M)
    moment.add(wanted, wanted)
    found = best_low_rank(moment.inputs().pencil(T - T / 1.25, T / 1.25, gains=True, rank=2), 2)
    assert found.shift == pytest.approx(0.25, abs=1e-3)


def test_nothing_seen_is_nothing_known():
    assert PairedMoment(M).inputs() is None
    moment = PairedMoment(M)
    moment.add(torch.zeros(5, M), torch.zeros(5, M))
    assert moment.inputs() is None


@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_solver_is_told_where_the_inputs_are_large(problem, crossed, rank):
    """Nearly all that the leading singular vectors of P hold of it lies in the directions, which are but a start."""
    T, W, wanted, made = problem
    moment = PairedMoment(M)
    moment.add(wanted, made)
    inputs = moment.inputs() if crossed else replace(moment.inputs(), cross=None)
    directions = inputs.pencil(T - W, W, gains=False, rank=rank).directions
    assert directions.shape == (M, min(rank + OVERSAMPLING, N, M))
    P = inputs.root.factor.double()
    held = (P @ torch.linalg.qr(directions.double()).Q).square().sum()
    assert held >= 0.99 * torch.linalg.svdvals(P).square()[: directions.shape[1]].sum()


def test_outputs_of_a_layer_tell_as_much_as_its_inputs(problem):
    """E[T·x x̃ᵀ] + λT is T·S: the two ways give one problem, but for the rounding of solving with P."""
    T, W, wanted, made = problem
    seen = []
    for values, of_outputs in ((wanted, False), (wanted @ T.T, True)):
        moment = PairedMoment(M, of_outputs=of_outputs)
        moment.add(values, made)
        inputs = moment.inputs()
        seen.append(inputs.pencil(T - W, W, gains=False, rank=2).S)
    # Sums of TOKENS and of M float32 products, off by the root of their number in roundings; solving with P amplifies.
    condition = float(torch.linalg.cond(inputs.root.factor.double()))
    rounding = (TOKENS**0.5 + M**0.5) * 2.0**-24 * condition * float(seen[0].abs().max())
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=rounding)
