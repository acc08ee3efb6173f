"""One adapted weight's update of the stored rows that hold it, in a worker's scratch memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mapconv.algebra.dora import adapt_rows_
from mapconv.algebra.fingerprint import Fingerprint, block_fingerprint
from mapconv.algebra.increments import Increment, ProductIncrement
from mapconv.algebra.norms import product_norm
from mapconv.merging.buffers import Buffers
from mapconv.placement.weights import Piece, WeightView, block_numbers


@dataclass
class Update:
    """One weight's update, ready to be applied to rows of the stored matrix that ``piece`` lies in.

    ``base`` collects the fingerprint of the base rows that it meets, if it ``measures_base``.
    """

    view: WeightView
    piece: Piece
    identity: tuple
    increment: Increment
    base_gain: float
    update_gain: float
    magnitude: torch.Tensor | None
    measures_base: bool
    of_base: bool = False
    scales: torch.Tensor | None = None
    column_scales: torch.Tensor | None = None
    base: Fingerprint = field(default_factory=Fingerprint)

    @property
    def known_norm(self) -> float | None:
        """How far a plain LoRA moves the weight, which its factors alone tell; None where the base has a part in it."""
        increment = self.increment
        if self.rescales or self.base_gain != 1.0 or not isinstance(increment, ProductIncrement):
            return None
        return abs(self.update_gain) * product_norm(increment.B, increment.A)

    @property
    def rescales(self) -> bool:
        return self.magnitude is not None or self.column_scales is not None

    @property
    def columns(self) -> slice:
        """The stored columns of a transposed piece."""
        return slice(self.piece.offset, self.piece.offset + self.piece.stop - self.piece.start)

    def apply(self, rows: torch.Tensor, raw: torch.Tensor, start: int, stop: int, buffers: Buffers) -> None:
        """Update ``rows``, float32 copies of the stored rows ``start`` to ``stop`` whose own values are ``raw``."""
        first, last = self.piece.stored_rows
        low, high = max(start, first), min(stop, last)
        if low >= high:
            return
        if (low, high) != (start, stop):
            rows, raw = rows[low - start : high - start], raw[low - start : high - start]
        if self.piece.transposed:
            self._apply_transposed(rows[:, self.columns], raw[:, self.columns], low, high, buffers)
            return
        self._measure(raw, low, high, buffers)
        part = slice(low - first, high - first)
        adapt_rows_(
            rows,
            self.increment.part(part.start, part.stop),
            base_gain=self.base_gain,
            update_gain=self.update_gain,
            magnitude=None if self.magnitude is None else self.magnitude[part],
            of_base=self.of_base,
            columns=self.column_scales,
            into_wide=buffers.widen,
        )

    def _measure(self, raw: torch.Tensor, start: int, stop: int, buffers: Buffers) -> None:
        if self.measures_base:
            first = self.piece.stored_rows[0]
            numbers = block_numbers(self.view, self.piece, start - first, stop - first)
            self.base += block_fingerprint(raw, *numbers, buffers.wide)

    def _apply_transposed(self, rows: torch.Tensor, raw: torch.Tensor, start: int, stop: int, buffers: Buffers) -> None:
        self._measure(raw, start, stop, buffers)
        change, a, b = self.increment.columns(start, stop).T, self.base_gain, self.update_gain
        if not self.rescales:
            rows.copy_(rows.mul(a).add_(change, alpha=b))
            return
        if self.scales is not None:
            gains = (b * self.scales).float()
        else:
            assert self.column_scales is not None  # one of the two is there
            gains = (b * self.column_scales[start:stop, None]).float()
        rows.copy_((a - b + gains) * rows + gains * change)


@dataclass
class WholeUpdate:
    """A weight that is there whole, to be put in the place of the base's rows, or to go ``weight`` of the way there."""

    piece: Piece
    identity: tuple
    rows: torch.Tensor
    weight: float = 1.0
    base: Fingerprint = field(default_factory=Fingerprint)
    known_norm: float | None = None

    def apply(self, rows: torch.Tensor, raw: torch.Tensor, start: int, stop: int, buffers: Buffers) -> None:
        """As ``Update.apply``."""
        first, last = self.piece.stored_rows
        low, high = max(start, first), min(stop, last)
        if low >= high:
            return
        rows, raw = rows[low - start : high - start], raw[low - start : high - start]
        wanted = self.rows[low - first : high - first]
        if self.piece.transposed:
            offset = self.piece.offset
            rows, raw = (part[:, offset : offset + len(self.rows)] for part in (rows, raw))
            wanted = self.rows[:, low:high].T
        if self.weight == 1.0:
            rows.copy_(wanted)
        else:
            rows.add_(wanted - raw.float(), alpha=self.weight)
