"""Sharing ranks out: against every other choice, and by the budget."""

from __future__ import annotations

import itertools

import torch

from mapconv.refit.ranks import Spectrum, spread_ranks, squared_singular_values


def spectrum(path, shape, values):
    return Spectrum(path, shape, torch.tensor(values, dtype=torch.float64))


def test_no_other_choice_of_the_same_size_restores_more():
    generator = torch.Generator().manual_seed(0)
    spectra = [
        spectrum(
            name, (4, 4), torch.rand(4, generator=generator, dtype=torch.float64).sort(descending=True)[0].tolist()
        )
        for name in "abc"
    ]

    def restored(ranks):
        return sum(item.shares[: ranks[item.path]].sum().item() for item in spectra)

    found = spread_ranks(spectra, 2)
    others = (dict(zip("abc", ranks, strict=True)) for ranks in itertools.product(range(1, 5), repeat=3))
    best = max(restored(ranks) for ranks in others if sum(ranks.values()) <= 6)
    assert sum(found.values()) == 6
    assert abs(restored(found) - best) < 1e-12


def test_rank_goes_by_what_it_costs():
    """Equal worth: the smaller layer gets it. And nothing beyond a layer's own size is spent."""
    spectra = [spectrum("wide", (30, 30), [1, 0.5, 0.5, 0.5]), spectrum("small", (2, 2), [1, 0.5])]
    ranks = spread_ranks(spectra, 2)
    assert ranks == {"wide": 2, "small": 2}
    assert spread_ranks(spectra, 1) == {"wide": 1, "small": 1}


def test_squared_singular_values():
    matrix = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    wanted = torch.linalg.svdvals(matrix.double()) ** 2
    # Float32 sums of 9 products err by about 1e-6 of the largest value, which is about 20.
    for each in (matrix, matrix.T):
        torch.testing.assert_close(squared_singular_values(each), wanted, rtol=1e-5, atol=1e-5)
