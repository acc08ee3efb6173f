"""T is the base with the changes of several adapters mixed element by element: TIES and DARE (``algebra.mixing``).

The changes are dense, but never all in memory: a block of rows of each is formed from its factors. The trimming's
threshold takes two passes over them; the mixed change itself is held where it fits, and formed anew where it does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mapconv.algebra.mixing import Method, dropped, elected, threshold, trimmed
from mapconv.refit.targets.base import BLOCK_ELEMENTS, RowsTarget
from mapconv.refit.targets.sums import Effect

#: Bytes of a mixed change that is held in memory.
HELD = 96 << 20


class MixedTarget(RowsTarget):
    """The pencil of a mixed change.

    Args:
        base: W0, (n, m) float32.
        effects: T_i − W0 of each adapter.
        weights: what each is multiplied by.
        method: ``ties``, ``dare`` or ``dare-ties``.
        density: the share of elements that each change keeps.
        keys: for each adapter, what its random choice of elements depends on.
    """

    def __init__(
        self,
        base: torch.Tensor,
        effects: Sequence[Effect],
        weights: Sequence[float],
        method: Method,
        density: float,
        keys: Sequence[int],
    ) -> None:
        super().__init__((base.shape[0], base.shape[1]))
        self._base, self._effects, self._weights = base, effects, weights
        self._method: Method = method
        self._density, self._keys = density, keys
        self._step = max(1, BLOCK_ELEMENTS // base.shape[1])
        self._least: list[float] = []
        if method == "ties":
            self._least = [threshold(lambda e=effect: self._changes(e), density, base.numel()) for effect in effects]
        self._held: torch.Tensor | None = None
        if 4 * base.numel() <= HELD:
            self._held = torch.cat([self._mixed(start, stop) for start, stop in self._aligned(0, len(base))])
        square = inner = whole = 0.0
        for _, _, S, W in self.blocks():
            wide_S, wide_W = S.double().flatten(), W.double().flatten()
            square += float(torch.dot(wide_S, wide_S))
            inner += float(torch.dot(wide_S, wide_W))
            whole += float(torch.dot(wide_W, wide_W))
        self._norms = square, inner, whole

    def squared_norms(self) -> tuple[float, float, float]:
        return self._norms

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        W = self._base[start:stop].to(dtype)
        if self._held is not None:
            return self._held[start:stop].to(dtype, copy=True), W
        # Always from the same blocks: a product of other blocks may differ in its last bit, and fall below a threshold.
        pieces = [
            self._mixed(first, last)[max(start, first) - first : min(stop, last) - first]
            for first, last in self._aligned(start, stop)
        ]
        return torch.cat(pieces).to(dtype), W

    def _aligned(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The blocks of a fixed division of all rows that hold rows start … stop."""
        first = start - start % self._step
        for begin in range(first, stop, self._step):
            yield begin, min(begin + self._step, self.shape[0])

    def _changes(self, effect: Effect) -> Iterator[torch.Tensor]:
        for start, stop in self._aligned(0, self.shape[0]):
            yield effect.rows(self._base[start:stop], start, stop)

    def _mixed(self, start: int, stop: int) -> torch.Tensor:
        changes = []
        for number, (effect, weight) in enumerate(zip(self._effects, self._weights, strict=True)):
            change = effect.rows(self._base[start:stop], start, stop)
            if self._method == "ties":
                change = trimmed(change, self._least[number])
            else:
                change = dropped(change, self._density, self._keys[number], start * self.shape[1])
            changes.append(weight * change)
        return sum(changes[1:], changes[0]) if self._method == "dare" else elected(changes)


def dense_bytes(shape: tuple[int, int], adapters: int) -> int:
    """Bytes that a mixed target takes beside its base: the change, and a block of each adapter's."""
    elements = shape[0] * shape[1]
    return (4 * elements if 4 * elements <= HELD else 0) + 4 * (adapters + 4) * BLOCK_ELEMENTS
