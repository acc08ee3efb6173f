"""What of an update survives in the values as they are stored: counted while a merge writes them.

With D = W' − W0 what the adapters ask for and S what the stored values make of it, the *projection* ⟨S, D⟩ / ‖D‖² is
the part of the update that is still there (1: all of it), and ε = ‖S − D‖ / ‖D‖ what storing adds or takes besides,
in units of the update. Rounding to nearest loses an update where it is smaller than half a step: most values then keep
the bytes that they had.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mapconv.algebra.norms import BLOCK_ELEMENTS

#: Below this projection an update counts as damaged, and a merge says what helps.
DAMAGED = 0.9
#: Of a large LoRA, whose ‖D‖ its factors tell, the projection is taken on an eighth of each row block: the columns of
#: one of eight windows in turn, so that every row and every column is sampled. Its standard error on n values is about
#: ε/√n, a thousandth of ε for a million of them, at an eighth of the time.
_WINDOWS = 8


@dataclass(frozen=True)
class Survival:
    """Sums over stored values, so that those of tensors add up: of D², S·D and (S − D)², and values that changed."""

    values: int = 0
    changed: int = 0
    update_square: float = 0.0
    inner: float = 0.0
    error_square: float = 0.0

    def __add__(self, other: Survival) -> Survival:
        return Survival(
            self.values + other.values,
            self.changed + other.changed,
            self.update_square + other.update_square,
            self.inner + other.inner,
            self.error_square + other.error_square,
        )

    @property
    def changed_share(self) -> float:
        return self.changed / self.values if self.values else 0.0

    @property
    def projection(self) -> float:
        """⟨S, D⟩ / ‖D‖²; of no update, all survives."""
        return self.inner / self.update_square if self.update_square else 1.0

    @property
    def error(self) -> float:
        """ε = ‖S − D‖ / ‖D‖."""
        return (self.error_square / self.update_square) ** 0.5 if self.update_square else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {"changed": self.changed_share, "projection": self.projection, "error": self.error}


def total(parts: Iterable[Survival]) -> Survival:
    return sum(parts, start=Survival())


@dataclass
class Gauge:
    """Measures one matrix while its row blocks are written.

    Args:
        numel: how many values the matrix has.
        known_norm: ‖D‖, where it is known; else it is measured.
    """

    numel: int
    known_norm: float | None
    _windows: int = field(init=False)
    _blocks: int = 0
    _changed: int = 0
    _error_square: float = 0.0
    _update_square: float = 0.0
    _inner: float = 0.0

    def __post_init__(self) -> None:
        self._windows = 1 if self.known_norm is None or self.numel <= _WINDOWS * BLOCK_ELEMENTS else _WINDOWS

    def add(self, before: torch.Tensor, wanted: torch.Tensor, stored: torch.Tensor, spare: torch.Tensor) -> None:
        """Count a block of rows.

        Args:
            before: the base's values (p, m) as they are read, in the base's dtype.
            wanted: W' (p, m), float32.
            stored: what is written for it (p, m).
            spare: at least 2·p·m elements of float32 to work in.
        """
        self._changed += _differing(stored, before)
        error = spare[: wanted.numel()].view(wanted.shape)
        # Widened first: subtracting across dtypes is slower.
        error.copy_(stored).sub_(wanted)
        self._error_square += _dot(error, error)
        width, number = wanted.shape[1], self._blocks % self._windows
        self._blocks += 1
        window = slice(number * width // self._windows, (number + 1) * width // self._windows)
        sampled = wanted[:, window]
        weight = wanted.numel() / max(1, sampled.numel())
        update = spare[wanted.numel() :][: sampled.numel()].view(sampled.shape)
        update.copy_(before[:, window]).sub_(sampled)  # −D
        self._update_square += weight * _dot(update, update)
        self._inner -= weight * _dot(error[:, window], update)

    @property
    def result(self) -> Survival:
        """Of all blocks that were added."""
        measured = self._update_square
        square = measured if self.known_norm is None else self.known_norm**2
        # S·D = D² + (S − D)·D, of which the second term is the one that was measured.
        loss = self._inner / measured * square if measured else 0.0
        return Survival(self.numel, self._changed, square, square + loss, self._error_square)

    @property
    def finite(self) -> bool:
        return math.isfinite(self._error_square)


def _differing(stored: torch.Tensor, before: torch.Tensor) -> int:
    """How many stored values are not those that the base has in their dtype: bit for bit, which is the fastest."""
    if before.dtype != stored.dtype:
        before = before.to(stored.dtype)
    left, right = (values.view(-1).view(_BITS[values.dtype.itemsize]).numpy() for values in (stored, before))
    # numpy counts ten times as fast as torch does.
    return int(np.count_nonzero(left != right))


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _dot(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(torch.dot(left.reshape(-1), right.reshape(-1)))
