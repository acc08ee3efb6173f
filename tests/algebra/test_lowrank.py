"""Both ways to a low-rank approximation at every rank, against float64 singular values scanned over t."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from mapconv.algebra import lowrank
from mapconv.algebra.lowrank import best_low_rank, least_rank
from mapconv.algebra.pencil import DensePencil, residual_norm
from mapconv.algebra.randomized import OVERSAMPLING
from tests.algebra.test_moments import accumulated, inputs

SPECTRA = ["steep", "flat", "noisy"]
SHAPES = [(40, 28), (26, 48)]


def matrices(spectrum: str, shape: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(S, W) in float32: S has the spectrum, and a part along W that the best t takes away."""
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=draw)
    U, _, V = torch.linalg.svd(torch.randn(shape, generator=draw).double(), full_matrices=False)
    count = min(shape)
    values = {
        "steep": 10 ** -(torch.arange(count).double() / 3),
        "flat": torch.ones(count).double(),
        "noisy": torch.cat(
            [torch.tensor([3.0, 2.0, 1.5]), 0.1 + 0.02 * torch.rand(count - 3, generator=draw)]
        ).double(),
    }[spectrum]
    return ((U * values) @ V).float() + 0.02 * W, W


@lru_cache
def oracle(spectrum: str, shape: tuple[int, int], shift: float | None) -> torch.Tensor:
    return optima(*matrices(spectrum, shape), shift)


def optima(S: torch.Tensor, W: torch.Tensor, t: float | None) -> torch.Tensor:
    """The least error at every rank 1 … min(n, m): of a given t, or of any in a grid that narrows around each best."""
    S, W = S.double(), W.double()

    def errors(grid: torch.Tensor) -> torch.Tensor:
        values = torch.linalg.svdvals(S - grid[:, None, None] * W).square()
        return values.flip(1).cumsum(1).flip(1)[:, 1:]

    if t is not None:
        return torch.cat([errors(torch.tensor([t]).double())[0], torch.zeros(1)]).sqrt()
    grid = torch.linspace(-0.2, 0.2, 161).double()
    coarse = errors(grid)
    best = coarse.amin(0)
    for middle in grid[coarse.argmin(0)].unique().tolist():
        best = torch.minimum(best, errors(torch.linspace(middle - 2.5e-3, middle + 2.5e-3, 41).double()).amin(0))
    return torch.cat([best, torch.zeros(1)]).sqrt()


@pytest.fixture(params=["randomized", "dense", "sure"])
def way(request, monkeypatch):
    """The randomized way; the dense one, which tries float32 first; and the one for a problem that is solved again."""
    monkeypatch.setattr(lowrank, "prefers_dense", lambda *_: request.param == "dense")
    return request.param


