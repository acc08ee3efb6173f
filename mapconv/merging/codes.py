"""A merged weight back in the codes that its base is stored in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mapconv.checkpoint.codecs.base import Bytes, EncodedTensor
from mapconv.checkpoint.codecs.encode import open_store
from mapconv.checkpoint.codecs.encode.base import STRIP, CodeGrid, Part, WrittenBytes
from mapconv.checkpoint.codecs.encode.scales import SHRINKS
from mapconv.merging.plan import MergeJob
from mapconv.merging.rounding import Feedback


@dataclass(frozen=True)
class Encoded:
    """A matrix in codes: the bytes to write, what the codec reads in them, and how many values lay beyond the grid."""

    parts: Sequence[Part]
    values: torch.Tensor
    saturated: int


def encode(
    job: MergeJob, index: int, rows: torch.Tensor, reader: Bytes, feedback: Feedback | None, *, recompute: bool
) -> Encoded:
    """Choose codes, and with ``recompute`` scales, for matrix ``index`` of a weight, (height, width) float32."""
    source = job.source
    assert isinstance(source, EncodedTensor)  # what the plan makes such jobs of
    store = open_store(source.encoding, reader, index)
    wanted = (rows.T if store.turned else rows).contiguous()
    if recompute:
        store.rescale(wanted)
    grid = store.grid
    levels = _nearest(grid, wanted)
    if feedback is not None:
        feedback.choose(job, index, grid, wanted, levels, turned=store.turned)
    parts = store.parts(levels)
    values = torch.empty_like(rows)
    source.encoding.rows(WrittenBytes(reader, parts), index * len(rows), (index + 1) * len(rows), values)
    # New scales cut off a little on purpose.
    return Encoded(parts, values, grid.saturated(wanted, 1 / min(SHRINKS) if recompute else 1.0))


def _nearest(grid: CodeGrid, wanted: torch.Tensor) -> torch.Tensor:
    levels = torch.empty_like(wanted)
    for start in range(0, wanted.shape[1], STRIP):
        part = slice(start, start + STRIP)
        levels[:, part] = grid.nearest(wanted[:, part], part)
    return levels
