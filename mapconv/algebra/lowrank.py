"""The best low-rank approximation of a pencil E(t) = S − t·W, at a rank or for an error: one door to two ways.

``randomized`` reads the matrix a few times and costs in proportion to the rank: for large matrices and thin ranks.
``dense`` costs the same for every rank and serves all of them: for small matrices and ranks that are a good part of the
spectrum. Which one is cheaper is a matter of shape, rank and the measured cost of each step.
"""

from __future__ import annotations

import torch

from mapconv.algebra.dense import Dense
from mapconv.algebra.gram import Spectrum
from mapconv.algebra.pencil import LowRank, Pencil
from mapconv.algebra.randomized import OVERSAMPLING, Sketch, block_columns

Decomposition = Sketch | Dense

# Seconds of one core, fitted to CPU times of both ways on a trained DoRA's weights of 192 × 576, 576 × 576 and
# 1536 × 576 at ranks 1 to 128, and on 4096 × 14336 at ranks 16 and 128. What matters is the ratios.
#: A product with a thin block, for each element of the matrix: reading it, and one column's multiplication.
READ, MULTIPLY = 1.4e-9, 0.03e-9
#: Keeping the basis orthonormal and its Gram matrices up to date, for each of their rows and pairs of columns.
ORTHONORMALIZE = 0.5e-9
#: A float32 multiplication in a Gram matrix, and everything around one eigendecomposition, for each of its n³.
GRAM, EIGEN = 0.025e-9, 0.3e-9
#: The search for t on a basis of l columns, for each of its l³.
SEARCH = 1.5e-9
#: Blocks of the one, without and with directions for all of the rank, and eigendecompositions of the other.
BLOCKS, FEW_BLOCKS, DECOMPOSITIONS = 6, 2, 1.3


def best_low_rank(
    pencil: Pencil, rank: int, *, shift: float | None = None, seed: int = 0, dense: bool = False
) -> LowRank:
    """Minimise ‖E(t) − R‖² over R of rank ``rank`` at most, and over t unless ``shift`` fixes it.

    Args:
        pencil: the matrices.
        rank: wanted rank k ≥ 1; cut down to min(n, m).
        shift: a fixed t; None searches for the best one.
        seed: of the random part of the first basis. Equal seeds give equal results.
        dense: take the dense way whatever it costs.

    Returns:
        factors of shapes (n, k) and (k, m), with the singular values split evenly between them.
    """
    rank = min(rank, *pencil.shape)
    if rank == min(pencil.shape) and shift is None:
        shift = 0.0  # no t leaves anything over, so rounding alone would choose one
    if not dense and is_randomized(pencil.shape, rank, _known(pencil)):
        sketch = Sketch(pencil, rank, t=shift, seed=seed, one_rank=True)
        if sketch.settled:
            return sketch.cut(sketch.spectrum, rank)
    # Beyond half of the rank little is left over, and t is searched for at many places: once, then, and surely.
    for dtype in _precisions(dense or 2 * rank > min(pencil.shape)):
        decomposition = Dense(pencil, t=shift, dtype=dtype)
        spectrum = decomposition.solve(rank)
        if decomposition.is_fine(spectrum, rank):
            break
    return decomposition.cut(spectrum, rank)


def least_rank(
    pencil: Pencil,
    allowed: float,
    max_rank: int,
    *,
    first: int,
    shift: float | None = None,
    seed: int = 0,
    dense: bool = False,
) -> tuple[int, Spectrum, Decomposition]:
    """The least rank whose squared error can be ``allowed`` or less, or ``max_rank``; one decomposition serves for all.

    Args:
        first: the rank that the randomized way tries first; it then doubles it, from the basis that it has.

    Returns:
        the rank, and what ``decomposition.cut(spectrum, k)`` needs to give the approximation of any rank k near it, up
        to ``decomposition.limit``.
    """
    max_rank = min(max_rank, *pencil.shape)
    rank, basis = min(first, max_rank), None
    while not dense and is_randomized(pencil.shape, max_rank, _known(pencil)):
        sketch = Sketch(pencil, rank, t=shift, seed=seed, start=basis)
        if not sketch.settled:
            break
        if rank == max_rank or float(sketch.spectrum.squared_errors[rank]) <= allowed:
            return (*sketch.least_rank(allowed, rank), sketch)
        rank, basis = min(2 * rank, max_rank), sketch.leading(sketch.spectrum, rank)
    for dtype in _precisions(dense):
        decomposition = Dense(pencil, t=shift, dtype=dtype)
        rank, spectrum = decomposition.least_rank(allowed, max_rank)
        if decomposition.is_fine(spectrum, rank):
            break
    return rank, spectrum, decomposition


def _precisions(sure: bool) -> tuple[torch.dtype, ...]:
    """Of Gram matrices, in the order to try them in; float64 always serves."""
    return (torch.float64,) if sure else (torch.float32, torch.float64)


def is_randomized(shape: tuple[int, int], rank: int, known: int) -> bool:
    """Whether the randomized way is tried first, for a pencil with ``known`` directions.

    A rank of about half of the matrix leaves no room for a second block.
    """
    return 2 * (rank + OVERSAMPLING) < min(shape) and not prefers_dense(shape, rank, known)


def prefers_dense(shape: tuple[int, int], rank: int, known: int) -> bool:
    """Whether the dense way is expected to be the cheaper one."""
    height, width = shape
    side, columns, blocks = min(shape), block_columns(shape, rank, known), FEW_BLOCKS if rank <= known else BLOCKS
    dense = 3 * GRAM * height * width * side + DECOMPOSITIONS * EIGEN * side**3
    randomized = 2 * blocks * height * width * (READ + MULTIPLY * columns)
    for size in range(columns, blocks * columns + 1, columns):
        randomized += ORTHONORMALIZE * (height + width) * size * columns + SEARCH * size**3
    return dense <= randomized


def _known(pencil: Pencil) -> int:
    return 0 if pencil.directions is None else pencil.directions.shape[1]
