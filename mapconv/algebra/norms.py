"""Frobenius norms and inner products in float64, of plain tensors and of products that are never formed.

Symbols as in the package: A is (r, m), B is (n, r); BA is their (n, m) product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

#: Elements of a row block: small enough that a block in float32 and float64 stays in a core's cache.
BLOCK_ELEMENTS = 1 << 18


def row_blocks(rows: int, width: int, elements: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, int]]:
    """Row ranges (start, stop) of about ``elements`` elements each that cover ``rows`` rows of ``width``."""
    step = max(1, elements // max(1, width))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # One sum tells it for all but values near the largest of their dtype, at a fifth of the cost.
    return math.isfinite(values.sum().item()) or bool(torch.isfinite(values).all())


def product_inner(B1: torch.Tensor, A1: torch.Tensor, B2: torch.Tensor, A2: torch.Tensor) -> float:
    """⟨B1·A1, B2·A2⟩ in O((n+m)·r²), from Gram matrices accumulated in float64."""
    left = B1.double().T @ B2.double()
    right = A1.double() @ A2.double().T
    return float((left * right).sum())


def product_norm(B: torch.Tensor, A: torch.Tensor) -> float:
    """‖BA‖ without the n×m product."""
    wide_B, wide_A = B.double(), A.double()
    # Rounding can take the Gram form of a zero product a hair below zero.
    return max(0.0, product_inner(wide_B, wide_A, wide_B, wide_A)) ** 0.5


def product_difference_norm(B1: torch.Tensor, A1: torch.Tensor, B2: torch.Tensor, A2: torch.Tensor) -> float:
    """‖B1·A1 − B2·A2‖ for factors of equal shape that are close to each other.

    Written as (B1−B2)·A1 + B2·(A1−A2), whose terms are as small as the result: subtracting the two Gram forms instead
    would lose every difference below 1e-8 of the norm.
    """
    B1, A1, B2, A2 = B1.double(), A1.double(), B2.double(), A2.double()
    moved_B, moved_A = B1 - B2, A1 - A2
    # Factors of float32 are often stored as they are, one or both of them: their term is nothing.
    if not bool(moved_A.any()):
        return product_norm(moved_B, A1)
    if not bool(moved_B.any()):
        return product_norm(B2, moved_A)
    return product_norm(torch.cat([moved_B, B2], dim=1), torch.cat([A1, moved_A], dim=0))


def squared_norm(values: torch.Tensor, buffer: torch.Tensor | None = None) -> float:
    """Sum of squares in float64; ``buffer`` is an optional flat float64 tensor to convert into."""
    flat = values.reshape(-1)
    if buffer is None:
        # By blocks that stay in a core's cache.
        return sum((float(torch.dot(wide, wide)) for wide in map(torch.Tensor.double, flat.split(BLOCK_ELEMENTS))), 0.0)
    wide = buffer[: flat.numel()]
    wide.copy_(flat)
    return float(torch.dot(wide, wide))


def row_squares(values: torch.Tensor) -> torch.Tensor:
    """Squared L2 norm of each row of an (n, m) tensor, as (n,) float64."""
    result = torch.empty(values.shape[0], dtype=torch.float64, device=values.device)
    for start, stop in row_blocks(*values.shape):
        result[start:stop] = torch.linalg.vector_norm(values[start:stop].double(), dim=1).square_()
    return result
