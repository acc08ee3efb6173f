"""MXFP4 as gpt-oss stores its experts: ``…_blocks`` and ``…_scales``, transposed.

``gate_up_proj_blocks`` (experts, out, in/32, 16 bytes) with ``gate_up_proj_scales`` (experts, out, in/32) make the
plain ``gate_up_proj`` (experts, in, out): ``w = value · 2^(scale − 127)``, the first of two codes in the low nibble.
Gate and up rows interleave in both forms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from mapconv.adapter import TensorRef
from mapconv.checkpoint.codecs.arithmetic import E2M1, expand_nibbles, nibble_table, read_floats, scale_
from mapconv.checkpoint.codecs.base import Bytes, EncodedTensor, QuantizedModel, fault

_BLOCKS, _SCALES = "_blocks", "_scales"
_NIBBLES = nibble_table(E2M1, low_first=True)


@dataclass(frozen=True)
class TransposedMxfp4:
    """A stack of experts (experts, width_in, width_out) whose codes are stored as (experts, width_out, width_in)."""

    codes: TensorRef
    scale: TensorRef
    label: str = "MXFP4"

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return self.codes, self.scale

    def rows(self, reader: Bytes, start: int, stop: int, out: torch.Tensor) -> None:
        height = 32 * self.codes.shape[2]
        while start < stop:
            expert, first = divmod(start, height)
            last = min(height, first + stop - start)
            count = last - first
            # Bytes hold two rows each, scales 32.
            codes, scales = reader.kept((self.codes, expert), "codes", lambda: self._expert(reader, expert))  # noqa: B023
            low, high = first // 32 * 32, -(-last // 32) * 32
            values = torch.empty((high - low) // 2, codes.shape[1], 2)
            expand_nibbles(codes[low // 2 : high // 2].reshape(-1), _NIBBLES, values.view(-1))
            values = values.transpose(1, 2).reshape(high - low, -1)
            factors = scales[low // 32 : high // 32].repeat_interleave(32, 0)
            scale_(values, factors, 1, self.scale)
            out[:count] = values[first - low : last - low]
            start, out = start + count, out[count:]

    def _expert(self, reader: Bytes, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert's codes (in/2, out) and scales (in/32, out), turned round as they are stored."""
        _, width, blocks, _ = self.codes.shape
        size = width * blocks
        codes = reader.read_bytes(self.codes, 16 * size * expert, 16 * size * (expert + 1)).view(width, 16 * blocks)
        scales = read_floats(reader, self.scale, size * expert, size * (expert + 1), "F8_E8M0").view(width, blocks)
        return codes.T.contiguous(), scales.T.contiguous()


class Mxfp4:
    """Recognises it by the blocks."""

    methods = ("mxfp4",)
    signature = ()
    companions = (_BLOCKS, _SCALES)

    def describing(self, tensors: Mapping[str, TensorRef]) -> list[TensorRef]:
        return []

    def weights(self, model: QuantizedModel) -> Iterator[EncodedTensor]:
        for name, codes in model.ending(_BLOCKS):
            if codes.dtype != "U8" or len(codes.shape) != 4 or codes.shape[3] != 16:
                raise fault(codes, f"is {codes.dtype} {list(codes.shape)}, expected U8 [experts, out, blocks, 16]")
            experts, width, blocks, _ = codes.shape
            scale = model.take(name + _SCALES, (experts, width, blocks), owner=codes)
            if scale.dtype not in ("U8", "F8_E8M0"):
                raise fault(scale, f"has dtype {scale.dtype}, expected U8")
            yield model.encoded(name, (experts, 32 * blocks, width), TransposedMxfp4(codes, scale))
