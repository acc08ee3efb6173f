"""TIES and DARE by blocks against their definitions on whole matrices; products of thin factors against dense SVDs."""

from __future__ import annotations

import pytest
import torch

from mapconv.algebra.mixing import dropped, elected, random_key, threshold, trimmed
from mapconv.algebra.stacked import decompose, difference_norm


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.999, 1.0])
def test_the_threshold_is_the_exact_quantile(density: float) -> None:
    matrix = draw(70, 50) * 10.0 ** torch.randint(-6, 3, (70, 50), generator=torch.Generator().manual_seed(1))
    wanted = int(density * matrix.numel())
    least = threshold(lambda: iter(matrix.split(7)), density, matrix.numel())
    assert least == float(matrix.abs().flatten().topk(wanted).values[-1])
    assert int((trimmed(matrix, least) != 0).sum()) == wanted
    assert threshold(lambda: iter(matrix.split(7)), 1e-6, matrix.numel()) == float("inf")


def test_what_is_dropped_depends_on_nothing_but_the_elements_number() -> None:
    matrix, key = draw(40, 30), random_key(0, "adapter", "layer")
    whole = dropped(matrix, 0.3, key, 0)
    assert torch.equal(whole, torch.cat([dropped(matrix[i : i + 7], 0.3, key, 30 * i) for i in range(0, 40, 7)]))
    kept = whole != 0
    assert torch.equal(whole[kept], (matrix / 0.3)[kept])
    # Four standard deviations of a binomial share.
    assert abs(float(kept.float().mean()) - 0.3) < 4 * (0.3 * 0.7 / matrix.numel()) ** 0.5
    assert not torch.equal(kept, dropped(matrix, 0.3, random_key(1, "adapter", "layer"), 0) != 0)
    assert torch.equal(dropped(matrix, 1.0, key, 0), matrix)


def test_elected_is_the_papers_disjoint_mean() -> None:
    changes = [draw(9, 8, seed=seed) * (draw(9, 8, seed=seed + 9) > 0) for seed in range(4)]
    stack = torch.stack(changes)
    for i in range(9):
        for j in range(8):
            values = stack[:, i, j]
            sign = 1.0 if values.sum() >= 0 else -1.0
            agreeing = values[values.sign() == sign]
            assert float(elected(changes)[i, j]) == pytest.approx(float(agreeing.mean()) if len(agreeing) else 0.0)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_a_product_is_cut_as_its_singular_values_say(rank: int) -> None:
    B, A = draw(60, 12, seed=1).double(), draw(12, 40, seed=2).double()
    A[3] *= 1e4
    B[:, 3] /= 3e3
    values = torch.linalg.svdvals(B @ A)
    found = decompose(B, A)
    assert torch.allclose(found.values, values[:12], rtol=1e-6)
    left, right = found.cut(B, A, rank)
    error = difference_norm(B, A, left, right)
    assert error == pytest.approx(float(values[rank:].square().sum()) ** 0.5, rel=1e-5, abs=1e-6 * float(values[0]))
    tail = float(values[rank:].square().sum() / values.square().sum()) ** 0.5
    assert found.least_rank(tail + 1e-6, 12) == rank


def test_dependent_and_empty_factors() -> None:
    B, A = draw(30, 4, seed=1), draw(4, 20, seed=2)
    twice = decompose(torch.cat([B, B], dim=1), torch.cat([A, A]))
    assert twice.rank == 4
    left, right = twice.cut(torch.cat([B, B], dim=1), torch.cat([A, A]), 8)
    assert left.shape == (30, 4)
    assert torch.allclose(left @ right, 2 * B @ A, atol=1e-5)
    nothing = decompose(torch.zeros(30, 4), A)
    assert nothing.rank == 0
    assert not nothing.cut(B, A, 2)[0].any()
    assert decompose(B, A).least_rank(1e-3, 2) == 2