def ranks(way: str, shape: tuple[int, int]) -> range:
    """Every rank that goes this way."""
    return range(1, min(shape) // 2 - OVERSAMPLING if way == "randomized" else min(shape) + 1)


def check(way: str, spectrum: str, shape: tuple[int, int], shift: float | None, tried) -> None:
    """Ranks ``tried`` are within 1 % of the optimum, and the solver's own error is the measured one."""
    S, W = matrices(spectrum, shape)
    best, pencil = oracle(spectrum, shape, shift), DensePencil(S, W)
    for rank in tried:
        solution = best_low_rank(pencil, rank, shift=shift, dense=way == "sure")
        error = residual_norm(pencil, solution.shift, solution.left, solution.right, torch.float64)
        # Factors in float32: their product is off by about 2⁻²⁴ of itself.
        floor = 2**-23 * float(S.norm())
        assert error <= 1.01 * float(best[rank - 1]) + floor, rank
        # The solver's square is of float32 products, at worst: the bound of refit.agrees for 48 terms.
        allowed = 2 * (48 * 48) ** 0.5 * 2**-24 * float(S.norm() + abs(solution.shift) * W.norm()) ** 2
        assert abs(solution.squared_error - error**2) <= allowed, rank


@pytest.mark.parametrize("shift", [None, 0.0, 0.02])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_every_rank_is_within_one_percent_of_the_optimum(spectrum, shape, shift, way):
    check(way, spectrum, shape, shift, ranks(way, shape))


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_that_grew_unequally_leave_valleys_and_the_lowest_is_found(seed):
    """As a DoRA's do, where a rank leaves few rows over: which of them are closest to one growth is a matter of t."""
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(80, 96, generator=draw)
    growth = 0.02 * torch.randn(80, generator=draw).double()
    thin = 0.01 * torch.randn(80, 4, generator=draw) @ torch.randn(4, 96, generator=draw)
    S = (growth[:, None] * W + thin).float()
    grid = torch.linspace(-0.08, 0.08, 1281).double()
    grams = [one.double() @ two.double().T for one, two in ((S, S), (S, W), (W, W))]
    turned = grams[0] - grid[:, None, None] * (grams[1] + grams[1].T) + (grid**2)[:, None, None] * grams[2]
    best = torch.linalg.eigvalsh(turned).clamp_min(0).cumsum(1).amin(0).sqrt()
    for rank in (*range(20, 80, 3), 78):
        solution = best_low_rank(DensePencil(S, W), rank, dense=True)
        error = residual_norm(DensePencil(S, W), solution.shift, solution.left, solution.right, torch.float64)
        assert error <= 1.01 * float(best[79 - rank]), rank


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_two_threads_are_as_good_as_one(spectrum, way):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check(way, spectrum, SHAPES[0], None, ranks(way, SHAPES[0])[2::12])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_factors_in_bfloat16_add_their_rounding_and_no_more(spectrum, way):
    S, W = matrices(spectrum, SHAPES[0])
    best, pencil = oracle(spectrum, SHAPES[0], None), DensePencil(S, W)
    for rank in ranks(way, SHAPES[0])[::3]:
        solution = best_low_rank(pencil, rank, dense=way == "sure")
        left, right = solution.left.bfloat16(), solution.right.bfloat16()
        error = residual_norm(pencil, solution.shift, left, right, torch.float64)
        # Two factors, each off by at most 2⁻⁹ of its values.
        rounding = 2 * 2**-9 * float(solution.left.norm() * solution.right.norm())
        assert error <= 1.01 * float(best[rank - 1]) + rounding, rank


@pytest.mark.parametrize("statistics", ["full", "diagonal"])
def test_every_rank_seen_through_inputs(statistics, way):
    (S, W), root = matrices("noisy", (40, 28)), accumulated(inputs(200, 28), statistics).root()
    S, W = root.multiply(S), root.multiply(W)
    best = optima(S, W, None)
    pencil = DensePencil(S, W)
    for rank in ranks(way, (40, 28)):
        solution = best_low_rank(pencil, rank, dense=way == "sure")
        error = residual_norm(pencil, solution.shift, solution.left, solution.right, torch.float64)
        assert error <= 1.01 * float(best[rank - 1]) + 2**-23 * float(S.norm()), rank


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_matrix_without_a_base(spectrum, way):
    S, _ = matrices(spectrum, SHAPES[1])
    best = optima(S, torch.zeros_like(S), 0.0)
    for rank in ranks(way, SHAPES[1]):
        solution = best_low_rank(DensePencil(S), rank, dense=way == "sure")
        assert solution.shift == 0.0
        error = float((S.double() - solution.left.double() @ solution.right.double()).norm())
        assert error <= 1.01 * float(best[rank - 1]) + 2**-23 * float(S.norm()), rank


@pytest.mark.parametrize("shift", [None, 0.0])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_least_rank_of_every_tolerance_is_within_one(spectrum, shift, way):
    S, W = matrices(spectrum, SHAPES[1])
    best = oracle(spectrum, SHAPES[1], shift)
    for tolerance in (0.9, 0.5, 0.2, 0.1, 0.05, 0.02):
        allowed = tolerance**2 * float(S.double().square().sum())
        rank, spectrum_, decomposition = least_rank(
            DensePencil(S, W), allowed, 99, first=2, shift=shift, dense=way == "sure"
        )
        optimum = 1 + int((best.square() > allowed).sum())
        assert optimum <= rank <= optimum + 1
        solution = decomposition.cut(spectrum_, rank)
        assert solution.squared_error <= allowed * (1 + 1e-6) or rank == 26


def test_one_decomposition_serves_a_whole_search(monkeypatch):
    """A search for a tolerance must not solve for one rank after another."""
    made = []
    build = lowrank.Dense

    def counting(*arguments, **options):
        made.append(1)
        return build(*arguments, **options)

    monkeypatch.setattr(lowrank, "Dense", counting)
    S, W = matrices("flat", (40, 28))
    rank, _, _ = least_rank(DensePencil(S, W), 0.3 * float(S.norm()) ** 2, 28, first=1)
    assert 12 <= rank <= 27
    assert len(made) == 1


def test_both_factors_come_from_one_basis_when_the_iteration_ends_at_its_limit(monkeypatch):
    """An iteration that does not settle must not mix the last basis with products of the one before."""
    from mapconv.algebra import randomized
    from mapconv.algebra.randomized import Sketch

    monkeypatch.setattr(randomized._Falls, "ended", False)
    for limit in (1, 2):
        monkeypatch.setattr(randomized, "MAX_BLOCKS", limit)
        S, W = matrices("noisy", (40, 30))
        pencil = DensePencil(S, W)
        sketch = Sketch(pencil, 5)
        assert not sketch.settled
        solution = sketch.cut(sketch.spectrum, 5)
        error = residual_norm(pencil, solution.shift, solution.left, solution.right, torch.float64)
        assert error == pytest.approx(solution.squared_error**0.5, rel=1e-4)


@pytest.mark.parametrize(("seed", "left"), [(0, 1), (4, 2)])
def test_what_is_left_of_many_rows_that_grew_alike_is_the_least(seed, left):
    """Each row's growth is a valley of its own, far narrower than the range that they lie in."""
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(70, 90, generator=draw)
    moved = torch.randn(70, 4, generator=draw) @ torch.randn(4, 90, generator=draw)
    S = (1 + 0.05 * torch.randn(70, 1, generator=draw)) * (W + 0.05 * moved) - W
    s, w = S.double(), W.double()
    cross = s @ w.T

    def left_over(grid: torch.Tensor) -> torch.Tensor:
        at = grid[:, None, None]
        grams = s @ s.T - at * (cross + cross.T) + at.square() * (w @ w.T)
        return torch.linalg.eigvalsh(grams)[:, :left].clamp_min(0).sum(1)

    grid = torch.linspace(-0.2, 0.2, 801).double()
    lowest = grid[left_over(grid).topk(4, largest=False).indices]
    best = min(float(left_over(torch.linspace(t - 5e-4, t + 5e-4, 41).double()).min()) for t in lowest.tolist())
    pencil = DensePencil(S, W)
    solution = best_low_rank(pencil, 70 - left)
    error = residual_norm(pencil, solution.shift, solution.left, solution.right, torch.float64)
    assert error <= 1.01 * best**0.5
