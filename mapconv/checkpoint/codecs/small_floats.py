"""4-bit floats (E2M1), two in a byte, with a scale for each group of columns: MX and NV formats."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.arithmetic import (
    E2M1,
    expand_nibbles,
    kept_scales,
    nibble_table,
    read_floats,
    require_scales,
    scale_,
)
from mapconv.checkpoint.codecs.base import Bytes, fault

_NIBBLES = nibble_table(E2M1, low_first=True)


@dataclass(frozen=True)
class SmallFloats:
    """``w = value · scale`` for a weight (…, width), the first of two codes in the low nibble.

    ``scale_dtype`` says what the scales' bytes are, where the file has no name for it. ``overall`` is one more scale
    for the whole weight: the others are divided by it (compressed-tensors) or multiplied (ModelOpt). ``columns``: a
    factor for each column besides.
    """

    label: str
    codes: TensorRef
    scale: TensorRef
    width: int
    group: int
    scale_dtype: str | None = None
    overall: TensorRef | None = None
    overall_is: Literal["divisor", "factor"] = "factor"
    columns: TensorRef | None = None

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return tuple(ref for ref in (self.codes, self.scale, self.overall, self.columns) if ref is not None)

    def rows(self, reader: Bytes, start: int, stop: int, out: torch.Tensor) -> None:
        half, groups = self.width // 2, -(-self.width // self.group)
        expand_nibbles(reader.read_bytes(self.codes, start * half, stop * half), _NIBBLES, out.view(-1))
        shape = 2 * self.codes.nbytes // self.width, groups
        scales, sound = kept_scales(reader, self.codes, self.scale, shape, (start, stop), partial(self._scales, reader))
        scale_(out, scales, self.group, self.scale, sound=sound)
        if self.columns is not None:
            scale_(out, read_floats(reader, self.columns, 0, self.width)[None], 1, self.columns)

    def _scales(self, reader: Bytes, start: int, stop: int) -> torch.Tensor:
        """The scales of some rows, (rows, groups)."""
        groups = -(-self.width // self.group)
        scales = read_floats(reader, self.scale, start * groups, stop * groups, self.scale_dtype).view(-1, groups)
        if self.overall is None:
            return scales
        overall = _overall(reader, self.overall)
        return scales / overall if self.overall_is == "divisor" else scales * overall


def _overall(reader: Bytes, ref: TensorRef) -> torch.Tensor:
    value = read_floats(reader, ref, 0, 1)
    require_scales(value, ref)
    if not value.all():
        raise fault(ref, "is zero, which cannot scale a weight: download the model again")
    return value
