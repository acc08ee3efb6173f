"""A fingerprint adds up over blocks of any size, and sees what a norm does not."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mapconv.algebra.fingerprint import (
    Fingerprint,
    block_fingerprint,
    column_numbers,
    matrix_fingerprint,
    row_numbers,
)

#: Float64 sums of N terms, each at most √3·√3 of an entry: N·2⁻⁵³ of the sum of the terms' sizes bounds their rounding.
ROUNDING = 2.0**-53


def splitmix64(seed: int, index: int) -> int:
    """The generator's published definition, on Python's integers."""
    mask = (1 << 64) - 1
    value = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


@pytest.mark.parametrize(("numbers", "seed"), [(row_numbers, b"map-rows"), (column_numbers, b"map-cols")])
def test_the_numbers_are_those_of_the_definition(numbers, seed):
    seed = int.from_bytes(seed, "big")
    wanted = [(2 * ((splitmix64(seed, index) >> 11) * 2.0**-53) - 1) * 3**0.5 for index in range(500)]
    assert numbers(500).tolist() == wanted
    assert torch.equal(numbers(20_000)[:500], numbers(500))
    # Of N numbers of variance 1 the mean is 1/√N from 0; the kurtosis of a uniform law makes the variance 0.9/√N.
    assert abs(float(numbers(20_000).mean())) < 4 / 20_000**0.5
    assert abs(float(numbers(20_000).var()) - 1) < 4 * 0.9 / 20_000**0.5
    assert abs(float(row_numbers(20_000) @ column_numbers(20_000))) < 4 * 20_000**0.5


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    cuts=st.lists(st.integers(1, 39)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    transposed=st.booleans(),
)
def test_blocks_of_any_size_make_one_fingerprint(shape, cuts, dtype, transposed):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    u, v = row_numbers(shape[0]), column_numbers(shape[1])
    wanted = Fingerprint(float(matrix.double().square().sum()), float(u @ matrix.double() @ v))
    stored, left, right = (matrix.t().contiguous(), v, u) if transposed else (matrix, u, v)
    edges = sorted({0, stored.shape[0], *(cut for cut in cuts if cut < stored.shape[0])})
    buffer = torch.empty(matrix.numel(), dtype=torch.float64)
    parts = [
        block_fingerprint(stored[start:stop], left[start:stop], right, buffer)
        for start, stop in itertools.pairwise(edges)
    ]
    size = matrix.numel() * ROUNDING
    for found in (sum(parts, Fingerprint()), matrix_fingerprint(stored.t() if transposed else stored)):
        assert abs(found.square - wanted.square) <= size * wanted.square
        assert abs(found.projection - wanted.projection) <= 3 * size * float(matrix.double().abs().sum())


def changed(how: str, matrix: torch.Tensor) -> torch.Tensor:
    other = matrix.clone()
    if how == "negated":
        return -matrix
    if how == "one sign":
        other[3, 5] *= -1
    if how == "rows":
        other[[3, 17]] = matrix[[17, 3]]
    if how == "columns":
        other[:, [3, 17]] = matrix[:, [17, 3]]
    if how == "one entry moved":
        other[3, 5], other[17, 31] = matrix[17, 31], matrix[3, 5]
    return matrix.t() if how == "transposed" else other


@pytest.mark.parametrize("how", ["negated", "one sign", "rows", "columns", "one entry moved", "transposed"])
def test_what_the_norm_does_not_see(how):
    """Each change shows at about its own size: a hundredth of it is missed once in a hundred seeds."""
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    other = changed(how, matrix)
    before, after = matrix_fingerprint(matrix), matrix_fingerprint(other)
    assert abs(after.norm - before.norm) < 1e-12 * before.norm
    assert abs(after.projection - before.projection) > 0.01 * float((other - matrix).norm())
