"""New scales for a matrix that codes are to stand for: as the largest values ask for, or a little finer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mapconv.checkpoint.codecs.encode.base import STRIP, CodeGrid, Levels

#: How far below the largest value of a group a new scale may put the last level: what is cut off there is little beside
#: what finer steps bring to all others. Each group takes the one with the least squared error.
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
#: From scales to what a file holds for them, and what that is read as.
Encode = Callable[[torch.Tensor], torch.Tensor]

_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Groups:
    """Which values of a matrix (n, m) share a scale: ``rows`` rows, and the columns of one group of ``count``."""

    height: int
    group_of: torch.Tensor
    count: int
    rows: int = 1

    def largest(self, numbers: torch.Tensor) -> torch.Tensor:
        """Of (n, groups), the largest of the rows that go together: (⌈n / rows⌉, groups)."""
        return self._blocks(numbers, float("-inf")).amax(1)

    def total(self, numbers: torch.Tensor) -> torch.Tensor:
        return self._blocks(numbers, 0.0).sum(1)

    def expand(self, scales: torch.Tensor) -> torch.Tensor:
        """(⌈n / rows⌉, groups) to (n, groups)."""
        return scales if self.rows == 1 else scales.repeat_interleave(self.rows, 0)[: self.height]

    def _blocks(self, numbers: torch.Tensor, filling: float) -> torch.Tensor:
        if self.rows == 1:
            return numbers[:, None]
        return torch.nn.functional.pad(numbers, (0, 0, 0, -self.height % self.rows), value=filling).unflatten(
            0, (-1, self.rows)
        )


def extremes(wanted: torch.Tensor, groups: Groups) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero or the least, and zero or the largest value of each scale's group, (⌈n / rows⌉, groups) each."""
    index = groups.group_of.expand(len(wanted), -1)
    low = torch.zeros(len(wanted), groups.count).scatter_reduce_(1, index, wanted, "amin")
    high = torch.zeros(len(wanted), groups.count).scatter_reduce_(1, index, wanted, "amax")
    return -groups.largest(-low), groups.largest(high)


def symmetric(
    wanted: torch.Tensor,
    groups: Groups,
    levels: Levels,
    zero: float,
    encode: Encode,
    shrinks: tuple[float, ...] = SHRINKS,
) -> torch.Tensor:
    """Scales for levels around ``zero``, (⌈n / rows⌉, groups) as they will be read."""
    low, high = extremes(wanted, groups)
    widest = torch.maximum(-low, high) / (levels.high - zero)
    constant = None if zero == 0 else torch.full((1, 1), zero)
    best = least = None
    for shrink in shrinks:
        # A group of zeros has any scale.
        scales = encode(torch.where(widest == 0, 1.0, widest * shrink))
        zeros = None if constant is None else constant.expand(1, groups.count)
        grid = CodeGrid(levels, groups.expand(scales), groups.group_of, zeros)
        errors = groups.total(_errors(grid, wanted, groups.count)) if len(shrinks) > 1 else None
        if best is None or least is None or errors is None:
            best, least = scales, errors
            continue
        better = errors < least
        best, least = torch.where(better, scales, best), torch.where(better, errors, least)
    assert best is not None  # there is a shrink
    return best


def asymmetric(
    wanted: torch.Tensor, groups: Groups, levels: Levels, zeros_from: float, encode: Encode
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scales, zero points) for groups that need not lie around zero; zero points are levels, ``zeros_from`` on."""
    low, high = extremes(wanted, groups)
    steps = levels.high - levels.low
    span = torch.where(high == low, 1.0, (high - low) / steps)
    best = least = None
    for shrink in SHRINKS:
        scales = encode(span * shrink)
        safe = torch.where(scales == 0, 1.0, scales)
        zeros = (levels.low - shrink * low / safe).round().clamp_(zeros_from, zeros_from + steps)
        grid = CodeGrid(levels, groups.expand(scales), groups.group_of, groups.expand(zeros))
        errors = groups.total(_errors(grid, wanted, groups.count))
        if best is None or least is None:
            best, least = (scales, zeros), errors
            continue
        better = errors < least
        best = torch.where(better, scales, best[0]), torch.where(better, zeros, best[1])
        least = torch.where(better, errors, least)
    assert best is not None  # there is a shrink
    return best


def stored_floats(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Scales in the dtype of a file, of which powers of two are rounded up: (…) to a tensor of that dtype's bytes."""
    if dtype in ("F8_E8M0", "U8"):
        exponents = torch.ceil(torch.log2(values.clamp_min(2.0**-126))).clamp_(-126, 127)
        return (exponents + 127).to(torch.uint8)
    top = torch.finfo(_FLOATS[dtype]).max
    return values.clamp(-top, top).to(_FLOATS[dtype]).contiguous()


def as_stored(dtype: str) -> Encode:
    """What scales are once they are stored in a dtype and read again."""

    def encode(values: torch.Tensor) -> torch.Tensor:
        stored = stored_floats(values, dtype)
        return (
            torch.ldexp(torch.ones(stored.shape), stored.int() - 127) if stored.dtype == torch.uint8 else stored.float()
        )

    return encode


def as_bytes(stored: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, flat uint8."""
    return stored.contiguous().view(-1).view(torch.uint8)


def _errors(grid: CodeGrid, wanted: torch.Tensor, count: int) -> torch.Tensor:
    """The squared error that rounding to nearest makes in each row's groups, (n, groups)."""
    errors = torch.zeros(len(wanted), count)
    for start in range(0, wanted.shape[1], STRIP):
        part = slice(start, start + STRIP)
        lost = grid.values(grid.nearest(wanted[:, part], part), part).sub_(wanted[:, part]).square_()
        errors.scatter_add_(1, grid.group_of[part].expand(len(wanted), -1), lost)
    return errors
